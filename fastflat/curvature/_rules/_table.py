# SPDX-License-Identifier: Apache-2.0
"""The table of tangent rules, and the call that a rule sees."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastflat.curvature import _tangents
from fastflat.curvature._program import Ref, Step, refs

#: Rule of each op: a function of :class:`Call` that returns the K tangents of the result, a tuple of them for an op
#: with several results; None is zero.
RULES: dict[Callable, Callable[[Call], Any]] = {}


#: Numbers of arguments on whose tangents the result does not depend: second derivatives that are zero.
UNMOVED: dict[Callable, tuple[int, ...]] = {}


def rule(*ops: Callable, unmoved: tuple[int, ...] = ()) -> Callable:
    """Enter a function as the rule of these ops, which does not look at the tangents of ``unmoved`` arguments."""

    def enter(function):
        for op in ops:
            RULES[op] = function
            UNMOVED[op] = unmoved
        return function

    return enter


def moving_reads(step: Step) -> tuple[int, ...]:
    """The steps whose tangents make those of this one."""
    skipped = UNMOVED.get(step.op, ())
    if not skipped:
        return step.reads
    kept = step._replace(args=tuple(a for i, a in enumerate(step.args) if i not in skipped))
    return tuple(dict.fromkeys(r.step for a in kept.args for r in refs(a)))


class Scaled:
    """K tangents times primal factors of their shape, multiplied when somebody needs the product. A chain of
    element-wise ops, such as an activation and the quantizer behind it, so makes one pass over the K tangents, and
    only the product of its factors is kept."""

    def __init__(self, linear: Any, base: Tensor, factors: tuple[tuple[Any, Callable[[], Tensor]], ...]) -> None:
        self._linear, self._base, self._factors, self._product = linear, base, factors, None

    def product(self) -> Tensor:
        if self._product is None:
            self._product, self._base = _tangents.product(self._base, self.factor()), None
        return self._product

    def factor(self) -> Tensor:
        """The product of the factors, made once."""
        return self._linear.once(("factors", self.key()), lambda: math.prod(make() for _, make in self._factors))

    def parts(self) -> tuple[Tensor, Tensor | None]:
        """Tangents and the factor that is still to come."""
        return (self._base, self.factor()) if self._product is None else (self._product, None)

    def key(self) -> tuple:
        """Of the product: backward multiplies what forward did, in the other order."""
        return tuple(sorted((key for key, _ in self._factors), key=repr))

    def times(self, key: Any, make: Callable[[], Tensor]) -> Scaled:
        """The same with one factor more."""
        if self._product is not None:
            return Scaled(self._linear, self._product, ((key, make),))
        return Scaled(self._linear, self._base, (*self._factors, (key, make)))

    def mapped(self, name: str, function: Callable[[Tensor], Tensor]) -> Tensor | Scaled:
        """The same behind a linear op that only picks elements."""
        if self._product is not None:
            return function(self._product)
        return Scaled(self._linear, function(self._base), (((name, self.key()), lambda: function(self.factor())),))


def settled(t: Any) -> Any:
    """Tangents as tensors."""
    if hasattr(t, "product"):
        return t.product()
    return tuple(map(settled, t)) if isinstance(t, tuple) else t


class Call:
    """One step of the tangent program, as its rule sees it.

    Primal values are computed when a rule asks for them; tangents have K in front of the shape of their value.
    """

    def __init__(self, step: Step, position: int, linear: Any, tangents: dict[int, Any], k: int, wanted: set[int]):
        self._step, self._position, self._linear, self._tangents = step, position, linear, tangents
        self.k = k
        self.wanted = wanted  # results with a reader, for an op with several

    @property
    def op(self) -> Callable:
        return self._step.op

    @property
    def program(self) -> Any:
        """The program that the step is part of."""
        return self._linear.program

    @property
    def step(self) -> Step:
        return self._step

    @property
    def out(self) -> Any:
        """The primal result."""
        return self._linear.value(self._position)

    def primal(self, index: int) -> Any:
        """An argument's value: a tensor, a constant, or a list."""
        arg = self._step.args[index]
        if isinstance(arg, Ref):
            return self._linear.value(arg.step)
        if isinstance(arg, list | tuple):
            return [self._linear.value(a.step) if isinstance(a, Ref) else a for a in arg]
        return arg

    def value_of(self, arg: Ref) -> Tensor:
        """The value that an argument of another step names."""
        return self._linear.value(arg.step)

    def operand(self, index: int) -> Any:
        """An argument's value in the type of the tangents, as the other operand of a product."""
        arg = self._step.args[index]
        return self._linear.cast(arg.step) if isinstance(arg, Ref) else arg

    def operand_out(self) -> Tensor:
        """The result in the type of the tangents."""
        return self._linear.cast(self._position)

    def tangent(self, index: int) -> Any:
        """An argument's K tangents, None for zero; a list for a list."""
        arg = self._step.args[index]
        if isinstance(arg, list | tuple):
            return [settled(self._tangents.get(a.step)) if isinstance(a, Ref) else None for a in arg]
        return settled(self._tangents.get(arg.step)) if isinstance(arg, Ref) else None

    def moves(self, index: int) -> bool:
        """Whether an argument has tangents."""
        arg = self._step.args[index]
        return isinstance(arg, Ref) and self._tangents.get(arg.step) is not None

    def passed(self, index: int) -> Any:
        """An argument's tangents as they are, for a rule that hands them on."""
        return self._tangents.get(self._step.args[index].step)

    def scaled(self, index: int, key: Any, make: Callable[[], Tensor]) -> Scaled:
        """An argument's tangents times a primal factor of the same shape, made once for a key."""
        t = self.passed(index)
        if isinstance(t, Scaled):
            return t.times(key, make)
        return Scaled(self._linear, settled(t), ((key, make),))

    def origin(self, index: int) -> Any:
        """What an argument is, for the key of a quantity that several steps share; see :meth:`Program.origin`."""
        arg = self._step.args[index]
        if isinstance(arg, Ref):
            return self.program.origin(arg.step)
        return tuple(arg) if isinstance(arg, list) else arg

    def place(self, item: int | None = None) -> Any:
        """The same of the result, or of one of several."""
        return self._position if item is None else (self._position, item)

    def tangents(self) -> list[Any]:
        """The tangents of all arguments."""
        return [self.tangent(i) for i in range(len(self._step.args))]

    def once(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        """A quantity of primal values alone, computed once for all tangents and all products of a batch."""
        return self._linear.once((self._position, key), make)

    def shared(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        """The same for a key that holds all that it depends on: also computed once for all steps."""
        return self._linear.once(("shared", key), make)

    def shape(self, index: int) -> torch.Size:
        return self._linear.program.shapes[self._step.args[index].step]

    def item_shape(self, index: int, item: int) -> torch.Size:
        """Shape of one tensor of a list."""
        return self._linear.program.shapes[self._step.args[index][item].step]

    def type_of(self, dtype: torch.dtype) -> torch.dtype:
        """The type of tangents of values of this type."""
        return self._linear.dtype or dtype

    @property
    def out_shape(self) -> torch.Size:
        return self._linear.program.shapes[self._position]


def aligned(t: Tensor, dim: int) -> Tensor:
    """K tangents of a tensor of fewer axes, shaped to broadcast against K tangents of ``dim`` axes."""
    missing = dim - (t.dim() - 1)
    return t.reshape(t.shape[0], *(1,) * missing, *t.shape[1:]) if missing > 0 else t


def added(*terms: Tensor | None) -> Tensor | None:
    """The sum of what is there."""
    total = None
    for t in terms:
        if t is not None:
            total = t if total is None else total + t
    return total


#: How to compute the value of an op that must not be run as it stands: a function of the step, of what gives values,
#: and of the results that are read.
PRIMAL: dict[Callable, Callable[[Step, Callable[[int], Any], set[int]], Any]] = {}
#: Those of which only these results are then computed.
PARTIAL: set[Callable] = set()

# SPDX-License-Identifier: Apache-2.0
"""The table of tangent rules, and the call that a rule sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastflat.curvature._program import Ref, Step

#: Rule of each op: a function of :class:`Call` that returns the K tangents of the result, a tuple of them for an op
#: with several results; None is zero.
RULES: dict[Callable, Callable[[Call], Any]] = {}


def rule(*ops: Callable) -> Callable:
    """Enter a function as the rule of these ops."""

    def enter(function):
        for op in ops:
            RULES[op] = function
        return function

    return enter


class Scaled:
    """K tangents times a primal factor of their shape, multiplied when somebody needs the product. A chain of
    element-wise ops, such as an activation and the quantizer behind it, so makes one pass over the K tangents."""

    def __init__(self, base: Tensor, factor: Tensor) -> None:
        self._base, self.factor, self._product = base, factor, None

    def product(self) -> Tensor:
        if self._product is None:
            self._product, self._base = self._base * self.factor, None
        return self._product

    def parts(self) -> tuple[Tensor, Tensor | None]:
        return (self._base, self.factor) if self._product is None else (self._product, None)


def settled(t: Any) -> Any:
    """Tangents as tensors."""
    if isinstance(t, Scaled):
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
        """An argument's tangents times a primal factor of the same shape, made once."""
        t = self.passed(index)
        base, before = t.parts() if isinstance(t, Scaled) else (t, None)
        factor = self.once(key, make)
        if before is not None:
            factor = self.once((key, id(before)), lambda: before * self.once(key, make))
        return Scaled(base, factor)

    def tangents(self) -> list[Any]:
        """The tangents of all arguments."""
        return [self.tangent(i) for i in range(len(self._step.args))]

    def once(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        """A quantity of primal values alone, computed once for all tangents and all products of a batch."""
        return self._linear.once((self._position, key), make)

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


#: How to compute the value of an op that must not be run as it stands: a function of the step and of what gives values.
PRIMAL: dict[Callable, Callable[[Step, Callable[[int], Any]], Any]] = {}

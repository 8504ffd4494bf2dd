# SPDX-License-Identifier: Apache-2.0
"""A traced function as a list of ATen calls, without mutation: what the interpreter walks."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Untraceable(RuntimeError):
    """The function has no trace from which tangents could be had; the message says why."""


@dataclasses.dataclass(frozen=True, slots=True)
class Ref:
    """The value of another step, by its position."""

    step: int


class Step(NamedTuple):
    """One call. ``args`` are in the order of the schema with the defaults filled in, and hold :class:`Ref` for values;
    ``reads`` are the positions that they name."""

    op: Callable | None  # None: an input or a constant
    args: tuple
    keywords: tuple[str, ...]  # names of the trailing arguments that are keyword-only
    reads: tuple[int, ...]

    def run(self, value: Callable[[int], Any]) -> Any:
        """The result, where ``value`` gives those of other steps."""
        args = [_filled(a, value) for a in self.args]
        cut = len(args) - len(self.keywords)
        return self.op(*args[:cut], **dict(zip(self.keywords, args[cut:], strict=True)))


is_item = operator.getitem
_SAME = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


class Program(NamedTuple):
    """Steps in the order in which they can run; ``inputs`` and ``outputs`` are positions (an output may be None)."""

    steps: list[Step]
    inputs: list[int]
    outputs: list[int | None]
    constants: dict[int, Tensor]
    shapes: list[Any]  # of each step's result, a list for several
    random: list[int]  # steps that draw

    def origin(self, position: int) -> Any:
        """What gives the value of a step: itself, the step that it hands on, or (step, number) for one of several."""
        step = self.steps[position]
        if step.op in _SAME:
            return self.origin(step.args[0].step)
        return (step.args[0].step, step.args[1]) if step.op is is_item else position


def mutates(node: Any) -> bool:
    """Whether a node of a graph writes to its arguments."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def program_of(graph: Any, count: int) -> Program:
    """The program of a traced graph without what it writes; its first ``count`` inputs are the arguments."""
    steps: list[Step] = []
    inputs: list[int] = []
    outputs: list[int | None] = []
    constants: dict[int, Tensor] = {}
    shapes: list[Any] = []
    place: dict[Any, int] = {}

    def ref(node):
        return Ref(place[node])

    for node in graph.graph.nodes:
        position = len(steps)
        if node.op == "placeholder":
            inputs.append(position)
            steps.append(Step(None, (), (), ()))
        elif node.op == "get_attr":
            tensor = getattr(graph, node.target)
            first = next((i for i, t in constants.items() if _one(t, tensor)), None)
            if first is not None:
                place[node] = first
                continue
            constants[position] = tensor
            steps.append(Step(None, (), (), ()))
        elif node.op == "output":
            flat = torch.utils._pytree.tree_leaves(node.args[0], is_leaf=lambda n: n is None)
            outputs = [None if n is None else place[n] for n in flat]
            break
        else:
            if mutates(node):
                if node.users:
                    raise Untraceable(f"{node.target} writes in place")
                continue  # a buffer is brought up to date: not here
            args = torch.fx.node.map_arg(node.args, ref)
            kwargs = torch.fx.node.map_arg(node.kwargs, ref)
            steps.append(_step(node.target, args, kwargs))
        place[node] = position
        shapes.append(_shape(node.meta.get("val")))
    random = [i for i, s in enumerate(steps) if torch.Tag.nondeterministic_seeded in getattr(s.op, "tags", ())]
    return Program(steps, inputs[:count], outputs, constants, shapes, random)


def _one(a: Tensor, b: Tensor) -> bool:
    """Whether two constants of a trace are one tensor, which each use of it brings in anew."""
    return a is b or (
        a.data_ptr() == b.data_ptr() != 0 and a.dtype == b.dtype and a.size() == b.size() and a.stride() == b.stride()
    )


def _shape(value: Any) -> Any:
    return [_shape(v) for v in value] if isinstance(value, (list, tuple)) else getattr(value, "shape", None)


def _step(op: Callable, args: tuple, kwargs: dict) -> Step:
    schema = getattr(op, "_schema", None)
    keywords: tuple[str, ...] = ()
    if schema is not None:
        filled = list(args)
        for argument in schema.arguments[len(args) :]:
            filled.append(kwargs.get(argument.name, argument.default_value))
        args = tuple(filled)
        keywords = tuple(a.name for a in schema.arguments if a.kwarg_only)
    reads: list[int] = []
    for a in args:
        reads += [r.step for r in refs(a)]
    return Step(op, tuple(args), keywords, tuple(dict.fromkeys(reads)))


def refs(a: Any) -> list[Ref]:
    if isinstance(a, Ref):
        return [a]
    return [r for part in a for r in refs(part)] if isinstance(a, (list, tuple)) else []


def _filled(a: Any, value: Callable[[int], Any]) -> Any:
    if isinstance(a, Ref):
        return value(a.step)
    return [_filled(part, value) for part in a] if isinstance(a, (list, tuple)) else a

# SPDX-License-Identifier: Apache-2.0
"""A program linearised at a point: K tangents at once through every step, each primal value computed at most once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastflat.curvature import _memory, _rules
from fastflat.curvature._program import Program, Ref, Step, is_item
from fastflat.curvature._rules import Call


class Plan:
    """Which steps have a tangent that some wanted output reads, and after which step a tangent is needed no more."""

    def __init__(self, program: Program, seeds: Iterable[int], outputs: Iterable[int]) -> None:
        steps = program.steps
        seeds, outputs = set(seeds), set(outputs)
        reached, reads = set(seeds), {}
        for i, step in enumerate(steps):
            if step.op is not None and step.op not in _rules.CONSTANT:
                reads[i] = [r for r in _rules.moving_reads(step) if r in reached]
                if reads[i]:
                    reached.add(i)
        needed, open_ = set(), [o for o in outputs if o in reached]
        while open_:
            i = open_.pop()
            if i not in needed:
                needed.add(i)
                open_ += [] if i in seeds else reads[i]
        self.active = sorted(i for i in needed if i not in seeds)
        self.reads = {i: tuple(reads[i]) for i in self.active}
        self.wanted: dict[int, set[int]] = {}
        last: dict[int, int] = {}
        for i in self.active:
            for r in reads[i]:
                last[r] = i
            if steps[i].op is is_item:
                self.wanted.setdefault(steps[i].args[0].step, set()).add(steps[i].args[1])
        self.read = set(last)
        self.freed: dict[int, list[int]] = {}
        for r, i in last.items():
            if r not in outputs:
                self.freed.setdefault(i, []).append(r)
        self.peak = _peak(program, seeds, self.active, last, outputs)
        self.spent = _spent(program, self.active, self.reads)


#: Arguments of products: a tangent of one asks for the value of the others.
_FACTORS = {
    torch.ops.aten.convolution.default: (0, 1),
    torch.ops.aten.convolution_backward.default: (0, 1, 2),
    torch.ops.aten.mm.default: (0, 1),
    torch.ops.aten.addmm.default: (1, 2),
    torch.ops.aten.bmm.default: (0, 1),
    torch.ops.aten.mul.Tensor: (0, 1),
}


def _certainly_asked(step: Step, moving: Sequence[int]) -> list[int]:
    factors = [a.step for i in _FACTORS.get(step.op, ()) if isinstance(a := step.args[i], Ref)]
    return [r for r in factors if any(m in factors and m != r for m in moving)]


def _spent(program: Program, active: list[int], reads: dict[int, tuple[int, ...]]) -> dict[int, list[int]]:
    """After which active step a primal value is needed no more: after the last that has it for an argument, and after
    the first that certainly asks for what is made of it."""
    asked: dict[int, int] = {}
    until: dict[int, int] = {}
    for i in active:
        step = program.steps[i]
        for r in step.reads:
            until[r] = i
        until[i] = max(until.get(i, i), i)
        for r in _certainly_asked(step, reads[i]):
            asked.setdefault(r, i)
    for q in range(len(program.steps) - 1, -1, -1):
        if q in asked:
            for p in program.steps[q].reads:
                asked[p] = min(asked.get(p, asked[q]), asked[q])
                until[p] = max(until.get(p, asked[q]), asked[q])
    spent: dict[int, list[int]] = {}
    for p, i in until.items():
        if program.steps[p].op is not None and p not in program.random:
            spent.setdefault(i, []).append(p)
    return spent


def _peak(program: Program, seeds: set[int], active: list[int], last: dict[int, int], outputs: set[int]) -> int:
    """The most elements that the tangents of one vector hold at once, its own included and results not."""
    owner: dict[int, int] = {}
    until: dict[int, int] = {}
    for i in (*sorted(seeds), *active):
        step = program.steps[i]
        owner[i] = owner[step.reads[0]] if step.op in _VIEWS and step.reads[0] in owner else i
        until[owner[i]] = max(until.get(owner[i], i), last.get(i, i))
    ends: dict[int, list[int]] = {}
    for own, end in until.items():
        ends.setdefault(end, []).append(own)
    held = highest = sum(_elements(program.shapes[i]) for i in seeds)
    for i in active:
        held += _elements(program.shapes[i]) if owner[i] == i and i not in outputs else 0
        highest = max(highest, held)
        held -= sum(_elements(program.shapes[o]) for o in ends.get(i, ()) if o not in seeds and o not in outputs)
    return highest


def _elements(shape: Any) -> int:
    """Of a result; of several the first, since the others are small."""
    first = shape[0] if isinstance(shape, list) and shape else shape
    return first.numel() if isinstance(first, torch.Size) else 0


#: Ops whose tangents are views of those of their first argument, or the same.
_VIEWS = {
    is_item,
    *(torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default, torch.ops.aten.t.default),
    *(torch.ops.aten.transpose.int, torch.ops.aten.permute.default, torch.ops.aten.expand.default),
    *(torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.clone.default),
    *(torch.ops.aten.relu.default, torch.ops.aten.threshold_backward.default),
}


class Linear:
    """A :class:`Program` at one point.

    Primal values are computed on demand. Those that a rule asked for are kept, with the derivative factors that rules
    make of them, and serve all K tangents and every later product at this point. What a function draws at random is
    drawn here, once, in the order of the function; the generators are then as before.

    Args:
        program: the traced function.
        inputs: its input tensors.
        plans: where plans are remembered, shared by all points of one program.
        dtype: type of the tangents; None for that of the values.
    """

    def __init__(
        self, program: Program, inputs: Sequence[Tensor], plans: dict[Any, Plan], dtype: torch.dtype | None = None
    ) -> None:
        self.program, self.dtype, self._plans = program, dtype, plans
        self._values: dict[int, Any] = dict(program.constants)
        self._values.update(zip(program.inputs, inputs, strict=True))
        self._asked = {*self._values, *program.random}
        self._made: dict[Any, Tensor] = {}
        self._making = 0
        self._computed: set[int] = set()
        self._again = False
        if program.random:
            devices = list({t.device for t in inputs if t.device.type == "cuda"})
            with torch.random.fork_rng(devices):
                for position in program.random:
                    self.value(position)

    def value(self, position: int) -> Any:
        """The primal value of a step."""
        values = self._values
        if not self._making:
            self._asked.add(position)
        if position not in values:
            missing, open_, read = set(), [position], {}
            while open_:
                i = open_.pop()
                if i not in missing and i not in values:
                    missing.add(i)
                    step = self.program.steps[i]
                    open_ += step.reads
                    if step.op is is_item:
                        read.setdefault(step.args[0].step, set()).add(step.args[1])
            with torch.no_grad():
                for i in sorted(missing):
                    step = self.program.steps[i]
                    # A guess about what a rule will ask for was wrong: from now on values stay while they may be asked.
                    self._again = self._again or i in self._computed
                    self._computed.add(i)
                    own = _rules.PRIMAL.get(step.op)
                    at = values.__getitem__
                    values[i] = step.run(at) if own is None else own(step, at, read.get(i, set()))
                for i in missing:
                    if self.program.steps[i].op in _rules.PARTIAL:
                        del values[i]  # some of its results, each a value by itself now
        return values[position]

    def cast(self, position: int) -> Any:
        """The primal value in the type of the tangents."""
        value = self.value(position)
        if self.dtype is None or not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return self.once((position, "cast"), lambda: value)

    def once(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        if key not in self._made:
            # What only such quantities are made of is not asked for again.
            self._making += 1
            try:
                made = make()
            finally:
                self._making -= 1
            self._made[key] = made if self.dtype is None else made.to(self.dtype)
        return self._made[key]

    def plan(self, seeds: Iterable[int], outputs: Sequence[int | None]) -> Plan:
        """The steps between some inputs and some outputs."""
        key = (frozenset(seeds), frozenset(outputs))
        if key not in self._plans:
            self._plans[key] = Plan(self.program, seeds, [o for o in outputs if o is not None])
        return self._plans[key]

    def _let_go(self, positions: Iterable[int]) -> None:
        for position in positions:
            if position not in self._asked:
                self._values.pop(position, None)

    def drop_unasked(self) -> None:
        """At the end of a pass, let go of values that served to compute others only."""
        for position in self._values.keys() - self._asked:
            del self._values[position]
        self._computed.clear()

    def push(
        self,
        seeds: dict[int, Tensor],
        outputs: Sequence[int | None],
        take: Callable[[int, Tensor], None] | None = None,
        *,
        first_of_two: bool = False,
    ) -> list[Tensor | None]:
        """The K tangents of some outputs (positions of steps) for K tangents of some inputs, each ``[K, *shape]``;
        None where nothing reaches an output. ``take(number of the output, tangents)`` is called instead, as soon as
        they are there, so that not all of them are held. Values are kept for a second push where it is the first.

        Raises:
            MemoryError: K tangents do not fit; the message says how many do.
        """
        plan = self.plan(seeds, outputs)
        first = next(iter(seeds.values()))
        k, given = first.shape[0], first.dtype
        results: list[Tensor | None] = [None] * len(outputs)
        take = results.__setitem__ if take is None else take
        numbers: dict[int, list[int]] = {}
        for number, position in enumerate(outputs):
            numbers.setdefault(position, []).append(number)

        def finish(position: int) -> None:
            t = _rules.settled(tangents.get(position))
            for number in numbers[position] if t is not None else ():
                take(number, t.to(given))

        with _memory.watched(self, plan, k, first):
            tangents: dict[int, Any] = {i: t.to(self.dtype or t.dtype) for i, t in seeds.items()}
            with torch.no_grad():
                for i in plan.active:
                    step = self.program.steps[i]
                    if any(tangents.get(r) is not None for r in plan.reads[i]):
                        tangents[i] = _rules.tangent(Call(step, i, self, tangents, k, plan.wanted.get(i, set())))
                    if i in numbers and i not in plan.read:
                        finish(i)
                        tangents.pop(i, None)
                    for r in plan.freed.get(i, ()):
                        tangents.pop(r, None)
                    if not self._again and not first_of_two:
                        self._let_go(plan.spent.get(i, ()))
            for position in numbers:
                if position in plan.read or position in seeds:
                    finish(position)
        if not first_of_two:
            self.drop_unasked()
        return results

# SPDX-License-Identifier: Apache-2.0
"""Calls of the sharpness and descent families for the tests of every backend: awkward lists, and comparison by bits."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import torch
from torch import Tensor

from fastflat._ops.descent import HYPER, RULES
from fastflat.backends import reference

from . import comparison as common

#: Sizes around the units and stages of the kernels, an empty tensor, a scalar, axes that are not contiguous.
SHAPES = ((), (0,), (1,), (5,), (33, 7), (2, 3, 4, 5), (1025,), (3, 0, 2))
LARGER = ((70001,), (32768,), (64, 513))

#: (storage of the weights, of the gradients, of a copy in 16 bits)
STORAGES = {
    "fp32": (torch.float32, torch.float32, None),
    "fp64": (torch.float64, torch.float64, None),
    "bf16": (torch.bfloat16, torch.bfloat16, None),
    "fp16": (torch.float16, torch.float16, None),
    "master bf16": (torch.float32, torch.bfloat16, torch.bfloat16),
    "master fp16": (torch.float32, torch.float16, torch.float16),
}


@dataclasses.dataclass
class Lists:
    """Weights with everything that belongs to each of them."""

    ws: list[Tensor]
    backup: Tensor  # bytes of other weights, in storage order
    at: list[int]
    outs: list[Tensor]
    gs: list[Tensor]
    firsts: list[Tensor]
    states: list[list[Tensor]]  # three lists in the compute type; the second and third are not negative
    averages: list[Tensor]

    def copy(self) -> Lists:
        return copy.deepcopy(self)

    def tensors(self) -> list[Tensor]:
        return [*self.ws, self.backup, *self.outs, *itertools.chain(*self.states), *self.averages]


def make(storage: str, shapes=SHAPES, special: bool = True, seed: int = 0) -> Lists:
    weight, gradient, copied = STORAGES[storage]
    compute = torch.float64 if weight == torch.float64 else torch.float32
    seeds = itertools.count(100 * seed)

    def data(dtype, positive=False):
        made = []
        for t, shape in enumerate(shapes):
            x = common.random_data(shape, torch.float64, next(seeds), special).to(dtype)
            x = x.abs() if positive else x
            made.append(x.to(memory_format=torch.channels_last) if len(shape) == 4 and t % 2 else x)
        return made

    backup, at = backup_of(data(weight))
    return Lists(
        ws=data(weight),
        backup=backup,
        at=at,
        outs=data(copied) if copied else [],
        gs=data(gradient),
        firsts=data(gradient),
        states=[data(compute), data(compute, True), data(compute, True)],
        averages=data(compute),
    )


def backup_of(tensors: list[Tensor]) -> tuple[Tensor, list[int]]:
    """Their bytes in storage order, each from a multiple of 64 on, with some space between them."""
    at, end = [], 64
    for t in tensors:
        at.append(end)
        end += -(-t.numel() * t.element_size() // 64) * 64 + 64
    backup = torch.full((end,), 77, dtype=torch.uint8)
    for t, start in zip(tensors, at, strict=True):
        flat = t.as_strided((t.numel(),), (1,))
        backup[start : start + t.numel() * t.element_size()] = flat.view(torch.uint8)
    return backup, at


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        common.assert_same_bits(a, b)


def hyper(**numbers) -> Tensor:
    """One group's numbers, those not named at the values of a plain step."""
    of = {"lr": 0.1, "beta1": 0.9, "beta2": 0.0, "eps": 1e-8, "partial": 0.5, **numbers}
    assert set(of) <= set(HYPER)
    return torch.tensor([[of.get(name, 0.0) for name in HYPER]], dtype=torch.float64)


def rows(count: int, rule: str, mix=(0.0, 1.0, 0.0), steps=3.0, sums=None, **numbers) -> Tensor:
    """Rows of `count` tensors of one group, by the reference."""
    return reference.descent_rows_(
        hyper(**numbers),
        torch.zeros(count, dtype=torch.int64),
        torch.full((count,), steps, dtype=torch.float64),
        torch.tensor(mix, dtype=torch.float64),
        sums if sums is not None else torch.ones(count, 3, dtype=torch.float64),
        torch.ones(count, 3, dtype=torch.float64) * 4,
        RULES[rule],
    )


@dataclasses.dataclass(frozen=True)
class Step:
    """A call of one of the optimizers' ops: ``run(module, lists)`` changes the lists in place."""

    name: str
    op: str
    rule: str
    numbers: dict
    mix: tuple = (0.0, 1.0, 0.0)
    steps: float = 3.0
    states: int = 1
    mixed: bool = False
    restores: bool = True
    averages: bool = False
    seeded: bool = False

    def arguments(self, lists: Lists) -> tuple:
        count = len(lists.ws)
        made = rows(count, self.rule, self.mix, self.steps, **self.numbers)
        state = torch.tensor([2024, 7], dtype=torch.int64) if self.seeded else None
        restored = (lists.backup, lists.at) if self.restores else (None, [])
        firsts = lists.firsts if self.mixed else []
        averages = lists.averages if self.averages else []
        if self.op == "descent_sgd_":
            momenta = lists.states[0] if self.states else []
            return (lists.ws, lists.outs, *restored, lists.gs, firsts, momenta, averages, made, state)
        if self.op == "descent_adam_":
            largest = lists.states[2] if self.states == 3 else []
            states = (lists.states[0], lists.states[1], largest)
            return (
                lists.ws,
                lists.outs,
                *restored,
                lists.gs,
                firsts,
                *states,
                averages,
                made,
                self.rule == "padam",
                state,
            )
        if self.op == "descent_lamb_moments_":
            return (lists.ws, *restored, lists.gs, firsts, *lists.states[:2], made)
        sums = torch.tensor([[2.0, 0.0, 3.0]], dtype=torch.float64).repeat(count, 1)
        sums[::3, 0] = 0.0
        return (lists.ws, lists.outs, *restored, *lists.states[:2], averages, made, sums, state)


_SGD = {"lr": 0.1, "beta1": 0.9, "beta2": 0.1, "decay": 0.01}
_ADAM = {"lr": 0.01, "beta1": 0.9, "beta2": 0.999, "decay": 0.02}

STEPS = (
    Step("plain", "descent_sgd_", "sgd", {"lr": 0.1}, states=0, restores=False),
    Step("momentum", "descent_sgd_", "sgd", _SGD),
    Step("first", "descent_sgd_", "sgd", {**_SGD, "nesterov": 1}, steps=0.0),
    Step("nesterov", "descent_sgd_", "sgd", {**_SGD, "nesterov": 1, "ascend": 1}, restores=False),
    Step("mixed", "descent_sgd_", "sgd", {**_SGD, "decoupled": 1}, mix=(-0.4, 1.3, 0.0), mixed=True),
    Step("averaged", "descent_sgd_", "sgd", {**_SGD, "average": 0.125}, averages=True),
    Step("not averaged", "descent_sgd_", "sgd", _SGD, averages=True),
    Step("skipped", "descent_sgd_", "sgd", {**_SGD, "average": 0.5}, mix=(0.0, 1.0, 1.0), averages=True),
    Step("a decay below fp32", "descent_sgd_", "sgd", {**_SGD, "decay": 1e-60}),
    Step("lars", "descent_sgd_", "lars", {**_SGD, "trust": 0.02, "eps": 1e-9}),
    Step("adam", "descent_adam_", "adam", _ADAM, states=2),
    Step("adamw", "descent_adam_", "adam", {**_ADAM, "decoupled": 1}, states=2, restores=False, steps=0.0),
    Step("amsgrad", "descent_adam_", "adam", _ADAM, states=3, mixed=True, mix=(0.2, 0.8, 0.0)),
    Step("padam", "descent_adam_", "padam", {**_ADAM, "decoupled": 1, "partial": 0.125}, states=3),
    Step("padam without largest", "descent_adam_", "padam", {**_ADAM, "partial": 0.25}, states=2, averages=True),
    Step("adam skipped", "descent_adam_", "adam", {**_ADAM, "average": 1}, states=3, mix=(0, 1, 1), averages=True),
    Step("moments", "descent_lamb_moments_", "lamb", {**_ADAM, "trust": 1}, states=2, mixed=True, mix=(0.2, 0.8, 0)),
    Step("moments skipped", "descent_lamb_moments_", "lamb", {**_ADAM, "trust": 1}, states=2, mix=(0, 1, 1)),
    Step("lamb", "descent_lamb_", "lamb", {**_ADAM, "trust": 1, "average": 0.5}, states=2, averages=True),
    Step("lamb without trust", "descent_lamb_", "lamb", _ADAM, states=2, restores=False),
)
STOCHASTIC = tuple(
    dataclasses.replace(step, name=step.name + ", stochastic", seeded=True)
    for step in STEPS
    if step.name in ("momentum", "averaged", "skipped", "adam", "lamb")
)


def run_step(kernel, step: Step, lists: Lists) -> list[Tensor]:
    """All tensors after the call, and what it returned."""
    result = kernel(*step.arguments(lists))
    return lists.tensors(), result


@dataclasses.dataclass(frozen=True)
class Rise:
    """A call of sharpness_ascent_: ``mode`` backup, into (the copies in 16 bits, or new tensors) or in place."""

    mode: str
    metric: int
    eta: float = 0.01
    seeded: bool = False
    one_for_all: bool = False

    def arguments(self, lists: Lists) -> tuple:
        count = len(lists.ws)
        scale = [(0.05, -0.3, 1e-30, 0.0)[t % 4] for t in range(count)]
        scale = torch.tensor([*scale, 2.0, 1.0], dtype=torch.float64)
        state = torch.tensor([11, -3], dtype=torch.int64) if self.seeded else None
        metric = [self.metric] if self.one_for_all else [self.metric if t % 3 else 0 for t in range(count)]
        if self.mode == "into":
            if not lists.outs:
                lists.outs = [torch.empty_like(w) for w in lists.ws]
            return (lists.ws, lists.gs, lists.outs, None, [], scale, metric, self.eta, state)
        kept = (lists.backup, lists.at) if self.mode == "backup" else (None, [])
        return (lists.ws, lists.gs, [], *kept, scale, metric, self.eta, state)


RISES = tuple(Rise(mode, metric) for mode in ("backup", "into", "inplace") for metric in (0, 1, 2)) + (
    Rise("backup", 1, one_for_all=True),
)

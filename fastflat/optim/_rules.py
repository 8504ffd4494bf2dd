# SPDX-License-Identifier: Apache-2.0
"""The base optimizers that the descent kernels know: their options, states and numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastflat._ops.descent import HYPER, RULES

Group = dict[str, Any]

#: States of a parameter, under the names that torch.optim gives them.
MOMENTUM, MEAN, SQUARES, LARGEST, AVERAGE = (
    "momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "average",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Rule:
    """A base optimizer.

    Attributes:
        name: as users write it.
        number: of :data:`fastflat._ops.descent.RULES`.
        defaults: options of a parameter group with their defaults.
        slots: names of the states that a group's parameters have, in the order of the kernel's arguments.
        numbers: columns of :data:`fastflat._ops.descent.HYPER` that a group gives, beside those all rules share.
    """

    name: str
    number: int
    defaults: dict[str, Any]
    slots: Callable[[Group], tuple[str, ...]]
    numbers: Callable[[Group], dict[str, float]]

    def hyper(self, group: Group, adapted: bool) -> tuple[float, ...]:
        """The group's row of numbers; ``adapted`` says whether LARS and LAMB scale these parameters' steps."""
        lr = group["lr"]
        of = {
            "lr": 0.0 if isinstance(lr, Tensor) else float(lr),
            "decay": group["weight_decay"],
            "decoupled": group["decoupled"],
            "ascend": group["maximize"],
            "average": group.get("average_weight", 0.0),
            **self.numbers(group),
        }
        if not adapted:
            of["trust"] = 0.0
        return tuple(float(of.get(name, 0.0)) for name in HYPER)

    def __reduce__(self):
        return _named, (self.name,)

    def check(self, op: str, group: Group) -> None:
        """One clear line for an option out of its range."""
        for name in _AT_LEAST_ZERO:
            value = group.get(name, 0.0)
            if name not in _OF_ASCENT and (value is None or isinstance(value, (Tensor, bool, str))):
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"{op}: {name} must be a finite number of at least 0, got {value!r}")
        for name in ("momentum", "dampening"):
            if name in group and not 0 <= group[name] <= 1:
                raise ValueError(f"{op}: {name} must lie in [0, 1], got {group[name]!r}")
        betas = group.get("betas", (0.0, 0.0))
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"{op}: betas must be two numbers in [0, 1), got {betas!r}")
        if group.get("nesterov") and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError(f"{op}: nesterov must have a momentum and no dampening, got {group['momentum']!r}")
        lr = group.get("lr")
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"{op}: lr must be a number or a tensor of one value, got shape {list(lr.shape)}")


_OF_ASCENT = ("rho", "eta")
_AT_LEAST_ZERO = (
    "lr", "weight_decay", "eps", "momentum", "dampening", "partial", "trust_coefficient", *_OF_ASCENT,
)  # fmt: skip


def _momentum_slots(group: Group) -> tuple[str, ...]:
    return (MOMENTUM,) if group["momentum"] else ()


def _adam_slots(group: Group) -> tuple[str, ...]:
    return (MEAN, SQUARES, LARGEST) if group["amsgrad"] else (MEAN, SQUARES)


def _sgd_numbers(group: Group) -> dict[str, float]:
    return {"beta1": group["momentum"], "beta2": group["dampening"], "nesterov": group["nesterov"], "partial": 0.5}


def _adam_numbers(group: Group) -> dict[str, float]:
    return {"beta1": group["betas"][0], "beta2": group["betas"][1], "eps": group["eps"], "partial": 0.5}


_SHARED = {"maximize": False, "decoupled": False}
_SGD = {"lr": 1e-3, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, **_SHARED}
_ADAM = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False, **_SHARED}

BASES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule("sgd", RULES["sgd"], _SGD, _momentum_slots, _sgd_numbers),
        Rule("adam", RULES["adam"], _ADAM, _adam_slots, _adam_numbers),
        Rule("adamw", RULES["adam"], {**_ADAM, "weight_decay": 1e-2, "decoupled": True}, _adam_slots, _adam_numbers),
        Rule(
            "padam",
            RULES["padam"],
            {**_ADAM, "amsgrad": True, "decoupled": True, "partial": 0.125},
            _adam_slots,
            lambda group: {**_adam_numbers(group), "partial": group["partial"]},
        ),
        Rule(
            "lars",
            RULES["lars"],
            {**_SGD, "momentum": 0.9, "trust_coefficient": 0.001, "eps": 0.0, "adapt_vectors": False},
            _momentum_slots,
            lambda group: {**_sgd_numbers(group), "eps": group["eps"], "trust": group["trust_coefficient"]},
        ),
        Rule(
            "lamb",
            RULES["lamb"],
            {**_ADAM, "eps": 1e-6, "weight_decay": 1e-2, "adapt_vectors": False},
            lambda group: (MEAN, SQUARES),
            lambda group: {**_adam_numbers(group), "trust": 1.0},
        ),
    )
}

#: A rule for bases whose step is torch's own.
FOREIGN = Rule("torch", -1, {}, lambda group: (), lambda group: {})


def _named(name: str) -> Rule:
    return FOREIGN if name == FOREIGN.name else BASES[name]


#: torch's own classes whose steps the kernels take, and their options that a kernel does not need.
TORCH_BASES: dict[type, str] = {torch.optim.SGD: "sgd", torch.optim.Adam: "adam", torch.optim.AdamW: "adamw"}
IGNORED = ("foreach", "fused", "capturable")


def base_of(op: str, base: object, options: dict[str, Any], fused: bool | None) -> Rule | type | Callable:
    """The rule that ``base`` names, or the class itself where its steps are torch's own."""
    if isinstance(base, str):
        if base.lower() not in BASES:
            raise ValueError(f"{op}: base must be one of {', '.join(BASES)}, or a class of torch.optim, got {base!r}")
        return BASES[base.lower()]
    if isinstance(base, Rule):
        return base
    if not callable(base):
        raise TypeError(f"{op}: base must be a name or an optimizer class, got {type(base).__name__}")
    known = TORCH_BASES.get(base)
    if fused is not False and known and not options.get("differentiable"):
        return BASES[known]
    if fused:
        names = ", ".join(cls.__name__ for cls in TORCH_BASES)
        raise ValueError(f"{op}: fused=True must have a base of {names} or a name, got {base!r}")
    return base

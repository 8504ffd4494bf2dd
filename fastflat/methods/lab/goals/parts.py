# SPDX-License-Identifier: Apache-2.0
"""What combinations are made of: quantizers, optimizers and losses, each the drop-in of its method."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastflat.methods import cure, noise_tempering, symreg
from fastflat.methods._hook import Hook
from fastflat.methods.dign import DiGN
from fastflat.methods.gadam import Gadam, averaged, averaging_schedule
from fastflat.methods.hero import HERO
from fastflat.methods.lab.training import cosine
from fastflat.methods.saddle_longtail import RebalancedLoss
from fastflat.methods.sam import SAM
from fastflat.optim import SGD

Point = Mapping[str, float]
Inside = contextlib.AbstractContextManager[None]


@dataclasses.dataclass(frozen=True)
class Part:
    """A way to quantize, to step, or to penalise.

    Attributes:
        words: for a table.
        make: a quantizer: ``() -> Hook``; an optimizer: ``(model, groups, point, steps) -> Optimizer``; a loss:
            ``(point, counts) -> Hook``, counts being the training examples of each class.
        passes: factor of the forward-backward passes of a step.
        points: values that are tuned, one training each; empty where there are none.
        tuned_on: (condition, metric) that chooses from them.
        tried: conditions of the search for which it is trained; for others it has nothing to say.
        method: whose drop-in it is.
        decay: of the weights.
    """

    words: str
    make: Callable[..., Any]
    passes: int = 1
    points: tuple[Point, ...] = ()
    tuned_on: tuple[str, str] = ("clean", "validation_accuracy")
    tried: tuple[str, ...] = ("clean", "noisy", "tail")
    method: str | None = None
    decay: float = 5e-4


class Objective(Hook):
    """The loss object of a method, made when the training starts.

    Args:
        make: ``(model) -> ((x, y) -> (loss, scores))``.
    """

    def __init__(self, make: Callable[[nn.Module], Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]) -> None:
        self._make = make

    def start(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        self._objective = self._make(model)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._objective(x, y)


class Joined(Hook):
    """The hook of a quantizer and that of a loss in one training: both at every joint, the loss from the second."""

    def __init__(self, quantizer: Hook, loss: Hook) -> None:
        self.quantizer, self.objective = quantizer, loss

    def prepare(self, model: nn.Module) -> None:
        self.quantizer.prepare(model)
        self.objective.prepare(model)

    def start(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        self.quantizer.start(model, optimizer, steps)
        self.objective.start(model, optimizer, steps)

    def before(self, step: int) -> None:
        self.quantizer.before(step)
        self.objective.before(step)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.objective.loss(model, x, y)

    def after(self, step: int) -> None:
        self.quantizer.after(step)
        self.objective.after(step)

    def finish(self) -> None:
        self.quantizer.finish()
        self.objective.finish()


def _descent(model: nn.Module, groups: list[dict[str, Any]], point: Point, steps: int) -> torch.optim.Optimizer:
    return SGD(groups, momentum=0.9, **point)


def _ascent(
    kind: type[SAM], model: nn.Module, groups: list[dict[str, Any]], point: Point, steps: int
) -> torch.optim.Optimizer:
    return kind(groups, momentum=0.9, model=model, **point)


def _average(model: nn.Module, groups: list[dict[str, Any]], point: Point, steps: int) -> Gadam:
    return Gadam(groups, average_start=averaging_start(steps), **point)


def averaging_start(steps: int) -> int:
    """The step from which Gadam averages: half of them."""
    return max(1, steps // 2)


def _noisy_copies(point: Point, counts: Sequence[int]) -> Hook:
    # One copy: its mean is that of three, for half the passes.
    return Objective(functools.partial(DiGN, K=1, keep_prob=1.0, **point))


def _rebalanced(point: Point, counts: Sequence[int]) -> Hook:
    criterion = RebalancedLoss(counts, "vs", **point)

    def of(model: nn.Module) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        def objective(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            scores = model(x)
            return criterion(scores, y), scores

        return objective

    return Objective(of)


def _grid(**values: Sequence[float]) -> tuple[Point, ...]:
    points: list[dict[str, float]] = [{}]
    for name, choices in values.items():
        points = [{**point, name: value} for point in points for value in choices]
    return tuple(points)


#: Learned scales; the same with gradients scaled by the rounding error; the same with fading noise.
QUANTIZERS = {
    "lsq": Part("LSQ", Hook),
    "ewgs": Part(
        "EWGS, learned factor",
        lambda: noise_tempering.METHOD.hook("learned", noise=False),
        method="noise_tempering",
    ),
    "tempered": Part("noise tempering", lambda: noise_tempering.METHOD.hook("learned"), method="noise_tempering"),
}
#: Four points each.
OPTIMIZERS = {
    "sgd": Part("SGD", _descent, points=_grid(lr=(0.05, 0.025, 0.1, 0.2))),
    "sam": Part("SAM", functools.partial(_ascent, SAM), 2, _grid(lr=(0.05, 0.1), rho=(0.05, 0.2)), method="sam"),
    "hero": Part("HERO", functools.partial(_ascent, HERO), 3, _grid(lr=(0.05, 0.1), rho=(0.1, 0.5)), method="hero"),
    "gadam": Part("Gadam", _average, points=_grid(lr=(0.001, 0.002, 0.004, 0.008)), method="gadam", decay=0.1),
}
#: Three points each.
LOSSES = {
    "none": Part("none", lambda point, counts: Hook()),
    "symreg": Part(
        "SymReg",
        lambda point, counts: symreg.METHOD.hook(saturated=False, **point),
        points=_grid(gamma=(0.1, 0.03, 0.3)),
        tuned_on=("clean", "validation_rounded"),
        method="symreg",
    ),
    "dign": Part(
        "DiGN, one copy, all of it noisy",
        _noisy_copies,
        2,
        _grid(smax=(1.2, 0.6, 2.4)),
        ("clean", "validation_corrupted"),
        method="dign",
    ),
    "cure": Part(
        "CURE",
        lambda point, counts: cure.METHOD.hook(**point),
        5,
        _grid(strength=(1.0, 0.25, 4.0)),
        ("clean", "validation_robust"),
        ("clean",),
        "cure",
    ),
    # With equal classes it is cross-entropy.
    "vs": Part(
        "VS loss",
        _rebalanced,
        1,
        _grid(tau=(1.0, 0.5, 1.5)),
        ("tail", "validation_accuracy"),
        ("tail",),
        "saddle_longtail",
    ),
}
KINDS = {"quantizer": QUANTIZERS, "optimizer": OPTIMIZERS, "loss": LOSSES}


@dataclasses.dataclass(frozen=True)
class Combination:
    """A quantizer, an optimizer and a loss, by name."""

    quantizer: str = "lsq"
    optimizer: str = "sgd"
    loss: str = "none"

    def __str__(self) -> str:
        return f"{self.quantizer} + {self.optimizer} + {self.loss}"

    @property
    def parts(self) -> tuple[Part, Part, Part]:
        return QUANTIZERS[self.quantizer], OPTIMIZERS[self.optimizer], LOSSES[self.loss]

    @property
    def passes(self) -> int:
        """Forward-backward passes of a step: those of the optimizer, each with those of the loss."""
        quantizer, optimizer, loss = self.parts
        return quantizer.passes * optimizer.passes * loss.passes

    @property
    def changed(self) -> tuple[str, ...]:
        """Which of the three are not the baseline's."""
        return tuple(kind for kind in KINDS if getattr(self, kind) != getattr(BASELINE, kind))

    def alone(self) -> tuple[Combination, ...]:
        """The baseline with one of the changed parts each; none where fewer than two are changed."""
        if len(self.changed) < 2:
            return ()
        return tuple(dataclasses.replace(BASELINE, **{kind: getattr(self, kind)}) for kind in self.changed)

    def hook(self, point: Point, counts: Sequence[int]) -> Hook:
        """What the training loop calls."""
        quantizer, _, loss = self.parts
        return Joined(quantizer.make(), loss.make(own_values(loss, point), counts))

    def make(self, model: nn.Module, groups: list[dict[str, Any]], point: Point, steps: int) -> torch.optim.Optimizer:
        """The optimizer of a model's groups of parameters."""
        optimizer = self.parts[1]
        return optimizer.make(model, groups, own_values(optimizer, point), steps)

    def schedule(self, steps: int) -> Callable[[int], float]:
        """Factor of the rate by step: of Gadam its own, of the others a cosine."""
        averages = self.optimizer == "gadam"
        return averaging_schedule(averaging_start(steps)) if averages else cosine(steps, steps // 20)

    def evaluated(self, model: nn.Module, optimizer: torch.optim.Optimizer, data: Iterable[Tensor]) -> Inside:
        """Inside, the model is the one to evaluate: of Gadam the average, of the others the last."""
        return averaged(model, optimizer, data) if self.optimizer == "gadam" else contextlib.nullcontext()


#: What all others are compared with.
BASELINE = Combination()


def own_values(part: Part, point: Point) -> dict[str, float]:
    """The values of a point that a part reads."""
    return {name: value for name, value in point.items() if part.points and name in part.points[0]}

# SPDX-License-Identifier: Apache-2.0
"""One training of a combination, and what is measured of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fastflat import evaluate
from fastflat._spec import QuantSpec
from fastflat.evaluate.ptq import post_training_accuracy
from fastflat.methods import lab
from fastflat.methods.lab import robust
from fastflat.methods.lab.goals.parts import Combination
from fastflat.methods.lab.networks import ConvNet, ends
from fastflat.quant import calibrate, param_groups, prepare

#: Widths to which weights are rounded after the training.
ROUNDED = (8, 4, 3, 2)
SEVERITIES = (1, 3, 5)
#: Radii of the attack as shares of the range of a pixel; the second chooses.
RADII = (0.01, 0.02, 0.04)
#: Steps of the attack.
ATTACK = 10
#: The rate of scales beside that of weights.
_SCALES = 0.1


@dataclasses.dataclass(frozen=True)
class Condition:
    """What a network is trained for.

    Attributes:
        words: for a page.
        bits: of weights and activations of the inner layers.
        noise: share of wrong labels in training and validation images.
        tail: training images of the first class for one of the last.
        thorough: whether rounding, corruptions, attacks and curvature are measured, too.
    """

    words: str
    bits: int = 3
    noise: float = 0.0
    tail: float = 1.0
    thorough: bool = False


CONDITIONS = {
    "clean": Condition("3 bits", thorough=True),
    "noisy": Condition("3 bits, 40 % wrong labels", noise=0.4),
    "tail": Condition("3 bits, a long tail of 1 in 100", tail=100.0),
    "bits8": Condition("8 bits", bits=8),
    "bits4": Condition("4 bits", bits=4),
    "bits2": Condition("2 bits", bits=2),
}


@dataclasses.dataclass(frozen=True)
class Size:
    """How large all trainings are.

    Attributes:
        passes: forward-backward passes that a training may use.
        images, test_images: validation images are a fifth of the first.
        hard: images of the corruptions and attacks.
        batch: examples in a batch.
    """

    passes: int
    images: int
    test_images: int
    hard: int
    batch: int = 32


def trained(
    combination: Combination, condition: Condition, seed: int, point: Mapping[str, float], size: Size
) -> tuple[lab.Fit, lab.Split]:
    """The training, and the data that it was for."""
    parts = lab.images(size.images, size.test_images)
    if condition.noise:
        parts = lab.with_noisy_labels(parts, condition.noise, seed)
    if condition.tail > 1:
        parts = lab.long_tailed(parts, condition.tail)
    counts = torch.bincount(parts.train[1], minlength=parts.classes)
    steps = max(1, int(size.passes / combination.passes))

    def net() -> nn.Module:
        model = ConvNet(1, 28, parts.classes)
        weights = QuantSpec.lsq(bits=condition.bits, axis=0)
        activations = QuantSpec.lsq(bits=condition.bits, signed=False)
        model = prepare(model, weights=weights, activations=activations, skip=ends(model))
        return calibrate(model, [parts.train[0][:256]])

    def make(model: nn.Module) -> torch.optim.Optimizer:
        rate = point["lr"]
        groups = param_groups(model, lr=rate, scale_lr=_SCALES * rate, weight_decay=combination.parts[1].decay)
        return combination.make(model, groups, point, steps)

    done = lab.fit(
        net,
        make,
        parts.train,
        steps,
        seed,
        batch=size.batch,
        schedule=combination.schedule(steps),
        hook=combination.hook(point, counts.tolist()),
    )
    return done, parts


def measured(
    combination: Combination, condition: Condition, seed: int, point: Mapping[str, float], size: Size, part: str | None
) -> dict[str, float]:
    """Trains and measures on the ``"validation"`` or the ``"test"`` images, whose name begins the metrics; on none for
    the time of a step alone.

    ``seconds_per_step``; ``PART_accuracy``, the mean over classes in equal numbers; with a long tail
    ``PART_tail_accuracy``, of the rarest third of the classes. Of thorough conditions ``PART_rounded_BITS``,
    ``PART_corrupted_SEVERITY`` over all corruptions, ``PART_robust_PERCENT`` under PGD, the means ``PART_rounded`` and
    ``PART_corrupted``, ``PART_robust`` at the second radius, and ``top_eigenvalue`` on training images. Of validation
    images only what chooses.

    Raises:
        ArithmeticError: the training did not end in finite numbers.
    """
    done, parts = trained(combination, condition, seed, point, size)
    if part is None:
        return {"seconds_per_step": done.seconds_per_step}
    chosen = part == "validation"
    with combination.evaluated(done.model, done.optimizer, parts.batches("train", size.batch)):
        loss, accuracy = lab.loss_accuracy(done.model, parts.batches(part))
        if not math.isfinite(loss):
            raise ArithmeticError(f"methods: the {part} loss is {loss}")
        found = {"seconds_per_step": done.seconds_per_step, f"{part}_accuracy": accuracy}
        if condition.tail > 1:
            counts = torch.bincount(parts.train[1], minlength=parts.classes)
            groups = evaluate.evaluate(done.model, parts.batches(part), counts=counts, bounds=None).groups
            found[f"{part}_tail_accuracy"] = groups["tail"]
        if condition.thorough:
            found |= _thorough(done.model, parts, part, size.hard, chosen)
    return {name: float(value) for name, value in found.items()}


def _thorough(model: nn.Module, parts: lab.Split, part: str, hard: int, chosen: bool) -> dict[str, float]:
    found: dict[str, Any] = {"top_eigenvalue": lab.top_eigenvalue(model, parts.train, tol=0.05)}
    swept = post_training_accuracy(model, parts.batches(part), ROUNDED)
    found |= {f"{part}_rounded_{bits}": accuracy for bits, accuracy in swept.items()}
    found[f"{part}_rounded"] = sum(swept.values()) / len(swept)

    x, y = getattr(parts, part)
    few = dataclasses.replace(parts, **{part: (x[:hard], y[:hard])})
    lo, hi = robust.pixel_range(parts)
    # Images in [0, 1] are (x - lo) / (hi - lo), which corruptions take as a mean and a deviation.
    mean, std = torch.tensor([-lo / (hi - lo)]), torch.tensor([1 / (hi - lo)])
    severities = SEVERITIES[1:2] if chosen else SEVERITIES
    table = evaluate.corruption_accuracy(model, few.batches(part), severities=severities, mean=mean, std=std)
    for severity in severities:
        rows = [row[severity] for row in table.accuracy.values()]
        found[f"{part}_corrupted_{severity}"] = sum(rows) / len(rows)
    found[f"{part}_corrupted"] = table.mean

    for radius in RADII[1:2] if chosen else RADII:
        right = robust.robust_correct(model, few, part, radius, robust.pgd_attack(ATTACK))
        found[f"{part}_robust_{100 * radius:g}"] = right.double().mean()
    found[f"{part}_robust"] = found[f"{part}_robust_{100 * RADII[1]:g}"]
    return found

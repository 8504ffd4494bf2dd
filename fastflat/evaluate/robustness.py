# SPDX-License-Identifier: Apache-2.0
"""Accuracy on corrupted images, as a small table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastflat import _checks
from fastflat.evaluate import _runs
from fastflat.evaluate._outcomes import Outcomes, of_batch, together
from fastflat.evaluate.corruptions import CORRUPTIONS, applied, check_images, check_kind


@dataclasses.dataclass(frozen=True)
class CorruptionTable:
    """Accuracy, from 0 to 1, by corruption and severity.

    Attributes:
        examples: N.
        clean: accuracy on the images as they are.
        accuracy: of each corruption and severity.
    """

    examples: int
    clean: float
    accuracy: dict[str, dict[int, float]]

    @property
    def means(self) -> dict[str, float]:
        """Of each corruption, over its severities."""
        return {name: sum(row.values()) / len(row) for name, row in self.accuracy.items()}

    @property
    def mean(self) -> float:
        """Over all corruptions and severities."""
        return sum(self.means.values()) / len(self.means)

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts and numbers, for JSON."""
        accuracy = {name: {str(s): a for s, a in row.items()} for name, row in self.accuracy.items()}
        whole = {"examples": self.examples, "clean": self.clean, "mean": self.mean}
        return whole | {"means": self.means, "accuracy": accuracy}

    def __str__(self) -> str:
        severities = list(next(iter(self.accuracy.values())))
        lines = [f"{'accuracy in %':16}" + "".join(f"{s:7d}" for s in severities) + "   mean"]
        for name, row in self.accuracy.items():
            cells = "".join(f"{100 * a:7.1f}" for a in row.values())
            lines.append(f"{name:16}{cells}{100 * self.means[name]:7.1f}")
        return "\n".join([*lines, f"mean {100 * self.mean:.1f}, clean {100 * self.clean:.1f}, {self.examples} images"])


def corruption_accuracy(
    model: nn.Module,
    data: Iterable[tuple[Tensor, Tensor]],
    names: Sequence[str] | None = None,
    severities: Sequence[int] = (1, 2, 3, 4, 5),
    *,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    seed: int = 0,
) -> CorruptionTable:
    """Accuracy on corrupted images; data are gone through once.

    The model runs in evaluation mode without gradients and is left as it was. Each corruption and severity has a
    generator of its own on the CPU, of the same seed: a row does not depend on the others asked for, nor on the device.

    Args:
        model: returns logits ``[B, C]``.
        data: batches (images ``[B, C, H, W]``, labels ``[B]``).
        names: of :data:`CORRUPTIONS`; all by default.
        severities: from 1 to 5.
        mean, std: ``[C]``, where the images of the data are ``(image in [0, 1] - mean) / std``, as those of
            :class:`fastflat.data.Batches`; corrupted images are normalised again.
        seed: of the noise.

    Raises:
        TypeError, ValueError: an argument is not as above, there is no image, a label is no class, a logit is NaN.
    """
    op = "evaluate.corruption_accuracy"
    _runs.module(op, model)
    names = list(CORRUPTIONS) if names is None else [names] if isinstance(names, str) else list(names)
    severities = list(severities)
    for argument, found in (("names", names), ("severities", severities)):
        if not found:
            _checks.fail(op, argument, "name at least one", "none")
    kinds = [(name, severity) for name in dict.fromkeys(names) for severity in dict.fromkeys(severities)]
    for kind in kinds:
        check_kind(op, *kind)
    if (mean is None) != (std is None):
        _checks.fail(op, "mean and std", "come together", f"{'mean' if std is None else 'std'} alone")
    generators = {kind: torch.Generator().manual_seed(seed) for kind in kinds}
    parts: dict[Any, list[Outcomes]] = {kind: [] for kind in (None, *kinds)}
    with _runs.undisturbed(model, evaluating=True), torch.no_grad():
        for x, y in _runs.pairs(op, data):
            to_model, images = _normalisation(op, x, mean, std)
            check_images(op, images, "; pass the mean and std that they were normalised with")
            images = images.clamp(0, 1)
            parts[None].append(of_batch(op, model(x), y))
            for kind in kinds:
                corrupted = to_model(applied(images, *kind, generators[kind]))
                parts[kind].append(of_batch(op, model(corrupted.to(x.dtype)), y))
    accuracy = {kind: float(together(op, found).correct.double().mean()) for kind, found in parts.items()}
    table = {name: {s: accuracy[name, s] for n, s in kinds if n == name} for name, _ in kinds}
    return CorruptionTable(sum(len(part.labels) for part in parts[None]), accuracy[None], table)


def _normalisation(
    op: str, x: Any, mean: Tensor | None, std: Tensor | None
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """What normalises images, and the images of x before that."""
    if mean is None or not isinstance(x, Tensor) or x.dim() != 4:
        return (lambda images: images), x
    shape = (1, x.shape[1], 1, 1)
    for argument, t in (("mean", mean), ("std", std)):
        if not isinstance(t, Tensor) or t.numel() != x.shape[1]:
            got = list(t.shape) if isinstance(t, Tensor) else type(t)
            _checks.fail(op, argument, f"have one number for each of {x.shape[1]} channels", got)
    m, s = mean.to(x.device, torch.float32).view(shape), std.to(x.device, torch.float32).view(shape)
    return (lambda images: (images - m) / s), x.float() * s + m

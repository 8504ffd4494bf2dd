# SPDX-License-Identifier: Apache-2.0
"""What each example came to, in a few numbers: all that accuracy and calibration are computed from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from fastflat import _checks
from fastflat.evaluate import _runs


@dataclasses.dataclass(frozen=True, eq=False)
class Outcomes:
    """Of N examples, each attribute ``[N]``.

    Attributes:
        labels, predicted: classes, int64; of equal logits the first is predicted.
        rank: how many classes stand before the true one, int64; equal logits stand in the order of the classes.
        confidence: probability of the predicted class, float64; NaN where a logit is.
        nll: -log of the probability of the true class, float64.
        brier: sum over the classes of (probability - [class is true])^2, float64.
        classes: C.
    """

    labels: Tensor
    predicted: Tensor
    rank: Tensor
    confidence: Tensor
    nll: Tensor
    brier: Tensor
    classes: int

    @property
    def correct(self) -> Tensor:
        return self.predicted == self.labels


def of_batch(name: str, logits: Tensor, labels: Tensor) -> Outcomes:
    """Of logits ``[N, C]``, without a value being looked at: :func:`together` does that once for all."""
    logits, labels = _runs.logits_and_labels(name, logits, labels)
    classes = logits.shape[1]
    if not classes:
        _checks.fail(name, "logits", "have at least one class", list(logits.shape))
    z = logits.detach().double()
    inside = labels.clamp(0, classes - 1)[:, None]
    log_p = z.log_softmax(1)
    p = log_p.exp()
    own, own_p = z.gather(1, inside), p.gather(1, inside)
    before = torch.arange(classes, device=z.device) < inside
    rank = ((z > own) | ((z == own) & before)).sum(1)
    # argmax takes any of equal logits; the first is what ranks count with.
    predicted = (z == z.amax(1, keepdim=True)).int().argmax(1)
    brier = p.square().sum(1) - 2 * own_p[:, 0] + 1
    return Outcomes(labels, predicted, rank, p.amax(1), -log_p.gather(1, inside)[:, 0], brier, classes)


def together(name: str, parts: Sequence[Outcomes]) -> Outcomes:
    """All batches as one; NaN logits and labels that are no classes are refused."""
    classes = parts[0].classes
    for part in parts:
        if part.classes != classes:
            _checks.fail(name, "model", f"return {classes} classes for every batch", part.classes)
    fields = [f.name for f in dataclasses.fields(Outcomes) if f.name != "classes"]
    whole = Outcomes(*(torch.cat([getattr(part, f) for part in parts]) for f in fields), classes=classes)
    if not len(whole.labels):
        _checks.fail(name, "data", "hold at least one example", "none")
    low, high, nans = torch.stack([whole.labels.min(), whole.labels.max(), whole.confidence.isnan().sum()]).tolist()
    if low < 0 or high >= classes:
        _checks.fail(name, "labels", f"lie in 0 to {classes - 1}, the classes of the logits", f"{low} to {high}")
    if nans:
        _checks.fail(name, "logits", "be numbers", f"NaN for {nans} of {len(whole.labels)} examples")
    return whole


def outcomes(name: str, logits: Tensor, labels: Tensor) -> Outcomes:
    """Of all examples at once."""
    return together(name, [of_batch(name, logits, labels)])

# SPDX-License-Identifier: Apache-2.0
"""How often a network is right: among its first k, in each class, in frequent and rare classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastflat import _checks
from fastflat.evaluate import _runs
from fastflat.evaluate._outcomes import Outcomes, of_batch, outcomes, together
from fastflat.evaluate.calibration import reliability

#: More training examples than the first are many, fewer than the second are few (Liu et al., CVPR 2019, section 4).
MANY, FEW = 100, 20


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """What :func:`evaluate` found; shares are from 0 to 1.

    Attributes:
        examples: N.
        accuracy: share of examples whose class is predicted; of equal logits the first counts.
        top: the same by k, where the class is among the first k.
        loss: mean negative log likelihood, in nats.
        calibration: expected calibration error in bins of equal width.
        brier: Brier score.
        per_class: accuracy of each class, None for classes without an example.
        balanced: mean of ``per_class`` over the classes that have examples.
        groups: mean accuracy of the classes of the head, the medium and the tail, where counts were given.
        confusion: int64 ``[C, C]`` on the CPU: examples of class i predicted as j.
    """

    examples: int
    accuracy: float
    top: dict[int, float]
    loss: float
    calibration: float
    brier: float
    per_class: tuple[float | None, ...]
    balanced: float
    groups: dict[str, float | None] | None
    confusion: Tensor = dataclasses.field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        top = {str(k): v for k, v in self.top.items()}
        return found | {"top": top, "per_class": list(self.per_class), "confusion": self.confusion.tolist()}

    def __str__(self) -> str:
        top = "".join(f", top-{k} {v:.2%}" for k, v in self.top.items() if k > 1)
        groups = "".join(f", {k} {v:.2%}" for k, v in (self.groups or {}).items() if v is not None)
        rest = f"loss {self.loss:.4f}, calibration error {self.calibration:.2%}, Brier score {self.brier:.4f}"
        return f"{self.accuracy:.2%} of {self.examples} examples{top}, balanced {self.balanced:.2%}{groups}, {rest}"


def evaluate(
    model: nn.Module,
    data: Iterable[tuple[Any, Tensor]],
    *,
    top: Sequence[int] = (1,),
    counts: Sequence[int] | Tensor | None = None,
    bounds: tuple[int, int] | None = (MANY, FEW),
    bins: int = 15,
) -> Evaluation:
    """Accuracy and calibration of a classifier over all data.

    The model runs in evaluation mode without gradients; its modes, buffers, gradients and the random state are
    afterwards as before. A few numbers an example are kept, not its logits.

    Args:
        model: returns logits ``[B, C]``.
        data: batches (inputs, labels ``[B]``); a tuple or list of inputs is the model's arguments, a dict its keywords.
        top: values of k.
        counts, bounds: training examples of each class, and what makes groups of them: see :func:`group_accuracy`.
        bins: of the calibration error.

    Raises:
        TypeError, ValueError: an argument is not as above, there is no example, a label is no class, a logit is NaN.
    """
    name = "evaluate.evaluate"
    for k in top:
        _runs.positive_integer(name, "top", k)
    found = predicted(name, model, data)
    confusion = confusion_matrix(found.predicted, found.labels, found.classes)
    per_class = _shares(confusion)
    there = [share for share in per_class if share is not None]
    return Evaluation(
        examples=len(found.labels),
        accuracy=_mean(found.correct),
        top={k: _mean(found.rank < k) for k in top},
        loss=_mean(found.nll),
        calibration=reliability(found.confidence.clamp(0, 1), found.correct, bins=bins).error,
        brier=_mean(found.brier),
        per_class=per_class,
        balanced=sum(there) / len(there),
        groups=None if counts is None else group_accuracy(per_class, counts, bounds=bounds),
        confusion=confusion,
    )


def predicted(name: str, model: nn.Module, data: Iterable[tuple[Any, Tensor]]) -> Outcomes:
    """What became of each example of the data, in evaluation mode; the model is left as it was."""
    _runs.module(name, model)
    with _runs.undisturbed(model, evaluating=True), torch.no_grad():
        return together(name, [of_batch(name, _runs.called(model, x), y) for x, y in _runs.pairs(name, data)])


def topk_accuracy(logits: Tensor, labels: Tensor, k: int = 1) -> float:
    """Share of examples whose class is among the k largest logits ``[N, C]``; equal ones in the order of classes.

    Raises:
        TypeError, ValueError: logits or labels do not fit, a logit is NaN, a label is no class, k is below 1.
    """
    _runs.positive_integer("evaluate.topk_accuracy", "k", k)
    return _mean(outcomes("evaluate.topk_accuracy", logits, labels).rank < k)


def confusion_matrix(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """int64 ``[C, C]`` on the CPU: how many examples of class i (rows) were predicted as class j.

    Raises:
        TypeError, ValueError: the two are not integers ``[N]`` in 0 to C - 1.
    """
    name = "evaluate.confusion_matrix"
    _runs.positive_integer(name, "classes", classes)
    for argument, t in (("predicted", predicted), ("labels", labels)):
        if not isinstance(t, Tensor) or t.is_floating_point() or t.dim() != 1:
            _checks.fail(name, argument, "be integers [N]", type(t) if not isinstance(t, Tensor) else t.dtype)
        if t.shape != predicted.shape:
            _checks.fail(name, argument, f"have {len(predicted)} elements, as predicted", len(t))
        if len(t) and not 0 <= int(t.min()) <= int(t.max()) < classes:
            _checks.fail(name, argument, f"lie in 0 to {classes - 1}", f"{int(t.min())} to {int(t.max())}")
    pairs = labels.cpu().long() * classes + predicted.cpu().long()
    return torch.bincount(pairs, minlength=classes * classes).view(classes, classes)


def per_class_accuracy(logits: Tensor, labels: Tensor) -> tuple[float | None, ...]:
    """Accuracy within each class, None for classes without an example.

    Raises:
        TypeError, ValueError: logits or labels do not fit, a logit is NaN, a label is no class.
    """
    found = outcomes("evaluate.per_class_accuracy", logits, labels)
    return _shares(confusion_matrix(found.predicted, found.labels, found.classes))


def group_accuracy(
    per_class: Sequence[float | None],
    counts: Sequence[int] | Tensor,
    *,
    bounds: tuple[int, int] | None = (MANY, FEW),
) -> dict[str, float | None]:
    """Mean accuracy of frequent classes (``head``), rare ones (``tail``) and those between (``medium``).

    Args:
        per_class: accuracy of each class; None is left out of the means.
        counts: training examples of each class.
        bounds: (many, few): more than many are the head, fewer than few the tail. None takes a third of the classes
            each in the order of counts, the medium taking what three does not divide.

    Returns:
        ``{"head": ..., "medium": ..., "tail": ...}``, None for a group without classes.

    Raises:
        ValueError: counts do not fit the classes or are not positive, bounds are not in order.

    Source: Liu et al., CVPR 2019 (arXiv:1904.05160), for the default bounds.
    """
    name = "evaluate.group_accuracy"
    counts = counts.tolist() if isinstance(counts, Tensor) else list(counts)
    if len(counts) != len(per_class):
        _checks.fail(name, "counts", f"have one number for each of {len(per_class)} classes", len(counts))
    for c, n in enumerate(counts):
        if n <= 0:
            _checks.fail(name, "counts", "be positive", f"{n} for class {c}", "; leave out classes never trained on")
    if bounds is None:
        order = sorted(range(len(counts)), key=lambda c: (-counts[c], c))
        third = len(counts) // 3
        groups = {"head": order[:third], "medium": order[third : len(order) - third]}
        groups["tail"] = order[len(order) - third :]
    else:
        many, few = bounds
        if many < few:
            _checks.fail(name, "bounds", "be (many, few) with many >= few", f"({many}, {few})")
        groups = {
            "head": [c for c, n in enumerate(counts) if n > many],
            "medium": [c for c, n in enumerate(counts) if few <= n <= many],
            "tail": [c for c, n in enumerate(counts) if n < few],
        }
    found = {}
    for group, classes in groups.items():
        shares = [per_class[c] for c in classes if per_class[c] is not None]
        found[group] = sum(shares) / len(shares) if shares else None
    return found


def _shares(confusion: Tensor) -> tuple[float | None, ...]:
    rows = zip(confusion.diagonal().tolist(), confusion.sum(1).tolist(), strict=True)
    return tuple(right / n if n else None for right, n in rows)


def _mean(t: Tensor) -> float:
    """Of yes and no the share, the same number on every device."""
    return int(t.sum()) / t.numel() if t.dtype == torch.bool else float(t.double().mean())

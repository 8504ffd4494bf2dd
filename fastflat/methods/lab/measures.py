# SPDX-License-Identifier: Apache-2.0
"""What the experiments measure of a trained network."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastflat import curvature
from fastflat.evaluate import _runs
from fastflat.evaluate.ptq import post_training_accuracy
from fastflat.methods.lab.data import Split
from fastflat.methods.lab.training import Fit

#: Training examples of which the Hessian is taken.
_CURVATURE_EXAMPLES = 200


@torch.no_grad()
def loss_accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """(mean cross-entropy, accuracy) in evaluation mode."""
    with _runs.evaluating(model):
        pairs = [(model(x).float(), y) for x, y in batches]
    scores, y = torch.cat([s for s, _ in pairs]), torch.cat([y for _, y in pairs])
    return float(F.cross_entropy(scores, y)), float((scores.argmax(1) == y).double().mean())


def top_eigenvalue(model: nn.Module, data: tuple[Tensor, Tensor], tol: float = 0.02) -> float:
    """The largest eigenvalue of the Hessian of the mean cross-entropy on the first 200 examples, in evaluation mode."""
    x, y = data[0][:_CURVATURE_EXAMPLES], data[1][:_CURVATURE_EXAMPLES]
    with _runs.evaluating(model):
        return float(curvature.Hessian(model, F.cross_entropy, [(x, y)]).eigenvalues(1, tol=tol).value.max())


def measure(
    fit: Fit, parts: Split, *, bits: Iterable[int] = (), axis: int | None = 0, eigenvalue: bool = False
) -> dict[str, float]:
    """The metrics that most experiments report.

    ``seconds_per_step``; ``train_accuracy``, ``train_loss``, ``validation_accuracy``, ``validation_loss``,
    ``test_accuracy``, ``test_loss``; ``accuracy_BITS``, of the test part with weights rounded after training; where
    asked, ``top_eigenvalue`` of the Hessian on training examples.
    """
    found = {"seconds_per_step": fit.seconds_per_step}
    for part in ("train", "validation", "test"):
        found[f"{part}_loss"], found[f"{part}_accuracy"] = loss_accuracy(fit.model, parts.batches(part))
    swept = post_training_accuracy(fit.model, parts.batches("test"), bits, axis=axis)
    found |= {f"accuracy_{n}": value for n, value in swept.items()}
    if eigenvalue:
        found["top_eigenvalue"] = top_eigenvalue(fit.model, parts.train)
    return found

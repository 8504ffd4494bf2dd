# SPDX-License-Identifier: Apache-2.0
"""Whether a network is right as often as it says: calibration error, Brier score, negative log likelihood.

Logits are ``[N, C]``; logarithms of probabilities serve as well. Sums are taken in float64.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fastflat import _checks
from fastflat.evaluate import _runs
from fastflat.evaluate._outcomes import outcomes


@dataclasses.dataclass(frozen=True)
class Reliability:
    """Confidence against accuracy in bins of confidence; empty bins are left out.

    Attributes:
        kind: ``"width"`` or ``"mass"``.
        lower, upper: ends of each bin, the upper one included.
        count: examples in it.
        confidence, accuracy: their means.
    """

    kind: str
    lower: tuple[float, ...]
    upper: tuple[float, ...]
    count: tuple[int, ...]
    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]

    @property
    def error(self) -> float:
        """Expected calibration error, ``sum_b n_b/N |accuracy_b - confidence_b|``."""
        gaps = zip(self.count, self.accuracy, self.confidence, strict=True)
        return sum(n * abs(a - c) for n, a, c in gaps) / sum(self.count)

    @property
    def largest(self) -> float:
        """Maximum calibration error, the largest gap of a bin."""
        return max(abs(a - c) for a, c in zip(self.accuracy, self.confidence, strict=True))

    def decomposition(self) -> dict[str, float]:
        """``reliability - resolution + uncertainty`` is the mean of (confidence - correct)^2 where the confidences
        within a bin are equal; otherwise their spread is missing.

        Source: Murphy, Journal of Applied Meteorology 12, 1973, equation 3.
        """
        total = sum(self.count)
        rows = list(zip(self.count, self.accuracy, self.confidence, strict=True))
        base = sum(n * a for n, a, _ in rows) / total
        return {
            "reliability": sum(n * (c - a) ** 2 for n, a, c in rows) / total,
            "resolution": sum(n * (a - base) ** 2 for n, a, _ in rows) / total,
            "uncertainty": base * (1 - base),
        }

    def as_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON."""
        columns = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        return columns | {"error": self.error, "largest": self.largest}

    def __str__(self) -> str:
        columns = zip(self.lower, self.upper, self.count, self.confidence, self.accuracy, strict=True)
        rows = [f"{lo:7.3f} {hi:7.3f} {n:9d} {c:10.3f} {a:9.3f}" for lo, hi, n, c, a in columns]
        head = "  above   up to  examples confidence  accuracy"
        return "\n".join([head, *rows, f"expected calibration error {self.error:.4f}"])


def reliability(confidence: Tensor, correct: Tensor, *, bins: int = 15, kind: str = "width") -> Reliability:
    """The reliability table of confidences ``[N]`` in [0, 1] and whether each was correct, bool ``[N]``.

    Args:
        confidence, correct: as above; correct may be numbers in [0, 1], frequencies.
        bins: how many.
        kind: ``"width"``, bins ``(k/bins, (k+1)/bins]``, or ``"mass"``, as many examples in each as equal confidences
            allow, which share a bin.

    Raises:
        TypeError, ValueError: an argument is not as above, or there is no example.

    Sources: Guo et al., ICML 2017, equations 2 and 3 (width); Nguyen and O'Connor, EMNLP 2015 (mass).
    """
    name = "evaluate.reliability"
    _runs.positive_integer(name, "bins", bins)
    if kind not in ("width", "mass"):
        _checks.fail(name, "kind", "be 'width' or 'mass'", repr(kind))
    for argument, t in (("confidence", confidence), ("correct", correct)):
        if not isinstance(t, Tensor):
            _checks.fail(name, argument, "be a tensor", type(t))
        if t.dim() != 1 or not len(t) or t.shape != confidence.shape:
            _checks.fail(name, argument, "be [N], one number for each of at least one example", list(t.shape))
        if not bool(((t >= 0) & (t <= 1)).all()):
            _checks.fail(name, argument, "lie in 0 to 1", f"{float(t.min()):.4g} to {float(t.max()):.4g}")
    c, a = confidence.detach().double(), correct.detach().to(confidence.device).double()
    if kind == "width":
        edges = torch.arange(bins + 1, dtype=torch.float64, device=c.device) / bins
    else:
        ordered = c.sort().values
        ends = torch.arange(1, bins + 1, device=c.device) * len(c) // bins - 1
        edges = torch.cat([c.new_zeros(1), ordered[ends[ends >= 0]]])  # of equal ones the first takes all, others none
    at = torch.bucketize(c, edges).clamp(min=1) - 1
    sums = torch.zeros(3, len(edges) - 1, dtype=torch.float64, device=c.device)
    sums.index_add_(1, at, torch.stack([torch.ones_like(c), c, a]))
    kept = sums[0] > 0
    count, means = sums[0, kept], (sums[1:, kept] / sums[0, kept]).tolist()
    lower, upper = edges[:-1][kept].tolist(), edges[1:][kept].tolist()
    return Reliability(kind, tuple(lower), tuple(upper), tuple(map(int, count.tolist())), *map(tuple, means))


def calibration_error(logits: Tensor, labels: Tensor, *, bins: int = 15, kind: str = "width") -> float:
    """Expected calibration error of the predicted class: see :func:`reliability`.

    Raises:
        TypeError, ValueError: logits or labels do not fit, a logit is NaN, a label is no class.
    """
    found = outcomes("evaluate.calibration_error", logits, labels)
    return reliability(found.confidence.clamp(0, 1), found.correct, bins=bins, kind=kind).error


def brier_score(logits: Tensor, labels: Tensor) -> float:
    """``1/N sum_i sum_c (p_ic - [y_i = c])^2``, from 0 to 2. Source: Brier, Monthly Weather Review 78, 1950."""
    return float(outcomes("evaluate.brier_score", logits, labels).brier.mean())


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> float:
    """``-1/N sum_i log p_i,y_i`` in nats: the mean cross-entropy."""
    return float(outcomes("evaluate.negative_log_likelihood", logits, labels).nll.mean())

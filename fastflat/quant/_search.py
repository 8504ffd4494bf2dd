# SPDX-License-Identifier: Apache-2.0
"""The scale, and the zero-point of an affine grid, with the least mean squared quantization error."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastflat import _checks
from fastflat._spec import QuantSpec
from fastflat.functional import fake_quantize
from fastflat.quant._histogram import Histogram

#: Squared error of each scale's data on the grid of a scale and zero-point, all ``[scales]`` fp64.
Error = Callable[[Tensor, "Tensor | None"], Tensor]

#: Candidates for the clipped share of the range: from 1.19 down to 2**-10 of it.
_STEP = 2.0 ** (1 / 4)
_COARSE = tuple(_STEP**k for k in range(1, -41, -1))

#: Rounds that look between the neighbours of the best candidate, each four times finer than the one before: the last
#: one's neighbours are 0.02 % apart.
_ROUNDS = 5

#: Magnitudes whose squares fp32 holds with room to add them up.
_MODEST = (1e-15, 1e15)

#: Most and fewest bins on each side of zero that the error is summed over, and the most of all scales together.
_HALF, _LEAST, _BINS = 2**12, 2**9, 2**15


def affine(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """(scale, zero_point) of the grid that spans ``[low, high]`` and zero."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / (spec.qmax - spec.qmin)
    zero_point = spec.qmin - low / torch.where(scale > 0, scale, 1.0)
    if spec.zero != "float":
        zero_point = zero_point.round().clamp(spec.qmin, spec.qmax)
    return scale, zero_point


def least_error(low: Tensor, high: Tensor, spec: QuantSpec, error: Error) -> tuple[Tensor, Tensor | None]:
    """(scale, zero_point) with the least error found, for data with the extremes ``low`` and ``high`` ``[scales]``.

    A symmetric grid clips at ``f max|x|``, an affine one at ``[a low, b high]``. Factors are sought from 1.19 down to
    2**-10 by steps of 19 %, all scales at once, then five times between the neighbours of the best; a and b together
    first and then in turn. Of equal errors the first found counts. The error has many shallow minima in small data: the
    result is the best candidate and not a proof. Sums of errors are rounded, so that of candidates that are equal
    within rounding another backend may take another.
    """
    search = _Search(low, high, spec, error)
    both, one = ("low", "high"), (("low",), ("high",))
    search.over(both, _COARSE)
    if not spec.symmetric:
        for side in one:
            search.over(side, _COARSE, relative=False)
    step = _STEP
    for _ in range(_ROUNDS):
        finer = [step ** (k / 4) for k in (-3, -2, -1, 1, 2, 3)]
        for sides in [both] if spec.symmetric else one:
            search.over(sides, finer, relative=True)
        step = step ** (1 / 4)
    return search.grid(search.factors)


class _Search:
    """The best factors so far, one for each scale, and their errors."""

    def __init__(self, low: Tensor, high: Tensor, spec: QuantSpec, error: Error) -> None:
        self.low, self.high, self.spec, self.error = low, high, spec, error
        self.factors = {"low": torch.ones_like(low), "high": torch.ones_like(low)}
        self.least = torch.full_like(low, float("inf"))

    def grid(self, factors: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        if not self.spec.symmetric:
            return affine(factors["low"] * self.low, factors["high"] * self.high, self.spec)
        absmax = torch.maximum(self.low.abs(), self.high.abs())
        return factors["high"] * absmax / max(self.spec.qmax, 1), None

    def over(self, sides: tuple[str, ...], candidates: list[float] | tuple[float, ...], relative: bool = False) -> None:
        """Try the candidates for the factors of some sides, as they are or times the best so far."""
        start = dict(self.factors)
        for candidate in candidates:
            tried = dict(start)
            for side in sides:
                tried[side] = start[side] * candidate if relative else torch.full_like(self.low, candidate)
            error = self.error(*self.grid(tried))
            better = error < self.least
            self.least = torch.where(better, error, self.least)
            # The sides that are not tried stay at the start, which is their best.
            for side in sides:
                self.factors[side] = torch.where(better, tried[side], self.factors[side])


def error_on_data(x: Tensor, spec: QuantSpec, shape: tuple[int, ...], rows: Callable[[Tensor], Tensor]) -> Error:
    """The error of x itself under the very rule of the spec; ``rows`` puts the elements of each scale in a row."""
    extreme = float(x.abs().amax())
    modest = x.dtype != torch.float64 and (_MODEST[0] < extreme < _MODEST[1])
    x = x.float() if modest else x.double()
    form = {"estimator": "ste", "grad_scale": "none", "noise": "none", "scale_is": "s"}
    plain = spec.replace(**form, rounding="even" if spec.rounding == "stochastic" else spec.rounding)

    def error(scale: Tensor, zero_point: Tensor | None) -> Tensor:
        parameters = [None if p is None else p.to(x.dtype).reshape(shape) for p in (scale, zero_point)]
        y = fake_quantize(x, *parameters, spec=plain)
        return rows(y.sub_(x).square_()).sum(-1, dtype=torch.float64)

    return error


def error_on_histogram(histogram: Histogram, spec: QuantSpec) -> Error:
    """The error of data that are spread evenly inside each bin, integrated exactly.

    With ``n(t) = clamp(round(t/s + z), qmin, qmax) - z`` and the residual ``r = t - n s``, the squared residual has the
    antiderivative ``n s**3 / 12 + r**3 / 3``, clipped ends included. Data on an edge of a bin are off by one width at
    most.
    """
    if spec.format != "int":
        hint = "; use absmax or percentile for it"
        _checks.fail(
            "calibrate", "method", f"not be 'mse' for data in batches in the format {spec.format!r}", "'mse'", hint
        )
    share = _BINS // histogram.counts.shape[0]
    histogram = histogram.coarse(min(max(1 << (share.bit_length() - 1) if share else 0, _LEAST), _HALF))
    edges, density = histogram.edges(), histogram.counts / histogram.width.unsqueeze(1)

    def error(scale: Tensor, zero_point: Tensor | None) -> Tensor:
        s = scale.clamp(min=spec.eps).unsqueeze(1)
        z = 0.0 if zero_point is None else zero_point.unsqueeze(1)
        n = (edges / s + z).round_().clamp_(spec.qmin, spec.qmax) - z
        r = edges - n * s
        integral = n * (s**3 / 12) + r**3 / 3
        return (density * integral.diff(dim=1)).sum(1)

    return error

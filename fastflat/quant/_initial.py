# SPDX-License-Identifier: Apache-2.0
"""Scales from data: statistics that accumulate over batches, add up over ranks, and end in a scale and zero-point."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastflat import _checks
from fastflat._ops import scale_shape
from fastflat._spec import QuantSpec
from fastflat.quant import _search
from fastflat.quant._histogram import Histogram, exact_quantile

#: How a scale is found. For a symmetric grid: ``lsq`` 2 mean|x| / sqrt(qmax) (Esser et al., ICLR 2020, section 2.1),
#: ``absmax`` max|x| / qmax. For a grid with zero-point: ``minmax`` (max - min) / (qmax - qmin), zero on the grid.
#: ``moving`` is absmax or minmax with exponential averages over batches in place of extremes; ``percentile`` with the
#: q-th percentile of |x|, or the (100-q)-th and the q-th of x; ``mse`` makes the mean of (Q(x) - x)**2 least.
METHODS = ("lsq", "absmax", "minmax", "moving", "percentile", "mse")

#: Weight of the newest batch in ``moving`` averages.
MOMENTUM = 0.1

#: The percentile when none is named.
PERCENTILE = 99.99


def method_for(spec: QuantSpec, method: str | None, q: float | None = None) -> str:
    """The method asked for, or the usual one of the spec; refused if the spec or the percentile q does not fit it."""
    if method is None:
        method = "minmax" if not spec.symmetric else "lsq" if spec.estimator in ("lsq", "ewgs") else "absmax"
    fitting = ("lsq", "absmax") if spec.symmetric else ("minmax",)
    fitting += ("moving", "percentile", "mse")
    if method not in fitting:
        want = f"be one of {', '.join(fitting)} for spec.symmetric={spec.symmetric}"
        _checks.fail("calibrate", "method", want, repr(method))
    if q is not None:
        if method != "percentile":
            _checks.fail("calibrate", "q", "be None without method='percentile'", q)
        if isinstance(q, bool) or not isinstance(q, (int, float)) or not 50 < q <= 100:
            _checks.fail("calibrate", "q", "be a percentile above 50 and up to 100", repr(q))
    return method


def scale_from(
    x: Tensor, spec: QuantSpec, method: str | None, label: str, q: float | None = None
) -> tuple[Tensor, Tensor | None]:
    """(scale, zero_point) of one tensor, in fp64; exact percentiles and errors."""
    statistics = Statistics(spec, method_for(spec, method, q), q, streaming=False)
    statistics.update(x.detach())
    return statistics.result(label)


class Statistics:
    """Running statistics of the data of one quantizer, in fp64, one entry for each scale.

    Attributes:
        sums: ``[3, scales]``: elements, sum |x|, negative elements. Ranks add them up.
        low, high: extremes (averages of them with ``moving``). Ranks take extremes (averages).
        histogram: of the data, for ``percentile`` and ``mse`` of streaming data. Ranks add it up.
        data: the one tensor itself, for these methods without streaming.
    """

    def __init__(self, spec: QuantSpec, method: str, q: float | None = None, streaming: bool = True) -> None:
        self.spec = spec
        self.method = method
        self.share = (PERCENTILE if q is None else q) / 100
        self.keeps = method in ("percentile", "mse")
        self.streaming = streaming
        self.shape: tuple[int, ...] | None = None
        self.sums = self.low = self.high = None
        self.histogram: Histogram | None = None
        self.data: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Take in one batch; an empty one says nothing."""
        if x.numel() == 0:
            return
        rows = self._rows(x)
        low, high = rows.amin(-1).double(), rows.amax(-1).double()
        count = torch.full_like(low, rows.shape[-1])
        sums = torch.stack([count, rows.abs().sum(-1, dtype=torch.float64), (rows < 0).sum(-1).double()])
        if self.keeps and self.streaming:
            self._count(rows, torch.maximum(low.abs(), high.abs()))
        elif self.keeps:
            self.data = x
        if self.sums is None:
            self.sums, self.low, self.high = sums, low, high
            return
        self.sums += sums
        if self.method == "moving":
            self.low += MOMENTUM * (low - self.low)
            self.high += MOMENTUM * (high - self.high)
        else:
            self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)

    def _count(self, rows: Tensor, extreme: Tensor) -> None:
        if self.histogram is None:
            self.histogram = Histogram(rows.shape[0], rows.device)
        # What is not finite shows in the extremes and is refused by check_finite.
        if bool(torch.isfinite(extreme).all()):
            self.histogram.update(rows, extreme)

    def _rows(self, x: Tensor) -> Tensor:
        """x with the elements of each scale in a row."""
        _checks.data("calibrate", x, self.spec)
        axis = _checks.axis_of(self.spec, x.dim())
        shape = scale_shape(x.shape, axis, self.spec.group or 0)
        if self.shape not in (None, shape):
            raise ValueError(f"fastflat::calibrate: scale must keep its shape {list(self.shape)}, got {list(shape)}")
        self.shape = shape
        if self.spec.group:
            return x.reshape(-1, self.spec.group)
        return x.reshape(1, -1) if axis < 0 else x.movedim(axis, 0).reshape(shape[0], -1)

    @property
    def negative_share(self) -> float:
        """Share of the elements that are negative."""
        return float(self.sums[2].sum() / self.sums[0].sum())

    def check_finite(self, label: str) -> None:
        """Refuse NaN and inf among the data: a minimum over ranks may lose them."""
        if self.sums is not None and not bool((torch.isfinite(self.low) & torch.isfinite(self.high)).all()):
            raise ValueError(
                f"fastflat::{label}: scale must be finite and positive, got NaN or inf in the data; mend the data or"
                " skip the layer"
            )

    def result(self, label: str) -> tuple[Tensor, Tensor | None]:
        """(scale, zero_point) in the form of ``spec.scale_is``; zero_point is None for a symmetric spec.

        A scale whose data are all zero takes the largest one beside it: every positive value represents them.

        Raises:
            ValueError: no data came, they are all zero, or NaN or inf is among them.
        """
        if self.sums is None:
            raise ValueError(f"fastflat::{label}: data must reach the quantizer, got none; pass batches that use it")
        self.check_finite(label)
        spec, zero_point = self.spec, None
        top = max(spec.qmax, 1)
        absmax = torch.maximum(self.low.abs(), self.high.abs())
        if self.method == "mse":
            scale, zero_point = _search.least_error(self.low, self.high, spec, self._error())
        elif not spec.symmetric:
            scale, zero_point = _search.affine(*self._range(), spec)
        elif self.method == "lsq":
            scale = 2 * (self.sums[1] / self.sums[0]) / math.sqrt(top)
        else:
            scale = (self._magnitude(absmax) if self.method == "percentile" else absmax) / top
        scale = torch.where(absmax == 0, scale.max(), scale)
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            got = "data that are all zero; mend the data or skip the layer"
            if self.method == "percentile" and bool((absmax > 0).any()):
                got = f"a percentile (q={100 * self.share:g}) that is zero; raise q"
            raise ValueError(f"fastflat::{label}: scale must be finite and positive, got {got}")
        scale = _held(scale, spec).reshape(self.shape)
        return scale, None if zero_point is None else zero_point.reshape(self.shape)

    def _magnitude(self, absmax: Tensor) -> Tensor:
        """The percentile of |x|."""
        if self.data is not None:
            return exact_quantile(_floats(self._rows(self.data)).abs(), self.share)
        found = torch.minimum(self.histogram.quantile_of_magnitude(self.share), absmax)
        return absmax if self.share == 1 else found

    def _range(self) -> tuple[Tensor, Tensor]:
        """What an affine grid spans: the extremes, or the percentiles."""
        if self.method != "percentile" or self.share == 1:
            return self.low, self.high
        if self.data is not None:
            rows = _floats(self._rows(self.data))
            return exact_quantile(rows, 1 - self.share), exact_quantile(rows, self.share)
        low, high = self.histogram.quantile(1 - self.share), self.histogram.quantile(self.share)
        return torch.maximum(low, self.low), torch.minimum(high, self.high)

    def _error(self) -> _search.Error:
        if self.data is not None:
            return _search.error_on_data(self.data, self.spec, self.shape, self._rows)
        return _search.error_on_histogram(self.histogram, self.spec)


def _held(step: Tensor, spec: QuantSpec) -> Tensor:
    """The scale of the form ``spec.scale_is`` that stands for a step."""
    return step.log2() if spec.scale_is == "log2" else step * _steps_in(spec)


def _steps_in(spec: QuantSpec) -> float:
    """How many steps what the scale holds is long."""
    return {"s": 1, "absmax": max(spec.qmax, 1), "range": spec.qmax - spec.qmin}[spec.scale_is]


def spread(p: Tensor, x: Tensor, spec: QuantSpec) -> Tensor:
    """A parameter of the scales in a shape that broadcasts against x."""
    if spec.group is not None:
        return p.repeat_interleave(spec.group, dim=-1)
    if spec.axis is None:
        return p
    return p.view([-1 if axis == spec.axis % x.dim() else 1 for axis in range(x.dim())])


def _floats(rows: Tensor) -> Tensor:
    """16-bit rows in fp32; others as they are."""
    return rows if rows.element_size() >= 4 else rows.float()

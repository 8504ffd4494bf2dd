# SPDX-License-Identifier: Apache-2.0
"""Scales from data: statistics that accumulate over batches, add up over ranks, and end in a scale and zero-point."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastflat import _checks
from fastflat._ops import scale_shape
from fastflat._spec import QuantSpec

#: How a scale is found. For a symmetric grid: ``lsq`` 2 mean|x| / sqrt(qmax) (Esser et al., ICLR 2020, section 2.1),
#: ``absmax`` max|x| / qmax. For a grid with zero-point: ``minmax`` (max - min) / (qmax - qmin), zero on the grid.
#: ``moving`` is absmax or minmax with exponential averages over batches in place of extremes.
METHODS = ("lsq", "absmax", "minmax", "moving")

#: Weight of the newest batch in ``moving`` averages.
MOMENTUM = 0.1


def method_for(spec: QuantSpec, method: str | None) -> str:
    """The method asked for, or the usual one of the spec; refused if the spec cannot take it."""
    if method is None:
        return "minmax" if not spec.symmetric else "lsq" if spec.estimator == "lsq" else "absmax"
    fitting = ("lsq", "absmax", "moving") if spec.symmetric else ("minmax", "moving")
    if method not in fitting:
        want = f"be one of {', '.join(fitting)} for spec.symmetric={spec.symmetric}"
        _checks.fail("calibrate", "method", want, repr(method))
    return method


def scale_from(x: Tensor, spec: QuantSpec, method: str | None, label: str) -> tuple[Tensor, Tensor | None]:
    """(scale, zero_point) of one tensor, in fp64."""
    statistics = Statistics(spec, method_for(spec, method))
    statistics.update(x.detach())
    return statistics.result(label)


class Statistics:
    """Running statistics of the data of one quantizer, in fp64, one entry for each scale.

    Attributes:
        sums: ``[3, scales]``: elements, sum |x|, negative elements. Ranks add them up.
        low, high: extremes (averages of them with ``moving``). Ranks take extremes (averages).
    """

    def __init__(self, spec: QuantSpec, method: str) -> None:
        self.spec = spec
        self.method = method
        self.shape: tuple[int, ...] | None = None
        self.sums = self.low = self.high = None

    def update(self, x: Tensor) -> None:
        """Take in one batch; an empty one says nothing."""
        if x.numel() == 0:
            return
        rows = self._rows(x)
        low, high = rows.amin(-1).double(), rows.amax(-1).double()
        count = torch.full_like(low, rows.shape[-1])
        sums = torch.stack([count, rows.abs().sum(-1, dtype=torch.float64), (rows < 0).sum(-1).double()])
        if self.sums is None:
            self.sums, self.low, self.high = sums, low, high
            return
        self.sums += sums
        if self.method == "moving":
            self.low += MOMENTUM * (low - self.low)
            self.high += MOMENTUM * (high - self.high)
        else:
            self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)

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
        """(scale, zero_point); zero_point is None for a symmetric spec.

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
        if not spec.symmetric:
            low, high = self.low.clamp(max=0), self.high.clamp(min=0)
            scale = (high - low) / (spec.qmax - spec.qmin)
            zero_point = spec.qmin - low / torch.where(scale > 0, scale, 1.0)
            if spec.zero != "float":
                zero_point = zero_point.round().clamp(spec.qmin, spec.qmax)
            zero_point = zero_point.reshape(self.shape)
        elif self.method == "lsq":
            scale = 2 * (self.sums[1] / self.sums[0]) / math.sqrt(top)
        else:
            scale = absmax / top
        scale = torch.where(absmax == 0, scale.max(), scale)
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise ValueError(
                f"fastflat::{label}: scale must be finite and positive, got data that are all zero; mend the data or"
                " skip the layer"
            )
        return scale.reshape(self.shape), zero_point

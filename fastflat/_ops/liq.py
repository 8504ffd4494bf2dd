# SPDX-License-Identifier: Apache-2.0
"""Rows of the liq family: the quantizer that normalises weights first."""

from __future__ import annotations

import torch

from fastflat._ops._row import Op, compute_dtype, like, out_size, scale_shape, size_of


def _fake_liq_moments(w, axis):
    shape, compute = scale_shape(w.shape, axis, 0), compute_dtype(w.dtype)
    return w.new_empty(shape, dtype=compute), w.new_empty(shape, dtype=compute)


def _fake_liq(w, mean, std, clip, levels, axis, eps, dtype=None):
    return like(w, 0, dtype)


def _fake_liq_bwd(gy, w, mean, std, clip, levels, axis, eps):
    return like(w), torch.empty_like(clip)


def _fake_liq_jvp(tw, tclip, w, mean, std, clip, levels, axis, eps, dtype=None):
    return like(w, 0, dtype)


def _moments_bytes(w: torch.Tensor, axis: int) -> int:
    return size_of(w) + 2 * torch.Size(scale_shape(w.shape, axis, 0)).numel() * compute_dtype(w.dtype).itemsize


_POINT = "Tensor w, Tensor mean, Tensor std, Tensor clip, int levels, int axis, float eps"

ROWS = (
    Op(
        "liq_moments",
        "liq",
        "(Tensor w, int axis) -> (Tensor mean, Tensor std)",
        _fake_liq_moments,
        _moments_bytes,
        """Mean and unbiased standard deviation of a tensor (axis -1) or of each channel, in the compute type::

            mean = sum w / n          std = sqrt(sum (w - mean)^2 / (n - 1))

        In two passes with fp64 sums about the fp64 mean, so that a large mean costs no digits; their order depends on
        shape and dtype only. Backends agree to one unit in the last place (fp64: 1e-13 of the largest magnitude).
        std of one element is 0; moments of no element are 0.""",
    ),
    Op(
        "liq",
        "liq",
        f"({_POINT}, ScalarType? dtype=None) -> Tensor",
        _fake_liq,
        lambda w, mean, std, clip, levels, axis, eps, dtype=None: size_of(w, mean, std, clip) + out_size(w, dtype),
        """A normalised weight on ``levels + 1`` values between -clip and clip::

            u = ((w - mean) / max(std, eps)) / c          c = max(clip, eps)
            q = 2 round((clamp(u, -1, 1) + 1) / 2 * levels) / levels - 1
            y = c q

        Ties to even; NaN stays. mean and std ``[]`` or ``[C]`` and clip ``[]`` are in the compute type. A map: the
        same bits on every backend.""",
    ),
    Op(
        "liq_bwd",
        "liq",
        f"(Tensor gy, {_POINT}) -> (Tensor gw, Tensor gclip)",
        _fake_liq_bwd,
        lambda gy, w, mean, std, clip, *rest: size_of(gy, w, w, mean, std, clip, clip),
        """One pass for both gradients, mean and std constant, the mask ``m = 1{|u| <= 1}`` and q - u frozen::

            gw    = m gy / max(std, eps)          the same bits on every backend
            gclip = sum gy (q - m u)              an order that depends on shape and dtype only""",
    ),
    Op(
        "liq_jvp",
        "liq",
        f"(Tensor? tw, Tensor? tclip, {_POINT}, ScalarType? dtype=None) -> Tensor",
        _fake_liq_jvp,
        lambda tw, tclip, w, mean, std, clip, levels, axis, eps, dtype=None: (
            size_of(tw, tclip, w, mean, std, clip) + out_size(w, dtype)
        ),
        """The tangent of y, the exact transpose of ``liq_bwd``: ``ty = m tw / max(std, eps) + (q - m u) tclip``.
        Absent tangents count as 0; tw is in the dtype of w. A map: the same bits on every backend.""",
    ),
)

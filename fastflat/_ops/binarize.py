# SPDX-License-Identifier: Apache-2.0
"""Rows of the binarize family."""

from __future__ import annotations

import torch

from fastflat._ops._row import Op, compute_dtype, like, out_size, scale_shape, size_of


def _scale(x, axis, group):
    return x.new_empty(scale_shape(x.shape, axis, group), dtype=compute_dtype(x.dtype))


def _fake_binarize(x, h, axis, group, dtype=None):
    return like(x, group, dtype), _scale(x, axis, group)


def _fake_binarize_bwd(gy, ga, x, h, alpha, clip, through_alpha, axis, group):
    return like(x, group)


def _fake_binarize_jvp(tx, x, h, alpha, clip, through_alpha, axis, group, dtype=None):
    return like(x, group, dtype), torch.empty_like(alpha, memory_format=torch.contiguous_format)


def _alpha_size(x: torch.Tensor, axis: int, group: int) -> int:
    return torch.Size(scale_shape(x.shape, axis, group)).numel() * compute_dtype(x.dtype).itemsize


def _bwd_bytes(gy, ga, x, h, alpha, clip, through_alpha, axis, group) -> int:
    passes = 1 + int(through_alpha)
    weighed = h if through_alpha or ga is not None else None
    return passes * size_of(gy, x) + (1 + int(weighed is not None)) * size_of(weighed) + size_of(ga, alpha, x)


_RULE = "float clip, bool through_alpha, int axis, int group"

ROWS = (
    Op(
        "binarize",
        "binarize",
        "(Tensor x, Tensor? h, int axis, int group, ScalarType? dtype=None) -> (Tensor y, Tensor alpha)",
        _fake_binarize,
        lambda x, h, axis, group, dtype=None: (
            2 * size_of(x) + size_of(h) + out_size(x, dtype) + _alpha_size(x, axis, group)
        ),
        """One bit an element and one scale a channel or group::

            alpha = sum h|x| / sum h            over the elements of a scale; 0 where sum h is 0, or nothing is there
            y     = alpha sign(x)               sign(+-0) = +1; NaN stays

        h is in the compute type and has the axes of x, each of the size that x has or of size 1; absent, it counts
        as 1. alpha, in the compute type, is a quotient of sums whose order depends on shape and dtype only: backends
        agree on it to 4e-6 of its value (fp64: 1e-14) where h >= 0. y follows from alpha bit for bit.""",
    ),
    Op(
        "binarize_bwd",
        "binarize",
        f"(Tensor gy, Tensor? ga, Tensor x, Tensor? h, Tensor alpha, {_RULE}) -> Tensor",
        _fake_binarize_bwd,
        _bwd_bytes,
        """The gradient of x, straight through the sign and exact through the scale::

            gx = gy alpha 1{|x| <= clip} + k h sign(x)
            k  = ([through_alpha] sum(gy sign(x)) + ga) / sum h          0 where sum h is 0

        ga is the cotangent of alpha. Without both terms of k this is a map, with the same bits on every backend; sums
        run in an order that depends on shape and dtype only.""",
    ),
    Op(
        "binarize_jvp",
        "binarize",
        f"(Tensor tx, Tensor x, Tensor? h, Tensor alpha, {_RULE}, ScalarType? dtype=None) -> (Tensor ty, Tensor ta)",
        _fake_binarize_jvp,
        lambda tx, x, h, alpha, clip, through, axis, group, dtype=None: (
            (1 + int(through)) * size_of(tx, x) + size_of(h) + 2 * size_of(alpha) + out_size(x, dtype)
        ),
        """The tangents of y and alpha, the exact transpose of ``binarize_bwd``; tx is in the dtype of x::

            ta = sum(h sign(x) tx) / sum h          0 where sum h is 0
            ty = tx alpha 1{|x| <= clip} + [through_alpha] ta sign(x)""",
    ),
)

# SPDX-License-Identifier: Apache-2.0
"""Rows of the fake_quantize_list family: fake_quantize of many tensors in one call."""

from __future__ import annotations

import torch

from fastflat._ops._row import Op, like, out_size, size_of


def _fake_fake_quantize_list(xs, scales, zero_points, qmin, qmax, axis, group, eps, rules, dtype=None):
    return [like(x, g, dtype) for x, g in zip(xs, group, strict=True)]


def _fake_fake_quantize_list_bwd(
    gys, xs, scales, zero_points, qmin, qmax, axis, group, eps, rules, factor, need_scale
):  # fmt: skip
    gxs = [like(x, g) for x, g in zip(xs, group, strict=True)]
    need_zero = [need and i < len(zero_points) and zero_points[i] is not None for i, need in enumerate(need_scale)]
    return gxs, _gradients(scales, need_scale), _gradients(scales, need_zero)


def _gradients(scales, needed):
    if not any(needed):
        return []
    layout = torch.contiguous_format
    return [
        torch.empty_like(s, memory_format=layout) if need else s.new_empty(0)
        for s, need in zip(scales, needed, strict=True)
    ]


_LISTS = "Tensor[] xs, Tensor[] scales, Tensor?[] zero_points"
_GRIDS = "int[] qmin, int[] qmax, int[] axis, int[] group, float[] eps, int[] rules"

ROWS = (
    Op(
        "fake_quantize_list",
        "fake_quantize_list",
        f"({_LISTS}, {_GRIDS}, ScalarType? dtype=None) -> Tensor[]",
        _fake_fake_quantize_list,
        lambda xs, scales, zero_points, *grids, dtype=None: (
            size_of(*xs, *scales, *zero_points) + sum(out_size(x, dtype) for x in xs)
        ),
        """``ys[i] = fake_quantize(xs[i], scales[i], zero_points[i], qmin[i], ..., dtype)`` in one call, bit for bit.
        All lists are as long as xs, but for ``zero_points``, which is empty where no tensor has one; all tensors are
        on one device. Types, axes and groups may differ from tensor to tensor.""",
    ),
    Op(
        "fake_quantize_list_bwd",
        "fake_quantize_list",
        f"(Tensor[] gys, {_LISTS}, {_GRIDS}, float[] factor, int[] need_scale)"
        " -> (Tensor[] gxs, Tensor[] gss, Tensor[] gzs)",
        _fake_fake_quantize_list_bwd,
        lambda gys, xs, scales, zero_points, *grids: size_of(*gys, *xs, *xs, *scales, *zero_points),
        """The gradients of ``fake_quantize_bwd`` for each tensor in one call: gxs with the same bits on every backend,
        gss and gzs in each backend's own order of summation, which is that of the tensor alone. gss is an empty list
        where no tensor has ``need_scale``, gzs where none of those has a zero-point; in a list that is not empty,
        tensors without the gradient have ``[0]``.""",
    ),
)

# SPDX-License-Identifier: Apache-2.0
"""Rows of the sharpness family: norms and the ascent of sharpness-aware minimisation over a list of tensors.

The compiled CPU kernels of this family and of descent take in place of each list an int64 table ``[3, T]`` as well, a
list of that one tensor: addresses, numbers of elements, storage types (csrc/core/pairs.h). All lists of a call are
tables then. Nobody can check an address: fastflat.optim makes them, for many small parameters.
"""

from __future__ import annotations

import torch

from fastflat._ops._row import Op, size_of

#: What ``sharpness_sums`` adds up for a tensor, and the metric of an ascent; csrc/math/sharpness.h has them too.
SUM_GRADIENT, SUM_PAIR, SUM_SCALED = 0, 1, 2
METRICS = {"l2": 0, "scaled": 1, "linf": 2}
#: Bytes of which every tensor in a backup begins at a multiple.
ALIGNMENT = 64


def _fake_sums(gs, others, kind, eta):
    return gs[0].new_empty((len(gs), 3), dtype=torch.float64)


def _fake_scale(sums, rho, eps, linf):
    return rho.new_empty(rho.numel() + 2)


def _fake_ascent(ws, gs, outs, backup, at, scale, metric, eta, state=None):
    return None


def _bytes_of_sums(gs, others, kind, eta):
    kinds = kind * len(gs) if len(kind) == 1 else kind
    read = [o for o, k in zip(others, kinds, strict=True) if k != SUM_GRADIENT] if others else []
    return size_of(*gs, *read)


ROWS = (
    Op(
        "sharpness_sums",
        "sharpness",
        "(Tensor[] gs, Tensor[] others, int[] kind, float eta) -> Tensor",
        _fake_sums,
        _bytes_of_sums,
        """Three fp64 numbers a tensor, ``[T, 3]``, of its elements g and those o of its partner: ``kind`` 0
        ``{g g, 0, 0}`` (the partner is not read; ``others`` may be empty), 1 ``{g g, g o, o o}``, 2
        ``{(t g)^2, 0, 0}`` with ``t = |o| + eta``; one for all, or one a tensor. Sums are formed in fp64 (of kind 0
        with short runs of fp32 below them where nothing is lost), in an order that depends on shape and dtype alone: no
        norm of fp32 numbers overflows, and a sum is finite exactly where all its terms are. Backends agree to a
        relative 1e-12, those of kind 0 to 1e-6.""",
    ),
    Op(
        "sharpness_scale",
        "sharpness",
        "(Tensor sums, Tensor rho, float eps, bool linf) -> Tensor",
        _fake_scale,
        lambda sums, rho, eps, linf: size_of(sums, rho) + 8 * (rho.numel() + 2),
        """``[rho[0]/(norm + eps), ..., norm, flag]`` in fp64, ``norm`` the root of the first column of ``sums`` ``[T,
        3]`` added up and ``flag`` 1 where that is not finite, else 0. A norm that is 0 or not finite gives scales of 0;
        ``linf`` gives rho itself wherever the norm is finite. ``rho`` is fp64 ``[R]``, one a tensor of the ascent.""",
    ),
    Op(
        "sharpness_ascent_",
        "sharpness",
        "(Tensor(a!)[] ws, Tensor[] gs, Tensor(b!)[] outs, Tensor(c!)? backup, int[] at, Tensor scale, int[] metric,"
        " float eta, Tensor? state=None) -> ()",
        _fake_ascent,
        lambda ws, gs, outs, backup, at, scale, metric, eta, state=None: (
            size_of(*ws, *gs, *outs) + (0 if outs else size_of(*ws)) + (0 if backup is None else size_of(*ws))
        ),
        """Adds ``e = s T(w)`` to each tensor, ``s = scale[t]`` rounded to the compute type, in the order written:
        ``metric`` 0 ``s g``, 1 ``s ((t t) g)`` with ``t = |w| + eta``, 2 ``s sign(g)``; one for all, or one a tensor. A
        scale of 0 leaves w, whatever g is. With ``outs`` (dtype of w, or 16 bits for fp32 w) the sum goes there and w
        stays; else it replaces w, and a ``backup`` keeps the bytes of w before, in storage order: uint8, those of
        tensor t from ``at[t]`` on, a multiple of 64; ``at`` is empty without a backup. Results are rounded to nearest
        even, or with a ``state`` (int64 ``[seed, offset]``) bfloat16 stochastically: up where ``u < frac``, u the
        uniform draw of the element, elements numbered in storage order through the list, each tensor from a multiple of
        eight on. ws, gs and outs of a tensor have one shape; outs have the strides of ws.""",
    ),
)

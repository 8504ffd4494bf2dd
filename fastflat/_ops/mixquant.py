# SPDX-License-Identifier: Apache-2.0
"""Rows of the mixquant family: several quantizers of one tensor, mixed in one pass."""

from __future__ import annotations

import torch

from fastflat._ops._row import Op, like, out_size, size_of


def _fake_mixquant(x, scale, qmin, qmax, weight, axis, group, eps, rules, dtype=None):
    return like(x, group, dtype)


def _fake_mixquant_bwd(gy, x, scale, qmin, qmax, weight, factor, axis, group, eps, rules):
    gs = torch.empty_like(scale, memory_format=torch.contiguous_format)
    return like(x, group), gs, torch.empty_like(weight, memory_format=torch.contiguous_format)


def _fake_mixquant_jvp(tx, ts, tw, x, scale, qmin, qmax, weight, factor, axis, group, eps, rules, dtype=None):
    return like(x, group, dtype)


_CANDIDATES = "Tensor scale, Tensor qmin, Tensor qmax, Tensor weight"
_GRID = "int axis, int group, float eps, int rules"

ROWS = (
    Op(
        "mixquant",
        "mixquant",
        f"(Tensor x, {_CANDIDATES}, {_GRID}, ScalarType? dtype=None) -> Tensor",
        _fake_mixquant,
        lambda x, scale, qmin, qmax, weight, *grid, dtype=None: (
            size_of(x, scale, qmin, qmax, weight) + out_size(x, dtype)
        ),
        """``y = sum_j weight[j] Q_j(x)`` with ``Q_j`` the :func:`fake_quantize` of ``scale[j]`` on the grid
        ``[qmin[j], qmax[j]]`` without zero-point; ties to even. ``scale`` is ``[n, *scale_shape]``, the others
        ``[n]``, n from 1 to 8, all in the compute type and on the device of x: nothing about a candidate is read by
        the host. Terms are added in the order of j; one of weight 0 is left out, so that a one-hot weight gives
        fake_quantize in every bit, whatever the other scales hold. A map: the same bits on every backend.""",
    ),
    Op(
        "mixquant_bwd",
        "mixquant",
        f"(Tensor gy, Tensor x, {_CANDIDATES}, Tensor factor, {_GRID}) -> (Tensor gx, Tensor gs, Tensor gw)",
        _fake_mixquant_bwd,
        lambda gy, x, scale, qmin, qmax, weight, factor, *grid: size_of(
            gy, x, x, scale, scale, qmin, qmax, weight, weight, factor
        ),
        """One pass for all gradients, with the masks m_j and the residuals frozen::

            gx    = gy sum_j weight[j] m_j                            x's dtype, the same bits on every backend;
                                                                      +0 where the sum is 0
            gs[j] = factor[j] weight[j] sum(gy (d_j - m_j u_j))       over the elements of a scale, compute type;
                                                                      0 where weight[j] is
            gw[j] = sum(gy Q_j(x))                                    over all elements, compute type

        Sums run in an order that depends on shape and dtype only.""",
    ),
    Op(
        "mixquant_jvp",
        "mixquant",
        f"(Tensor? tx, Tensor? ts, Tensor? tw, Tensor x, {_CANDIDATES}, Tensor factor, {_GRID},"
        " ScalarType? dtype=None) -> Tensor",
        _fake_mixquant_jvp,
        lambda tx, ts, tw, x, scale, qmin, qmax, weight, factor, *grid, dtype=None: (
            size_of(tx, ts, tw, x, scale, qmin, qmax, weight, factor) + out_size(x, dtype)
        ),
        """The tangent of y, the exact transpose of ``mixquant_bwd``::

            ty = tx sum_j weight[j] m_j + sum_j ((d_j - m_j u_j) (ts[j] (weight[j] factor[j])) + Q_j(x) tw[j])

        Absent tangents count as 0; terms whose factor is 0 are left out. ``tx`` is in the storage type of x or of
        the result. A map: the same bits on every backend.""",
    ),
)

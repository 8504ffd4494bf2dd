# SPDX-License-Identifier: Apache-2.0
"""Rows of the bitplane family."""

from __future__ import annotations

import torch

from fastflat._ops._row import Op, size_of

#: Most bit planes of a weight.
MOST_PLANES = 16


def _fake_bitplane(p, q, m, scale, beta, hard_w, hard_m, dtype=None):
    return p.new_empty(p.shape[1:], dtype=dtype)


def _fake_bitplane_bwd(gw, p, q, m, scale, beta, hard_w, hard_m):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (p, p, m, scale))


def _fake_bitplane_jvp(tp, tq, tm, ts, p, q, m, scale, beta, hard_w, hard_m, dtype=None):
    return p.new_empty(p.shape[1:], dtype=dtype)


def _out_size(p: torch.Tensor, dtype: torch.dtype | None) -> int:
    return p[0].numel() * (dtype or p.dtype).itemsize


_PLANES = "Tensor p, Tensor q, Tensor m, Tensor scale, Tensor beta, bool hard_w, bool hard_m"

ROWS = (
    Op(
        "bitplane",
        "bitplane",
        f"({_PLANES}, ScalarType? dtype=None) -> Tensor",
        _fake_bitplane,
        lambda p, q, m, scale, beta, *rest, dtype=None: size_of(p, q, m, scale, beta) + _out_size(p, dtype),
        """A weight from N bit planes, p and q ``[N, ...]`` in one storage type, m ``[N]``, scale and beta ``[]`` in
        the compute type::

            w = step sum_b 2^(N-1-b) M_b (bit(p_b) - bit(q_b))        step = scale / (2^N - 1),  b = 0 ... N-1
            bit(t) = sigmoid(beta t), with hard_w 1{t > 0}            M_b = sigmoid(beta m_b), with hard_m 1{m_b > 0}

        w is contiguous, ``[...]``. 0 is no hard bit; NaN stays NaN. A map: the same bits on every backend.""",
    ),
    Op(
        "bitplane_bwd",
        "bitplane",
        f"(Tensor gw, {_PLANES}) -> (Tensor gp, Tensor gq, Tensor gm, Tensor gs)",
        _fake_bitplane_bwd,
        lambda gw, p, q, m, scale, beta, *hard: size_of(gw, p, q, p, q, m, m, scale, scale, beta),
        """One pass for all gradients, contiguous::

            gp_b = step 2^(N-1-b) M_b beta bit'(beta p_b) gw          gq_b the same with q and the other sign
            gm_b = step 2^(N-1-b) beta M_b (1 - M_b) D_b              D_b = sum(gw (bit(p_b) - bit(q_b)))
            gs   = sum_b 2^(N-1-b) M_b D_b / (2^N - 1)

        With hard_w gp and gq are 0, with hard_m gm is. gp and gq are maps, with the same bits on every backend; sums
        run in an order that depends on shape and dtype only.""",
    ),
    Op(
        "bitplane_jvp",
        "bitplane",
        f"(Tensor? tp, Tensor? tq, Tensor? tm, Tensor? ts, {_PLANES}, ScalarType? dtype=None) -> Tensor",
        _fake_bitplane_jvp,
        lambda tp, tq, tm, ts, p, q, m, scale, beta, *rest, dtype=None: (
            size_of(tp, tq, tm, ts, p, q, m, scale, beta) + _out_size(p, dtype)
        ),
        """The tangent of w, the exact transpose of ``bitplane_bwd``; absent tangents count as 0. tp and tq are in the
        storage type of p. A map: the same bits on every backend.""",
    ),
)

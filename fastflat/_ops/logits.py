# SPDX-License-Identifier: Apache-2.0
"""Rows of the logits family: losses and statistics over rows of C logits, each row read from memory once.

Logits are contiguous, fp32, bf16, fp16 or fp64; everything of a row or a class is in the compute dtype (fp32; fp64 for
fp64 logits), labels are int64. ``norm`` holds two numbers a row, its largest logit m and ``L = log sum exp(z - m)``, so
that ``log p = (z - m) - L`` neither overflows nor loses digits to a common shift of the logits. exp and log are those
of csrc/math/elementary.h. Sums over a row have an order that its length and dtype fix; results agree across backends to
1e-5 (fp64: 1e-13) of the sum of the magnitudes of their terms. Given `norm` and the divergences, gradients of
`logits_divergence` to z and of `logits_loss` are maps: the same bits everywhere.

A logit of -inf is a class that cannot be: p = 0, and it adds nothing. A row of nothing else, one with +inf or NaN, and
a label outside of [0, C) that is not `ignore_index`, give NaN.
"""

from __future__ import annotations

import torch

from fastflat._ops._row import Op, compute_dtype, size_of


def _rows_of(z: torch.Tensor, *shape: int) -> torch.Tensor:
    return z.new_empty(shape, dtype=compute_dtype(z.dtype))


def _fake_divergence(z0, z, js):
    k, b = z.shape[0], z.shape[1]
    return _rows_of(z0, k + 1 if js else k, b), _rows_of(z0, k + 1, b, 2)


def _fake_divergence_bwd(g, z0, z, divergence, norm, js):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (z0, z))


def _fake_loss(z, y, mult, add, margin, class_weight, s, ignore_index):
    n = z.shape[0]
    return _rows_of(z, n), _rows_of(z, n), _rows_of(z, n, 2)


def _fake_loss_bwd(g, z, y, mult, add, margin, norm, s):
    return torch.empty_like(z, memory_format=torch.contiguous_format)


def _fake_stats(z, y, ignore_index):
    return _rows_of(z, 4, z.shape[0]), _rows_of(z, z.shape[0], 2)


def _fake_scan(a, b, y, t, ignore_index):
    return torch.empty_like(t, memory_format=torch.contiguous_format)


ROWS = (
    Op(
        "logits_divergence",
        "logits",
        "(Tensor z0, Tensor z, bool js) -> (Tensor divergence, Tensor norm)",
        _fake_divergence,
        lambda z0, z, js: size_of(z0, z, *_fake_divergence(z0.to("meta"), z.to("meta"), js)),
        """Divergences of the distributions of K rows ``z[k, b]`` and one row ``z0[b]``; ``P_0 = softmax(z0[b])`` and
        ``P_i = softmax(z[i-1, b])``::

            KL:  divergence[k] = sum_c P_0 (log P_0 - log P_{k+1})                    [K, B]
            js:  divergence[i] = sum_c P_i (log P_i - log M), M = mean of P_0 .. P_K  [K+1, B], their mean is the
                 Jensen-Shannon divergence of the K+1 distributions

        ``norm`` is ``[K+1, B, 2]``, of z0 first. A class with P = 0 adds 0; where P > 0 and Q = 0 KL is infinite.
        Source: Kullback and Leibler 1951; Lin, "Divergence measures based on the Shannon entropy", 1991.""",
    ),
    Op(
        "logits_divergence_bwd",
        "logits",
        "(Tensor g, Tensor z0, Tensor z, Tensor divergence, Tensor norm, bool js) -> (Tensor gz0, Tensor gz)",
        _fake_divergence_bwd,
        lambda g, z0, z, divergence, norm, js: size_of(g, z0, z, z0, z, divergence, norm),
        """Gradients of ``sum_b g[b] sum_k divergence[k, b]``, g being ``[B]``, M moving with the P_i::

            KL:  gz[k] = g (P_{k+1} - P_0)
                 gz0   = sum_k g (P_0 ((log P_0 - log P_{k+1}) - divergence[k])), k in order
            js:  gz[i] = g (P_i ((log P_i - log M) - divergence[i]))

        terms with P_0 (js: P_i) 0 are 0.""",
    ),
    Op(
        "logits_loss",
        "logits",
        "(Tensor z, Tensor y, Tensor? mult, Tensor? add, Tensor? margin, Tensor? class_weight, float s,"
        " int ignore_index) -> (Tensor loss, Tensor weight, Tensor norm)",
        _fake_loss,
        lambda z, y, *rest: size_of(z, y, *rest[:4], *_fake_loss(z.to("meta"), y, *rest)),
        """Cross-entropy of re-balanced logits, a row at a time; mult, add, margin, class_weight are ``[C]``::

            a_c = s ((mult_c z_c + add_c) - (c == y ? margin_c : 0))
            loss = weight (L - (a_y - m))          weight = class_weight_y; norm = (m, L) of a

        Absent mult and class_weight are 1, absent add and margin 0. A row with ``y == ignore_index`` has loss and
        weight 0. Source: Cao et al., arXiv 1906.07413 (LDAM); Menon et al., arXiv 2007.07314 (logit adjustment);
        Kini et al., arXiv 2103.01550 (VS).""",
    ),
    Op(
        "logits_loss_bwd",
        "logits",
        "(Tensor g, Tensor z, Tensor y, Tensor? mult, Tensor? add, Tensor? margin, Tensor norm, float s) -> Tensor",
        _fake_loss_bwd,
        lambda g, z, y, mult, add, margin, norm, s: size_of(g, z, z, y, mult, add, margin, norm),
        """``gz_c = (g (s mult_c)) (exp((a_c - m) - L) - (c == y ? 1 : 0))``, g ``[N]`` with the row's weight in it; a
        row with g = 0 has gz = 0, whatever its label.""",
    ),
    Op(
        "logits_stats",
        "logits",
        "(Tensor z, Tensor y, int ignore_index) -> (Tensor stats, Tensor norm)",
        _fake_stats,
        lambda z, y, ignore_index: size_of(z, y, *_fake_stats(z.to("meta"), y, ignore_index)),
        """Of each row, ``stats[4, N]``::

            cross-entropy L - (z_y - m),  p_y = exp((z_y - m) - L),
            gap = max_{c != y} p_c - p_y,  curvature = 2 max_c p_c (1 - p_c) = 2 exp(-L) (1 - exp(-L))

        the last being Gershgorin's bound of the largest eigenvalue of ``diag(p) - p p^T``; the maximum is at the most
        likely class. Of one class the gap is -p_y. Rows with ``y == ignore_index`` have 0, 0, 0 and their curvature.
        Source: Sitawarin et al., arXiv 2003.09347.""",
    ),
    Op(
        "logits_scan",
        "logits",
        "(Tensor a, Tensor b, Tensor y, Tensor t, int ignore_index) -> Tensor",
        _fake_scan,
        lambda a, b, y, t, ignore_index: size_of(a, b, y, t, t),
        """``loss[k] = mean over rows of the cross-entropy of a - t_k b``, ``[K]``, rows with ``y == ignore_index`` left
        out (of none: NaN); t is ``[K]`` in the compute dtype. Sums over rows run in fp64. Source: Sato et al.,
        arXiv 2207.01847: the loss along a step of a linear head whose features stand still.""",
    ),
)

# SPDX-License-Identifier: Apache-2.0
"""Rows of the compressors family: gradients in few bits, and what the bits leave over.

g is fp32, bf16, fp16 or fp64, taken in storage order of its contiguous form; ``error``, of g's size, is the residual
e in the compute type (fp32; fp64 for fp64 g), written where it lies; ``p = g + e``, without error p = g. Elements
``[b bucket, (b + 1) bucket)`` share the unit b; the last bucket may be shorter. Codes are uint8: of 1, 2, 4 or 8
bits (:func:`width`), the first of a byte in its lowest bits. Given the units all results are maps: the same bits
everywhere.
"""

from __future__ import annotations

import torch

from fastflat._ops._row import Op, compute_dtype, size_of

#: Numbers of the norms that a unit is made of.
NORMS = {"mean": 0, "l2": 1, "max": 2}
MOST_LEVELS = 127


def width(levels: int) -> int:
    """Bits of a code: 1 for signs (levels 0), else 2, 4 or 8."""
    return 1 if levels == 0 else 2 if levels == 1 else 4 if levels <= 7 else 8


def code_bytes(numel: int, levels: int) -> int:
    """Bytes of the codes of `numel` elements."""
    return (numel * width(levels) + 7) // 8


def buckets_of(numel: int, bucket: int) -> int:
    """Units of `numel` elements."""
    return (numel + bucket - 1) // bucket


def _fake_units(g, error, norm, levels, bucket, clip):
    return g.new_empty(buckets_of(g.numel(), bucket), dtype=compute_dtype(g.dtype))


def _fake_encode(g, error, units, state, levels, bucket):
    return g.new_empty(code_bytes(g.numel(), levels), dtype=torch.uint8)


def _fake_topk(g, error, k):
    return g.new_empty(k), g.new_empty(k, dtype=torch.int32)


ROWS = (
    Op(
        "compressors_units",
        "compressors",
        "(Tensor g, Tensor? error, int norm, int levels, int bucket, float clip) -> Tensor",
        _fake_units,
        lambda g, error, norm, levels, bucket, clip: size_of(g, error, _fake_units(g, error, norm, 0, bucket, clip)),
        """The unit of each bucket, by `norm`, in the compute type::

            mean (0)   mean |p|
            l2 (1)     sqrt(sum p^2)
            max (2)    max |p|; with clip > 0 at most clip sqrt(mean p^2)

        divided by `levels` where they are more than 1. Sums in an order that shape and dtype fix; the largest is exact.
        NaN anywhere makes it NaN.""",
    ),
    Op(
        "compressors_encode_",
        "compressors",
        "(Tensor g, Tensor(a!)? error, Tensor units, Tensor? state, int levels, int bucket) -> Tensor",
        _fake_encode,
        lambda g, error, units, state, levels, bucket: (
            size_of(g, error, error, units, state) + code_bytes(g.numel(), levels)
        ),
        """Codes of p, and ``error <- p - unit c`` in the same pass::

            levels 0:  c = -1 where p < 0, else 1;                       stored (c + 1) / 2
            levels s:  a = min(|p| / unit, s), f = floor(a),
                       c = sign(p) (f + [u < a - f]);                    stored c + s

        u is the uniform draw of csrc/math/noise.h of the element (16 bits) from `state`, which signs do not need. A
        unit of 0, NaN or infinity gives c = 0 with levels; where it is not finite error stays as it was, and what is
        decoded is not finite either.
        Sources: Seide et al. 2014; Karimireddy et al., arXiv 1901.09847; Alistarh et al., arXiv 1610.02132; Wen et al.,
        arXiv 1705.07878.""",
    ),
    Op(
        "compressors_decode_",
        "compressors",
        "(Tensor(a!) out, Tensor codes, Tensor units, int levels, int bucket, float factor, bool add) -> ()",
        lambda out, codes, units, levels, bucket, factor, add: None,
        lambda out, codes, units, levels, bucket, factor, add: (
            size_of(out, codes, units) + (size_of(out) if add else 0)
        ),
        """``out = factor sum_k unit_k c_k`` of K workers' codes ``[K, bytes]`` and units ``[K, buckets]``, added to out
        with `add`: the sum from 0 on in the order of k, in the compute type of out, one rounding to its storage.""",
    ),
    Op(
        "compressors_topk_",
        "compressors",
        "(Tensor g, Tensor(a!)? error, int k) -> (Tensor values, Tensor indices)",
        _fake_topk,
        lambda g, error, k: size_of(g, error, error) + k * (g.element_size() + 4),
        """The k elements of the largest ``|p|``, in the dtype of g, and their int32 indices, ascending; NaN is larger
        than all, of equals the first. ``error <- p``, at the indices p less its value as sent, 0 where that is not
        finite.
        Sources: Stich et al., arXiv 1809.07599; Lin et al., arXiv 1712.01887.""",
    ),
)

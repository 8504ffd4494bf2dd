# SPDX-License-Identifier: Apache-2.0
"""Rows of the inputs family: maps of a batch of inputs ``[B, ...]``, contiguous, B samples of D elements each.

fp32, bf16, fp16 or fp64; arithmetic in fp32 (fp64 for fp64 x), draws always in fp32. Given the sums over a sample that
l2 steps need, all results are maps: the same bits everywhere.
"""

from __future__ import annotations

import torch

from fastflat._ops._row import Op, size_of

#: Numbers of the laws of a strength, and of the norms of a step.
LAWS = {"const": 0, "uniform": 1, "exp": 2}
NORMS = {"linf": 0, "l2": 1}


def _fake_noise(x, state, k, law, most, keep):
    samples = x.shape[0] if x.dim() else 0
    return x.new_empty((k, *x.shape)), x.new_empty((k, samples), dtype=torch.float32)


def _fake_step(xa, x0, g, active, step, eps, norm, low, high):
    return torch.empty_like(xa, memory_format=torch.contiguous_format)


ROWS = (
    Op(
        "inputs_noise",
        "inputs",
        "(Tensor x, Tensor state, int K, int law, float most, float keep) -> (Tensor noisy, Tensor sigma)",
        _fake_noise,
        lambda x, state, k, law, most, keep: size_of(x, state) + k * size_of(x) + 4 * k * x.shape[0],
        """K copies of a batch with normal noise, the strength of each sample drawn by `law`::

            sigma[k, b] = most (0: const), most u (1: uniform), -most log(u) (2: exp)
            noisy[k, b, j] = x[b, j] + sigma[k, b] m xi,    xi ~ N(0, 1),  m = 1 with chance keep, else 0

        ``[K, *x.shape]`` and fp32 ``[K, B]``. Philox of csrc/math/philox.h: element i of copy k takes draw ``k n' + i``
        with n' = B D rounded up to 8, xi (times the square root of 12) from the state's offset, the uniform draw that
        is less than keep from offset + 1; sigma takes 23 bits of word r & 3 of block r >> 2 of offset + 2, r = k B + b.
        With keep >= 1 nothing is drawn for m.
        Source: Tsiligkaridis and Tsiligkaridis, arXiv 2104.01231.""",
    ),
    Op(
        "inputs_pgd_step",
        "inputs",
        "(Tensor xa, Tensor x0, Tensor g, Tensor? active, float step, float eps, int norm, float low, float high)"
        " -> Tensor",
        _fake_step,
        lambda xa, x0, g, active, *rest: size_of(xa, xa, x0, g, active),
        """A step of projected gradient ascent, into the eps-ball around x0 and into [low, high]::

            linf (0): d = clamp((xa + step sign(g)) - x0, -eps, eps)
            l2 (1):   d = (xa + step / |g| g) - x0,  d <- d eps / |d| where |d| > eps
            out = clamp(x0 + d, low, high);  xa where the sample is not active (``[B]`` bool)

        norms over a sample, summed in an order that its length and dtype fix; a gradient of 0 moves nothing; NaN stays
        NaN, in l2 for all of its sample. Source: Madry et al., arXiv 1706.06083.""",
    ),
)

# SPDX-License-Identifier: Apache-2.0
"""Weights made of bit planes as users call them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastflat import _checks
from fastflat._ops import compute_dtype
from fastflat._ops.bitplane import MOST_PLANES
from fastflat.autograd import bitplane as rule
from fastflat.backends import kernels

__all__ = ["bitplane", "bitplane_codes", "bitplane_init"]


def bitplane(
    p: Tensor,
    q: Tensor,
    m: Tensor,
    scale: Tensor,
    beta: Tensor | float,
    *,
    hard_weights: bool = False,
    hard_mask: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The weight that N pairs of soft bit planes and a soft mask over them stand for (CSQ), in one pass each way.

    Formula, planes b = 0 ... N-1 from the highest bit down::

        w = scale / (2^N - 1) * sum_b 2^(N-1-b) M_b (bit(p_b) - bit(q_b))

        bit(t) = sigmoid(beta t)       hard_weights: 1{t > 0}
        M_b    = sigmoid(beta m_b)     hard_mask:    1{m_b > 0}

    beta t is held within +-43 (+-353 in fp64), where the bit is 0 or 1 within 1e-18. A latent of exactly 0 is no hard
    bit. With both hard, w is ``step * bitplane_codes(p, q, m)`` with ``step = scale / (2^N - 1)``, rounded once.
    Arithmetic runs in fp32 (fp64 for fp64 planes) and is rounded once to the storage type; all backends give the same
    bits. No tensor of the planes' size is made on the way and autograd keeps p, q, m, scale and beta only.

    Gradients (smooth; nothing is straight-through)::

        dL/dp_b = step 2^(N-1-b) M_b beta bit'(beta p_b) dL/dw        dL/dq_b the same with q and the other sign
        dL/dm_b = step 2^(N-1-b) beta M_b (1 - M_b) sum(dL/dw (bit(p_b) - bit(q_b)))
        dL/ds   = sum(dL/dw w) / scale, computed without the division

    ``hard_weights`` makes the gradient of p and q zero, ``hard_mask`` that of m. beta is a schedule and has none.
    Double backward, forward mode, ``torch.func`` and ``vmap`` follow the same formula; from the second order on they
    make tensors of the planes' size.

    Args:
        p, q: ``[N, ...]``, latents of the positive and of the negative part, planes first, N from 1 to 16: each plane
            is contiguous, so that a kernel walks weights in vectors whatever N is. float32, bfloat16, float16 or
            float64; anything but contiguous costs one copy.
        m: ``[N]``, latents of the mask, in float32 (float64 for float64 planes) or the dtype of p.
        scale: ``[]``, the largest weight; dtype as for m.
        beta: ``[]``, steepness, positive; a tensor on the device changes without a sync or a recompilation.
        hard_weights, hard_mask: hard bits, hard mask.
        dtype: storage type of w, to cast fp32 planes to bfloat16 or float16 in the same pass.

    Returns:
        w, ``[...]``, contiguous.

    Raises:
        TypeError, ValueError: an argument does not fit, in one line that names it, what was wanted and what came.

    Source: Xiao et al., "CSQ: Growing Mixed-Precision Quantization Scheme with Bi-level Continuous Sparsification",
    DAC 2023, with the powers of two as constants.
    """
    op = "bitplane"
    _planes(op, p, q, m)
    compute = compute_dtype(p.dtype)
    if isinstance(beta, (int, float)) and not isinstance(beta, bool):
        beta = torch.full((), beta, dtype=compute, device=p.device)
    _small(op, "scale", scale, p, ())
    _small(op, "beta", beta, p, ())
    if beta.requires_grad:
        _checks.fail(op, "beta", "need no gradient", "requires_grad=True", "; it is a schedule: detach it")
    if dtype is not None:
        _checks.stored_as(op, p, dtype)
    m, scale, beta = (t if t.dtype is compute else t.to(compute) for t in (m, scale, beta))
    if _checks.VALUES_WANTED:
        _checks.scale_values(op, scale)
        _checks.scale_values(op, beta, "beta")
    found = None if torch.compiler.is_compiling() else kernels(p.device.type)
    return rule.bitplane(p, q, m, scale, beta, rule.Plan(bool(hard_weights), bool(hard_mask), dtype, found))


def bitplane_codes(p: Tensor, q: Tensor, m: Tensor) -> Tensor:
    """The integers that hard bit planes stand for: ``sum_b 2^(N-1-b) 1{m_b > 0} (1{p_b > 0} - 1{q_b > 0})``.

    Args:
        p, q, m: as for :func:`bitplane`.

    Returns:
        Codes ``[...]`` in int32, between ``-(2^N - 1)`` and ``2^N - 1``: the weight is
        ``scale / (2^N - 1) * codes``. NaN counts as no bit.

    Raises:
        TypeError, ValueError: as :func:`bitplane`.
    """
    _planes("bitplane_codes", p, q, m)
    planes = p.shape[0]
    kept = (m > 0).to(torch.int32)
    codes = torch.zeros(p.shape[1:], dtype=torch.int32, device=p.device)
    for b in range(planes):
        codes += ((p[b] > 0).to(torch.int32) - (q[b] > 0).to(torch.int32)) * (kept[b] << (planes - 1 - b))
    return codes


def bitplane_init(w: Tensor, planes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bit planes that stand for w: its codes in ``planes`` bits, as centred logits ``2 bit - 1``.

    ``scale = max|w|``, and the code of a weight is ``round(|w| / scale * (2^planes - 1))``, ties to even. Centred
    logits keep the function: ``bitplane`` of the result differs from ``scale * code / (2^planes - 1)`` by
    ``O(exp(-beta)) scale``, 1.4e-4 at beta 10 and nothing beyond rounding at 200; logits 0 and 1 would shrink every
    weight to about a tenth. All mask latents are 1: every plane is kept.

    Args:
        w: any shape; float32, bfloat16, float16 or float64. No gradient flows back to it.
        planes: N, 1 to 16.

    Returns:
        (p, q, m, scale): p and q ``[N, ...]`` in the dtype of w, m ``[N]`` and scale ``[]`` in the compute type. They
        are plain tensors: wrap as parameters what is to be trained, and nothing else. A w of zeros gets scale 1.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    op = "bitplane_init"
    _dense(op, "w", w)
    if not isinstance(planes, int) or isinstance(planes, bool):
        _checks.fail(op, "planes", "be an int", type(planes))
    if not 1 <= planes <= MOST_PLANES:
        _checks.fail(op, "planes", f"lie in [1, {MOST_PLANES}]", planes)
    compute = compute_dtype(w.dtype)
    data = w.detach().to(compute)
    largest = data.abs().amax() if data.numel() else data.new_zeros(())
    scale = torch.where(largest > 0, largest, torch.ones_like(largest))
    codes = torch.round(data / scale * (2**planes - 1)).to(torch.int32)
    shifts = torch.arange(planes - 1, -1, -1, device=w.device, dtype=torch.int32).view(-1, *[1] * w.dim())
    p, q = (((c.clamp(min=0) >> shifts) & 1).to(w.dtype) * 2 - 1 for c in (codes, -codes))
    return p, q, torch.ones(planes, dtype=compute, device=w.device), scale


def _dense(op: str, name: str, t: object) -> None:
    """t is a dense floating tensor."""
    if not isinstance(t, Tensor):
        _checks.fail(op, name, "be a tensor", type(t))
    if t.layout is not torch.strided:
        _checks.fail(op, name, "be a dense tensor", t.layout)
    if t.dtype not in _checks.FLOATS:
        _checks.fail(op, name, "be float32, bfloat16, float16 or float64", t.dtype)


def _planes(op: str, p: object, q: object, m: object) -> None:
    """p and q are planes of one shape, m has a value for each."""
    _dense(op, "p", p)
    if p.dim() == 0 or not 1 <= p.shape[0] <= MOST_PLANES:
        want = f"have shape [N, ...] with 1 to {MOST_PLANES} planes first"
        _checks.fail(op, "p", want, list(p.shape), "; move the planes to the front with movedim")
    _dense(op, "q", q)
    if q.shape != p.shape:
        _checks.fail(op, "q", f"have the shape of p, {list(p.shape)}", list(q.shape))
    if q.dtype != p.dtype:
        _checks.fail(op, "q", f"be {p.dtype} like p", q.dtype)
    if q.device != p.device:
        _checks.fail(op, "q", f"be on the device of p ({p.device})", q.device)
    _small(op, "m", m, p, (p.shape[0],))


def _small(op: str, name: str, t: object, p: Tensor, shape: tuple[int, ...]) -> None:
    """A small tensor of `shape` that goes with the planes p."""
    if not isinstance(t, Tensor):
        _checks.fail(op, name, "be a tensor", type(t), f"; write torch.tensor({t})" if isinstance(t, float) else "")
    if tuple(t.shape) != shape:
        text = "[]" if not shape else f"[N={shape[0]}]"
        _checks.fail(op, name, f"have shape {text}", list(t.shape))
    wanted = compute_dtype(p.dtype)
    if t.dtype not in (wanted, p.dtype):
        _checks.fail(op, name, f"be {wanted}" + ("" if p.dtype == wanted else f" or {p.dtype}"), t.dtype)
    if t.device != p.device:
        _checks.fail(op, name, f"be on the device of p ({p.device})", t.device)

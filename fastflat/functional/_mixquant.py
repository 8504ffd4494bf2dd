# SPDX-License-Identifier: Apache-2.0
"""Mixtures of bit-widths as users call them: a weighted sum over candidates, and a real-valued width between two."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastflat import _checks
from fastflat._ops import compute_dtype, scale_shape
from fastflat._spec import QuantSpec
from fastflat.autograd import mixquant as rule
from fastflat.backends import kernels

__all__ = ["frac_quantize", "mixquant"]

#: Candidates of one call.
MOST = 8
#: Widths an integer grid may have.
NARROWEST, WIDEST = 1, 16
#: What a mixture needs of a spec, beside its own fields.
_FORM = {"format": "int", "rounding": "even", "noise": "none", "scale_is": "s", "compute": "fp32"}


def mixquant(
    x: Tensor,
    scales: Tensor,
    weight: Tensor,
    *,
    bits: Sequence[int] | Tensor,
    spec: QuantSpec,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """All candidate bit-widths of a differentiable search, mixed in one read of x::

        y = sum_j weight[j] Q_j(x)          Q_j: fake_quantize(x, scales[j]) with bits[j]

    Each Q_j is that of :func:`fake_quantize` bit for bit: IEEE division, ties to the even neighbour, the conventions
    of `spec`. Products are added in the order of j in fp32 (fp64 for fp64 x). A candidate whose weight is 0 is left
    out of y, also where its own value is infinite or NaN, so a one-hot weight gives ``fake_quantize`` itself, signs
    of zeros included; with all weights 0, y is -0.

    Gradients (straight-through, masks m_j and residuals frozen, ``f_j = spec.grad_scale``'s factor for bits[j]), all
    in one pass over x and dL/dy::

        dL/dx         = dL/dy sum_j weight[j] m_j              0 where the sum is, whatever dL/dy is
        dL/dscales[j] = f_j weight[j] sum(dL/dy (q_j - m_j x/s_j))   estimator="lsq"; "ste" takes scales as constants
        dL/dweight[j] = sum(dL/dy Q_j(x))                      candidates of weight 0 included

    Double backward, forward mode, ``torch.func`` and ``vmap`` follow the same frozen form, linear in (x, scales) and
    in weight. Kept for backward: x, the scales and vectors of n numbers.

    Args:
        x: any shape and dense layout; float32, bfloat16, float16 or float64.
        scales: ``[n]`` (axis and group None), ``[n, C]`` (axis) or ``[n, ..., K/group]`` (group), n from 1 to 8, in
            float32 (float64 for float64 x) or the dtype of x.
        weight: ``[n]``, any values; in a search, a softmax over the candidates. Dtypes as scales.
        bits: n integers from 1 (2 with ``spec.narrow``) to 16, or a tensor ``[n]`` of them (integers or floats) on the
            device of x, never read by the host; its values are checked under FASTFLAT_CHECK=1.
        spec: sign, narrowness, axis, group, conventions and gradient factors of all candidates; ``spec.bits`` is not
            used. Without zero-point, noise or number format.
        dtype: storage type of the result, to cast an fp32 x to bfloat16 or float16 in the same pass.

    Returns:
        y with the shape of x and the strides of ``torch.empty_like(x)`` (contiguous with groups).

    Raises:
        TypeError, ValueError: an argument does not fit, in one line that names it, what was wanted and what came.

    Source: Wu et al., 2018 (DNAS, mixed outputs); Cai and Vasconcelos, CVPR 2020 (EdMIPS, mixed weights).
    """
    op = "mixquant"
    _data(op, x, spec, dtype)
    count = _count(op, bits, spec)
    compute = compute_dtype(x.dtype)
    scales = _tensor(op, "scales", scales, (count, *_scale_shape(x, spec)), x, spec)
    weight = _tensor(op, "weight", weight, (count,), x)
    shared = (x.numel(), scales.numel() // count)
    if isinstance(bits, Tensor):
        if bits.device != x.device:
            _checks.fail(op, "bits", f"be on the device of x ({x.device})", bits.device)
        if _checks.VALUES_WANTED and bool(((bits < _narrowest(spec)) | (bits > WIDEST) | (bits != bits.long())).any()):
            _checks.fail(op, "bits", f"be integers from {_narrowest(spec)} to {WIDEST}", bits.tolist())
        candidates = _candidates(bits.detach(), spec, compute, *shared)
    else:
        candidates = _listed(tuple(bits), spec, compute, x, *shared)
    return _mix(op, x, scales, weight, candidates, spec, dtype)


def frac_quantize(x: Tensor, scale: Tensor, bits: Tensor | float, *, spec: QuantSpec) -> Tensor:
    """Fake-quantization with a real-valued bit-width b, which can be learned::

        y = (1 - f) Q_k(x) + f Q_{k+1}(x)          k = floor(b), f = b - k

    Q_k is :func:`fake_quantize` on the grid of k bits with step ``scale / max(qmax_k, 1)``: `scale` is the half range
    of the data (its absmax), which both widths share. For whole b, y is Q_b(x) bit for bit: the other candidate has
    weight 0 and is left out. At b = 16, k is 15 and f is 1.

    Gradients: those of :func:`mixquant`, through both candidates, and::

        dL/db     = sum(dL/dy (Q_{k+1}(x) - Q_k(x)))
        dL/dscale = sum_j dL/dstep_j / max(qmax_j, 1)

    The slope in b is that of the piece to the right of b. A tensor b outside 1..16 (2..16 with ``spec.narrow``) is
    held at the bound and takes the slope there, so that an optimizer's step too far can be undone. The second
    derivative in b is 0.

    Args:
        x: as in :func:`mixquant`.
        scale: ``[]``, ``[C]`` or ``[..., K/group]``: the magnitude that the highest code stands for.
        bits: a number from 1 to 16, or a floating 0-dim tensor on the device of x that the host never reads; its
            value is checked under FASTFLAT_CHECK=1.
        spec: as in :func:`mixquant`; ``scale_is`` may be "absmax", too, which is what `scale` is here.

    Returns:
        y as in :func:`mixquant`.

    Raises:
        TypeError, ValueError: as :func:`mixquant`.

    Source: Yang and Jin, AAAI 2021 (FracBits), eq. 4.
    """
    op = "frac_quantize"
    _data(op, x, spec.replace(scale_is="s") if getattr(spec, "scale_is", "s") == "absmax" else spec, None)
    compute = compute_dtype(x.dtype)
    scale = _tensor(op, "scale", scale, _scale_shape(x, spec), x, spec)
    narrowest = _narrowest(spec)
    width = _width(op, bits, x, compute, narrowest)
    # The value is exact: what is added to it is width - width.
    held = width.detach().clamp(narrowest, WIDEST)
    lower = held.floor().clamp(max=WIDEST - 1)
    fraction = (held - lower) + (width - width.detach())
    weight = torch.stack([1.0 - fraction, fraction])
    # NaN has no grid: its weights make y NaN, whatever the grids are.
    candidates = _candidates(
        torch.stack([lower, lower + 1]).nan_to_num(narrowest), spec, compute, x.numel(), scale.numel()
    )
    steps = candidates.qmax.clamp(min=1.0).view(-1, *[1] * scale.dim())
    return _mix(op, x, scale.unsqueeze(0) / steps, weight, candidates, spec, None)


def _mix(op, x, scales, weight, candidates, spec, dtype) -> Tensor:
    trained = spec.estimator == "lsq"
    if not trained and scales.requires_grad:
        hint = "; use estimator='lsq' to train them, or detach them"
        _checks.fail(op, "scales", "need no gradient with estimator='ste'", "requires_grad=True", hint)
    if _checks.VALUES_WANTED:
        _checks.scale_values(op, scales, "scales")
    grid = (_checks.axis_of(spec, x.dim()), spec.group or 0, spec.eps, spec.rules)
    backend = None if torch.compiler.is_compiling() else kernels(x.device.type)
    return rule.mixquant(x, scales, weight, candidates, rule.Plan(grid, trained, dtype, backend))


def _data(op: str, x: object, spec: object, dtype: torch.dtype | None) -> None:
    _checks.data(op, x, spec)
    for field, wanted in _FORM.items():
        if getattr(spec, field) != wanted:
            _checks.fail(op, f"spec.{field}", f"be {wanted!r}", repr(getattr(spec, field)))
    if spec.estimator not in ("ste", "lsq"):
        _checks.fail(op, "spec.estimator", "be 'ste' or 'lsq'", repr(spec.estimator))
    if dtype is not None:
        _checks.stored_as(op, x, dtype)


def _narrowest(spec: QuantSpec) -> int:
    """The fewest bits that leave the grid two codes."""
    return NARROWEST + int(spec.narrow)


def _count(op: str, bits: object, spec: QuantSpec) -> int:
    """The number of candidates."""
    if isinstance(bits, Tensor):
        if bits.dim() != 1 or bits.is_complex() or bits.dtype == torch.bool:
            _checks.fail(op, "bits", "be a list of integers or a numeric tensor [n]", _described(bits))
        if bits.requires_grad:
            _checks.fail(op, "bits", "need no gradient", "requires_grad=True", "; frac_quantize learns a width")
        count = bits.shape[0]
    else:
        if not isinstance(bits, (list, tuple, range)):
            _checks.fail(op, "bits", "be a list of integers or a tensor [n]", type(bits))
        for b in bits:
            if isinstance(b, bool) or not isinstance(b, int) or not _narrowest(spec) <= b <= WIDEST:
                _checks.fail(op, "bits", f"be integers from {_narrowest(spec)} to {WIDEST}", repr(b))
        count = len(bits)
    if not 1 <= count <= MOST:
        _checks.fail(op, "bits", f"name 1 to {MOST} candidates", count)
    return count


def _described(t: Tensor) -> str:
    return f"{t.dtype} {list(t.shape)}"


def _scale_shape(x: Tensor, spec: QuantSpec) -> tuple[int, ...]:
    return scale_shape(x.shape, _checks.axis_of(spec, x.dim()), spec.group or 0)


def _tensor(op: str, name: str, t: object, shape: tuple, x: Tensor, spec: QuantSpec | None = None) -> Tensor:
    """A parameter in the compute type, its metadata checked."""
    if not isinstance(t, Tensor):
        _checks.fail(op, name, "be a tensor", type(t), f"; write torch.tensor({t})" if isinstance(t, float) else "")
    if t.device != x.device:
        _checks.fail(op, name, f"be on the device of x ({x.device})", t.device)
    compute = compute_dtype(x.dtype)
    if t.dtype not in (compute, x.dtype):
        _checks.fail(op, name, f"be {compute}" + ("" if x.dtype == compute else f" or {x.dtype}"), t.dtype)
    if tuple(t.shape) != shape:
        hint = "" if spec is None else f" (axis {spec.axis}, group {spec.group})"
        _checks.fail(op, name, f"have shape {list(shape)}", list(t.shape), hint)
    return t.to(compute)


def _width(op: str, bits: object, x: Tensor, compute: torch.dtype, narrowest: int) -> Tensor:
    """The width of frac_quantize as a 0-dim tensor in the compute type."""
    want, line = f"lie in {narrowest}..{WIDEST}", f"; learnable bits outside {narrowest}..{WIDEST}"
    if not isinstance(bits, Tensor):
        if isinstance(bits, bool) or not isinstance(bits, (int, float)):
            _checks.fail(op, "bits", "be a number or a 0-dim tensor", type(bits))
        if not narrowest <= bits <= WIDEST:
            _checks.fail(op, "bits", want, bits, line)
        return torch.full((), bits, dtype=compute, device=x.device)
    if bits.dim() or not bits.is_floating_point():
        _checks.fail(op, "bits", "be a floating 0-dim tensor", _described(bits))
    if bits.device != x.device:
        _checks.fail(op, "bits", f"be on the device of x ({x.device})", bits.device)
    if _checks.VALUES_WANTED and not narrowest <= bits.item() <= WIDEST:
        _checks.fail(op, "bits", want, bits.item(), line)
    return bits.to(compute)


def _candidates(bits: Tensor, spec: QuantSpec, compute: torch.dtype, numel: int, scales: int) -> rule.Candidates:
    """Limits and gradient factors for widths on the device; powers of two by shifts, which are exact."""
    width = bits.to(torch.int64).clamp(NARROWEST, WIDEST)
    one = torch.ones_like(width)
    half, whole = one << (width - 1), one << width
    if spec.signed:
        qmin, qmax = int(spec.narrow) - half, half - 1
    else:
        qmin, qmax = torch.zeros_like(width), whole - (1 + int(spec.narrow))
    qmin, qmax = qmin.to(compute), qmax.to(compute)
    if spec.grad_scale not in ("lsq", "lsq_channel") or numel == 0:
        constant = 1.0 if isinstance(spec.grad_scale, str) else float(spec.grad_scale)
        return rule.Candidates(qmin, qmax, torch.full_like(qmax, constant))
    shared = numel if spec.grad_scale == "lsq" else numel / scales
    factor = 1.0 / (qmax.double().clamp(min=1.0) * shared).sqrt()
    return rule.Candidates(qmin, qmax, factor.to(compute))


@functools.lru_cache(maxsize=256)
def _cached(bits, spec, compute, device, numel, scales) -> rule.Candidates:
    # Tensors of inference mode could not be saved for a later backward.
    with torch.inference_mode(False):
        return _candidates(torch.tensor(bits, device=device), spec, compute, numel, scales)


def _listed(bits, spec, compute, x, numel, scales) -> rule.Candidates:
    """The same for widths that the host knows, kept for the next call; graphs, transforms and fake tensors make their
    own."""
    plain = type(x) in (Tensor, torch.nn.Parameter) and not torch._C._are_functorch_transforms_active()
    if torch.compiler.is_compiling() or not plain:
        return _candidates(torch.tensor(bits, device=x.device), spec, compute, numel, scales)
    return _cached(bits, spec, compute, x.device, numel, scales)

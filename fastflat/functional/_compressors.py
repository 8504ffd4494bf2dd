# SPDX-License-Identifier: Apache-2.0
"""Gradients in few bits as users call them: codes with error feedback, and what they stand for."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastflat import _checks
from fastflat._ops import compute_dtype
from fastflat._ops.compressors import MOST_LEVELS, NORMS, buckets_of, code_bytes
from fastflat.autograd._modes import transformed
from fastflat.backends import kernels
from fastflat.functional._noise import state_for

__all__ = ["Compressed", "Largest", "compress", "compress_topk", "decompress", "decompress_topk"]

#: Levels, norm and bucket of each method where none are given; None: not an option, and one bucket for all.
_DEFAULTS = {"sign": (0, "mean", None), "qsgd": (7, "l2", 512), "terngrad": (1, "max", None)}


class Compressed(NamedTuple):
    """What :func:`compress` sends of a tensor; ``codes`` and ``units`` are all that travels.

    ``codes`` uint8 ``[bytes]``, ``units`` ``[buckets]`` (float32; float64 for float64 g); of K workers ``[K, bytes]``
    and ``[K, buckets]``, as ``compressed._replace(codes=..., units=...)`` puts them together.
    """

    codes: Tensor
    units: Tensor
    levels: int
    bucket: int
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that travel."""
        return self.codes.nbytes + self.units.nbytes


class Largest(NamedTuple):
    """What :func:`compress_topk` sends: ``values`` ``[k]`` in the dtype of g and int32 ``indices`` ``[k]``, ascending,
    into the flattened tensor; of K workers ``[K, k]`` both."""

    values: Tensor
    indices: Tensor
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that travel."""
        return self.values.nbytes + self.indices.nbytes


def compress(
    g: Tensor,
    method: str = "sign",
    *,
    error: Tensor | None = None,
    levels: int | None = None,
    bucket: int | None = None,
    norm: str | None = None,
    clip: float | None = None,
    generator: torch.Generator | None = None,
    state: Tensor | None = None,
) -> Compressed:
    """A gradient in 1, 2, 4 or 8 bits an element and one number a bucket, with error feedback in the same pass::

        p = g + error                     error: what earlier calls left over, 0 at first
        sign      unit = mean |p|,        c = -1 where p < 0, else 1                                  1 bit
        qsgd      unit = |p|_2 / levels,  a = |p| / unit,  f = floor(a),
                                          c = sign(p) (f + [u < a - f]),  u ~ U(0, 1)       2, 4 or 8 bits
        terngrad  unit = max |p|,         the same with levels = 1                                    2 bits
        error <- p - unit c               unit c is what :func:`decompress` gives

    Without ``error`` p = g, and qsgd and terngrad are unbiased to 2^-17 of a unit, the resolution of u. With it the sum
    of all that was sent and the last error is the sum of all gradients, to rounding. The draws are Philox4x32-10 of a
    state of two numbers: the same state gives the same codes on every backend. Codes and error are the same bits on
    every backend where the units are; ``max`` units always are.

    Error feedback converges where a code takes something away from p: signs do, qsgd with the norm ``max`` and 3 levels
    or more, terngrad clipped near 1; :class:`fastflat.distributed.Compression` has such defaults and their measure.

    A bucket with NaN or infinity in p sends a unit that is not finite, so that what is decoded is not either and a loss
    scaler skips the step; its error stays as it was.

    Args:
        g: any shape; float32, bfloat16, float16 or float64. Arithmetic in float32 (float64).
        method: ``sign``, ``qsgd`` or ``terngrad``.
        error: contiguous, shape of g, float32 (float64 for float64 g); written in place.
        levels: of qsgd, 1 to 127; default 7, which are 4 bits.
        bucket: elements that share a unit; default 512 with qsgd, else the whole tensor.
        norm: of qsgd, ``l2`` (default) or ``max``.
        clip: of terngrad, largest unit in root mean squares of the bucket (the paper: 2.5); None for none.
        generator, state: of the draws, as in :func:`noise_batch`; sign takes neither.

    Raises:
        TypeError, ValueError: an argument does not fit, in one line that names it, what was wanted and what came; g
            asks for a gradient.

    Source: Seide et al., "1-Bit Stochastic Gradient Descent", Interspeech 2014; Karimireddy et al., arXiv 1901.09847;
    Alistarh et al., arXiv 1610.02132; Wen et al., arXiv 1705.07878.
    """
    op = "compress"
    _gradient(op, g, error)
    if method not in _DEFAULTS:
        _checks.fail(op, "method", f"be one of {', '.join(_DEFAULTS)}", repr(method))
    usual, of_method, usual_bucket = _DEFAULTS[method]
    for name, value, owner in (("levels", levels, "qsgd"), ("norm", norm, "qsgd"), ("clip", clip, "terngrad")):
        if value is not None and method != owner:
            _checks.fail(op, name, f"be None unless method is {owner}", value)
    if levels is not None:
        _whole(op, "levels", levels, 1, MOST_LEVELS)
    if bucket is not None:
        _whole(op, "bucket", bucket, 1, 2**62)
    if norm not in (None, "l2", "max"):
        _checks.fail(op, "norm", "be l2 or max", repr(norm))
    if clip is not None:
        if isinstance(clip, bool) or not isinstance(clip, (int, float)):
            _checks.fail(op, "clip", "be a number", type(clip))
        if not 0 < clip < math.inf:
            _checks.fail(op, "clip", "be positive and finite", clip)
    if method == "sign":
        for name, value in (("generator", generator), ("state", state)):
            if value is not None:
                _checks.fail(op, name, "be None with sign, which draws nothing", type(value))
    else:
        state = state_for(op, g, state, generator)
    levels, norm = levels or usual, norm or of_method
    bucket = bucket or usual_bucket or max(g.numel(), 1)
    run = _kernels(g)
    units = run.compressors_units(g, error, NORMS[norm], levels, bucket, float(clip or 0))
    codes = run.compressors_encode_(g, error, units, state, levels, bucket)
    return Compressed(codes, units, levels, bucket, tuple(g.shape))


def decompress(compressed: Compressed, out: Tensor | None = None, *, factor: float = 1.0, add: bool = False) -> Tensor:
    """What codes stand for, of K workers their sum, in one pass over them::

        out = factor sum_k unit_k c_k        + out with `add`

    Summed in the order of k, arithmetic in float32 (float64 for float64 out), one rounding to the type of out; the same
    bits on every backend.

    Args:
        compressed: of one worker or of several.
        out: contiguous, as many elements as g had; None makes one in the shape of g and the type of the units.
        factor: 1 / K for the mean.

    Returns:
        out.

    Raises:
        TypeError, ValueError: as :func:`compress`.
    """
    op = "decompress"
    if not isinstance(compressed, Compressed):
        _checks.fail(op, "compressed", "be what compress returns", type(compressed))
    codes, units, levels, bucket, shape = compressed
    codes, units = (t if t.dim() == 2 else t[None] for t in (codes, units))
    n = math.prod(shape)
    out = _target(op, out, n, shape, units, add)
    if units.dtype != compute_dtype(out.dtype):
        _checks.fail(op, "out", "be float64 for float64 units and only for them", out.dtype)
    for name, t, dtype, length in (
        ("codes", codes, torch.uint8, code_bytes(n, levels)),
        ("units", units, units.dtype, buckets_of(n, bucket)),
    ):
        if t.dtype != dtype or t.dim() != 2 or t.shape[1] != length or len(t) != len(codes):
            want, got = f"be {dtype} of shape [{length}] or [K={len(codes)}, {length}]", f"{t.dtype} {list(t.shape)}"
            _checks.fail(op, name, want, got)
    _factor(op, factor)
    _kernels(out).compressors_decode_(out, codes, units, levels, bucket, float(factor), bool(add))
    return out


def compress_topk(g: Tensor, k: int, *, error: Tensor | None = None) -> Largest:
    """The k elements of the largest ``|g + error|``; the rest, and what a rounding took from these, stay in error.

    Of equals the first, NaN before all; the same bits on every backend, no sort of the whole. What is sent is not
    weighed anew: top-k is biased, and converges by its error feedback.

    Args:
        g: any shape, fewer than 2^31 elements; float32, bfloat16, float16 or float64.
        k: 1 to the number of elements.
        error: as in :func:`compress`.

    Raises:
        TypeError, ValueError: as :func:`compress`.

    Source: Stich et al., "Sparsified SGD with Memory", arXiv 1809.07599; Lin et al., arXiv 1712.01887.
    """
    op = "compress_topk"
    _gradient(op, g, error)
    if g.numel() >= 2**31:
        _checks.fail(op, "g", "have fewer than 2^31 elements", g.numel())
    _whole(op, "k", k, 1, g.numel())
    return Largest(*_kernels(g).compressors_topk_(g, error, k), tuple(g.shape))


def decompress_topk(largest: Largest, out: Tensor | None = None, *, factor: float = 1.0, add: bool = False) -> Tensor:
    """The tensor that the largest elements make, zeros elsewhere; of K workers factor times their sum, in their order.

    Args and errors as :func:`decompress`; out is in the type of the values (float32 for 16 bits) where none is given.
    """
    op = "decompress_topk"
    if not isinstance(largest, Largest):
        _checks.fail(op, "largest", "be what compress_topk returns", type(largest))
    values, indices, shape = largest
    values, indices = (t if t.dim() == 2 else t[None] for t in (values, indices))
    if values.shape != indices.shape or values.dim() != 2:
        _checks.fail(op, "indices", f"have the shape of values, {list(values.shape)}", list(indices.shape))
    total = values.new_zeros(math.prod(shape), dtype=compute_dtype(values.dtype))
    out = _target(op, out, total.numel(), shape, total, add)
    _factor(op, factor)
    for value, at in zip(values, indices, strict=True):
        total.index_add_(0, at, value.to(total.dtype))
    total = (total * factor).view(out.shape).to(out.dtype)
    return out.add_(total) if add else out.copy_(total)


def _kernels(x: Tensor):
    return torch.ops.fastflat if torch.compiler.is_compiling() else kernels(x.device.type)


def _gradient(op: str, g: object, error: object) -> None:
    _checks.dense_data(op, "g", g, None)
    if transformed():
        raise NotImplementedError(f"fastflat::{op}: codes have no derivative; call it outside of torch.func transforms")
    if g.requires_grad and torch.is_grad_enabled():
        _checks.fail(op, "g", "need no gradient", "one that does", "; write g.detach()")
    if error is None:
        return
    if not isinstance(error, Tensor):
        _checks.fail(op, "error", "be a tensor", type(error))
    want = compute_dtype(g.dtype)
    if error.dtype != want or error.shape != g.shape or not error.is_contiguous():
        layout = "" if error.is_contiguous() else ", not contiguous"
        got = f"{error.dtype} of shape {list(error.shape)}{layout}"
        _checks.fail(op, "error", f"be contiguous {want} of shape {list(g.shape)}", got)
    if error.device != g.device:
        _checks.fail(op, "error", f"be on the device of g ({g.device})", error.device)
    if error.requires_grad:
        _checks.fail(op, "error", "need no gradient", "one that does")


def _target(op: str, out: Tensor | None, n: int, shape: tuple[int, ...], like: Tensor, add: bool) -> Tensor:
    if out is None:
        if add:
            _checks.fail(op, "out", "be a tensor with add", "None")
        return like.new_empty(shape)
    _checks.dense_data(op, "out", out, None)
    if out.numel() != n or not out.is_contiguous():
        layout = "" if out.is_contiguous() else ", not contiguous"
        _checks.fail(op, "out", f"be contiguous with {n} elements", f"{out.numel()}{layout}")
    if out.device != like.device:
        _checks.fail(op, "out", f"be on the device of what was sent ({like.device})", out.device)
    if out.requires_grad and torch.is_grad_enabled():
        _checks.fail(op, "out", "need no gradient", "one that does")
    return out


def _whole(op: str, name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        _checks.fail(op, name, "be an int", type(value))
    if not low <= value <= high:
        _checks.fail(op, name, f"lie in [{low}, {high}]", value)


def _factor(op: str, factor: object) -> None:
    if isinstance(factor, bool) or not isinstance(factor, (int, float)):
        _checks.fail(op, "factor", "be a number", type(factor))

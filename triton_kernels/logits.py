# SPDX-License-Identifier: Apache-2.0
"""The ``logits`` family: divergences, losses and statistics of rows of logits.

A program has some rows, or one; a row that is longer than a tile is passed over again for each maximum, sum and result.
Sums are formed in fp64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _launch
from ._common import double_from_bits, narrow, widen
from ._elementary import exp, log
from ._launch import OPTIONS

#: Elements of a tile, and of the longest row that a program holds; the latter is half in fp64.
_TILE, _LONGEST = 256, 1024


@triton.jit
def _fetch(pointer, offsets, mask):
    """Elements in the arithmetic type; 0 where the mask is off."""
    return widen(tl.load(pointer + offsets, mask=mask, other=0))


@triton.jit
def _write(pointer, offsets, v, mask):
    tl.store(pointer + offsets, narrow(v, pointer.dtype.element_ty), mask=mask)


@triton.jit
def _place(R, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows [ROWS, 1] of a program, which of them there are, and columns [1, BLOCK] of a tile."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    return rows, rows < R, tl.arange(0, BLOCK)[None, :]


@triton.jit
def _logit(z, base, at, here, classes, y, MULT: tl.constexpr, ADD: tl.constexpr, MARGIN: tl.constexpr):
    """Logits as a loss sees them: s ((mult z + add) - margin of the label), of what there is."""
    mult, add, margin, s = classes
    v = _fetch(z, base + at, here)
    if MULT:
        v = tl.load(mult + at, mask=here, other=0.0) * v
    if ADD:
        v = v + tl.load(add + at, mask=here, other=0.0)
    if MARGIN:
        v = v - tl.where(at == y, tl.load(margin + at, mask=here, other=0.0), 0.0)
    return s * v


@triton.jit
def _largest(v, here):
    """Largest of each row, NaN left out."""
    return tl.max(tl.where(here & (v == v), v, float("-inf")), 1, keep_dims=True)


@triton.jit
def _below(v, most, here):
    """Exponentials in fp64, ready to be added."""
    return tl.where(here, exp(v - most).to(tl.float64), 0.0)


@triton.jit
def _norm(z, base, C, alive, at, classes, y, MULT: tl.constexpr, ADD: tl.constexpr, MARGIN: tl.constexpr,
          RESIDENT: tl.constexpr):  # fmt: skip
    """The largest logit of each row, and the logarithm of the sum of exponentials below it."""
    if RESIDENT:
        here = alive & (at < C)
        v = _logit(z, base, at, here, classes, y, MULT, ADD, MARGIN)
        most = _largest(v, here)
        total = tl.sum(_below(v, most, here), 1, keep_dims=True)
    else:
        BLOCK: tl.constexpr = at.shape[1]
        begin = C * 0
        here = alive & (at < C)
        v = _logit(z, base, at, here, classes, y, MULT, ADD, MARGIN)
        most = _largest(v, here)
        begin += BLOCK
        while begin < C:
            here = alive & (begin + at < C)
            v = _logit(z, base, begin + at, here, classes, y, MULT, ADD, MARGIN)
            more = _largest(v, here)
            most = tl.where(more > most, more, most)
            begin += BLOCK
        sums = tl.zeros(v.shape, tl.float64)
        begin = C * 0
        while begin < C:
            here = alive & (begin + at < C)
            v = _logit(z, base, begin + at, here, classes, y, MULT, ADD, MARGIN)
            sums += _below(v, most, here)
            begin += BLOCK
        total = tl.sum(sums, 1, keep_dims=True)
    return most, log(total.to(most.dtype))


@triton.jit
def _plain_norm(z, base, C, alive, at, s, RESIDENT: tl.constexpr):
    """The same of logits as they are; s is 1."""
    return _norm(z, base, C, alive, at, (z, z, z, s), 0, False, False, False, RESIDENT)


@triton.jit
def _keep(norm, rows, alive, most, log_sum):
    tl.store(norm + 2 * rows, most, mask=alive)
    tl.store(norm + 2 * rows + 1, log_sum, mask=alive)


@triton.jit
def _log_p(z, base, at, here, norm, rows, alive):
    most = tl.load(norm + 2 * rows, mask=alive, other=0.0)
    return (_fetch(z, base + at, here) - most) - tl.load(norm + 2 * rows + 1, mask=alive, other=0.0)


@triton.jit
def _terms(p, log_p, log_q, here):
    """p (log p - log q) in fp64, nothing where p is 0."""
    return tl.where(here & (p != 0.0), (p * (log_p - log_q)).to(tl.float64), 0.0)


@triton.jit
def _to_first(g, p, log_p, log_q, all_):
    return tl.where(p == 0.0, 0.0, g * (p * ((log_p - log_q) - all_)))


@triton.jit(do_not_specialize=["K", "R"])
def _kl_kernel(divergence, norm, z0, z, K, R, C, RESIDENT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows, alive, at = _place(R, ROWS, BLOCK)
    one = tl.full([1, 1], 1.0, norm.dtype.element_ty)
    most0, log_sum0 = _plain_norm(z0, rows * C, C, alive, at, one, RESIDENT)
    _keep(norm, rows, alive, most0, log_sum0)
    k = tl.program_id(0).to(tl.int64) * 0
    while k < K:
        row = k * R + rows
        most, log_sum = _plain_norm(z, row * C, C, alive, at, one, RESIDENT)
        _keep(norm, R + row, alive, most, log_sum)
        sums = tl.zeros([ROWS, BLOCK], tl.float64)
        begin = C * 0
        while begin < C:
            here = alive & (begin + at < C)
            log_p = (_fetch(z0, rows * C + begin + at, here) - most0) - log_sum0
            log_q = (_fetch(z, row * C + begin + at, here) - most) - log_sum
            sums += _terms(exp(log_p), log_p, log_q, here)
            begin += BLOCK
        tl.store(divergence + row, tl.sum(sums, 1, keep_dims=True).to(one.dtype), mask=alive)
        k += 1


@triton.jit(do_not_specialize=["K", "R"])
def _kl_bwd_kernel(gz0, gz, g, z0, z, divergence, norm, K, R, C, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows, alive, at = _place(R, ROWS, BLOCK)
    of_g = tl.load(g + rows, mask=alive, other=0.0)
    begin = C * 0
    while begin < C:
        here = alive & (begin + at < C)
        log_p = _log_p(z0, rows * C, begin + at, here, norm, rows, alive)
        p = exp(log_p)
        first = tl.zeros_like(p)
        k = tl.program_id(0).to(tl.int64) * 0
        while k < K:
            row = k * R + rows
            log_q = _log_p(z, row * C, begin + at, here, norm, R + row, alive)
            all_ = tl.load(divergence + row, mask=alive, other=0.0)
            _write(gz, row * C + begin + at, of_g * (exp(log_q) - p), here)
            first = first + _to_first(of_g, p, log_p, log_q, all_)
            k += 1
        _write(gz0, rows * C + begin + at, first, here)
        begin += BLOCK


@triton.jit(do_not_specialize=["R"])
def _norm_kernel(norm, z, R, C, RESIDENT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows, alive, at = _place(R, ROWS, BLOCK)
    one = tl.full([1, 1], 1.0, norm.dtype.element_ty)
    most, log_sum = _plain_norm(z, rows * C, C, alive, at, one, RESIDENT)
    _keep(norm, rows, alive, most, log_sum)


@triton.jit
def _mixture(z0, z, norm, K, R, C, rows, at, here, alive, share):
    """Logarithm of the mean of the K + 1 distributions."""
    total = exp(_log_p(z0, rows * C, at, here, norm, rows, alive))
    k = tl.program_id(0).to(tl.int64) * 0
    while k < K:
        row = k * R + rows
        total = total + exp(_log_p(z, row * C, at, here, norm, R + row, alive))
        k += 1
    return log(total * share)


@triton.jit
def _from_mixture(own, of_own, z0, z, norm, K, R, C, rows, alive, at, share, held, RESIDENT: tl.constexpr):
    """Divergence of the rows `of_own` of `own` from the mixture, whose logarithm is `held` for resident rows."""
    index, of_norm = of_own
    BLOCK: tl.constexpr = at.shape[1]
    sums = tl.zeros(held.shape, tl.float64)
    begin = C * 0
    while begin < C:
        here = alive & (begin + at < C)
        log_m = held
        if not RESIDENT:
            log_m = _mixture(z0, z, norm, K, R, C, rows, begin + at, here, alive, share)
        log_p = _log_p(own, index * C, begin + at, here, norm, of_norm, alive)
        sums += _terms(exp(log_p), log_p, log_m, here)
        begin += BLOCK
    return tl.sum(sums, 1, keep_dims=True).to(held.dtype)


@triton.jit(do_not_specialize=["K", "R", "share_bits"])
def _js_kernel(
    divergence, norm, z0, z, K, R, C, share_bits, RESIDENT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    rows, alive, at = _place(R, ROWS, BLOCK)
    share = double_from_bits(share_bits, norm.dtype.element_ty)
    held = tl.zeros([ROWS, BLOCK], share.dtype)
    if RESIDENT:
        held = _mixture(z0, z, norm, K, R, C, rows, at, alive & (at < C), alive, share)
    first = _from_mixture(z0, (rows, rows), z0, z, norm, K, R, C, rows, alive, at, share, held, RESIDENT)
    tl.store(divergence + rows, first, mask=alive)
    k = tl.program_id(0).to(tl.int64) * 0
    while k < K:
        row = k * R + rows
        found = _from_mixture(z, (row, R + row), z0, z, norm, K, R, C, rows, alive, at, share, held, RESIDENT)
        tl.store(divergence + R + row, found, mask=alive)
        k += 1


@triton.jit(do_not_specialize=["K", "R", "share_bits"])
def _js_bwd_kernel(gz0, gz, g, z0, z, divergence, norm, K, R, C, share_bits, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows, alive, at = _place(R, ROWS, BLOCK)
    share = double_from_bits(share_bits, norm.dtype.element_ty)
    of_g = tl.load(g + rows, mask=alive, other=0.0)
    begin = C * 0
    while begin < C:
        here = alive & (begin + at < C)
        log_m = _mixture(z0, z, norm, K, R, C, rows, begin + at, here, alive, share)
        log_p = _log_p(z0, rows * C, begin + at, here, norm, rows, alive)
        all_ = tl.load(divergence + rows, mask=alive, other=0.0)
        _write(gz0, rows * C + begin + at, _to_first(of_g, exp(log_p), log_p, log_m, all_), here)
        k = tl.program_id(0).to(tl.int64) * 0
        while k < K:
            row = k * R + rows
            log_p = _log_p(z, row * C, begin + at, here, norm, R + row, alive)
            all_ = tl.load(divergence + R + row, mask=alive, other=0.0)
            _write(gz, row * C + begin + at, _to_first(of_g, exp(log_p), log_p, log_m, all_), here)
            k += 1
        begin += BLOCK


@triton.jit
def _labels(y, rows, alive, C):
    """Labels of rows, which of them are classes, and labels that can be used as indices."""
    label = tl.load(y + rows, mask=alive, other=0)
    known = (label >= 0) & (label < C)
    return label, known, tl.where(known, label, 0)


@triton.jit(do_not_specialize=["R", "ignored", "s_bits"])
def _loss_kernel(
    loss, weight, norm, z, y, mult, add, margin, class_weight, R, C, ignored, s_bits, MULT: tl.constexpr,
    ADD: tl.constexpr, MARGIN: tl.constexpr, WEIGHT: tl.constexpr, RESIDENT: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    rows, alive, at = _place(R, ROWS, BLOCK)
    classes = (mult, add, margin, double_from_bits(s_bits, norm.dtype.element_ty))
    label, known, index = _labels(y, rows, alive, C)
    most, log_sum = _norm(z, rows * C, C, alive, at, classes, label, MULT, ADD, MARGIN, RESIDENT)
    _keep(norm, rows, alive, most, log_sum)
    there = alive & (known & (label != ignored))
    of_label = _logit(z, rows * C, index, there, classes, label, MULT, ADD, MARGIN)
    factor = tl.full([ROWS, 1], 1.0, most.dtype)
    if WEIGHT:
        factor = tl.load(class_weight + index, mask=there, other=0.0)
    value = factor * (log_sum - (of_label - most))
    kept = label != ignored
    value = tl.where(kept, tl.where(known, value, float("nan")), 0.0)
    tl.store(loss + rows, value, mask=alive)
    tl.store(weight + rows, tl.where(kept, tl.where(known, factor, float("nan")), 0.0), mask=alive)


@triton.jit(do_not_specialize=["R", "s_bits"])
def _loss_bwd_kernel(
    gz, g, z, y, mult, add, margin, norm, R, C, s_bits, MULT: tl.constexpr, ADD: tl.constexpr, MARGIN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows, alive, at = _place(R, ROWS, BLOCK)
    s = double_from_bits(s_bits, norm.dtype.element_ty)
    classes = (mult, add, margin, s)
    label = tl.load(y + rows, mask=alive, other=0)
    most = tl.load(norm + 2 * rows, mask=alive, other=0.0)
    log_sum = tl.load(norm + 2 * rows + 1, mask=alive, other=0.0)
    of_g = tl.load(g + rows, mask=alive, other=0.0)
    begin = C * 0
    while begin < C:
        here = alive & (begin + at < C)
        a = _logit(z, rows * C, begin + at, here, classes, label, MULT, ADD, MARGIN)
        by_class = of_g * s
        if MULT:
            by_class = of_g * (s * tl.load(mult + begin + at, mask=here, other=0.0))
        own = tl.where(begin + at == label, 1.0, 0.0).to(a.dtype)
        v = by_class * (exp((a - most) - log_sum) - own)
        _write(gz, rows * C + begin + at, tl.where(of_g == 0.0, 0.0, v), here)
        begin += BLOCK


@triton.jit(do_not_specialize=["R", "ignored"])
def _stats_kernel(stats, norm, z, y, R, C, ignored, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows, alive, at = _place(R, ROWS, BLOCK)
    label, known, index = _labels(y, rows, alive, C)
    other = tl.full([ROWS, 1], float("-inf"), norm.dtype.element_ty)
    begin = C * 0
    while begin < C:
        here = alive & (begin + at < C)
        more = _largest(_fetch(z, rows * C + begin + at, here), here & (begin + at != label))
        other = tl.where(more > other, more, other)
        begin += BLOCK
    of_label = tl.where(known, _fetch(z, rows * C + index, alive & known), float("nan"))
    most = tl.where(of_label > other, of_label, other)
    sums = tl.zeros([ROWS, BLOCK], tl.float64)
    begin = C * 0
    while begin < C:
        here = alive & (begin + at < C)
        sums += _below(_fetch(z, rows * C + begin + at, here), most, here)
        begin += BLOCK
    log_sum = log(tl.sum(sums, 1, keep_dims=True).to(most.dtype))
    _keep(norm, rows, alive, most, log_sum)
    p = exp((of_label - most) - log_sum)
    largest = exp(0.0 - log_sum)
    kept = label != ignored
    tl.store(stats + rows, tl.where(kept, log_sum - (of_label - most), 0.0), mask=alive)
    tl.store(stats + R + rows, tl.where(kept, p, 0.0), mask=alive)
    tl.store(stats + 2 * R + rows, tl.where(kept, exp((other - most) - log_sum) - p, 0.0), mask=alive)
    tl.store(stats + 3 * R + rows, 2.0 * (largest * (1.0 - largest)), mask=alive)


@triton.jit
def _moved(a, b, step, base, at, here):
    return _fetch(a, base + at, here) - step * _fetch(b, base + at, here)


@triton.jit(do_not_specialize=["K", "R", "ignored"])
def _scan_kernel(losses, a, b, y, t, K, R, C, ignored, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Losses [K, R]."""
    rows, alive, at = _place(R, ROWS, BLOCK)
    label, known, index = _labels(y, rows, alive, C)
    k = tl.program_id(0).to(tl.int64) * 0
    while k < K:
        step = tl.load(t + k)
        most = tl.full([ROWS, 1], float("-inf"), step.dtype)
        begin = C * 0
        while begin < C:
            here = alive & (begin + at < C)
            more = _largest(_moved(a, b, step, rows * C, begin + at, here), here)
            most = tl.where(more > most, more, most)
            begin += BLOCK
        sums = tl.zeros([ROWS, BLOCK], tl.float64)
        begin = C * 0
        while begin < C:
            here = alive & (begin + at < C)
            sums += _below(_moved(a, b, step, rows * C, begin + at, here), most, here)
            begin += BLOCK
        log_sum = log(tl.sum(sums, 1, keep_dims=True).to(step.dtype))
        of_label = tl.where(known, _moved(a, b, step, rows * C, index, alive & known), float("nan"))
        loss = tl.where(label != ignored, log_sum - (of_label - most), 0.0)
        tl.store(losses + k * R + rows, loss, mask=alive)
        k += 1


def _compute(z: torch.Tensor, *shape: int) -> torch.Tensor:
    return z.new_empty(shape, dtype=torch.float64 if z.dtype == torch.float64 else torch.float32)


def _tiles(z: torch.Tensor, hold: bool) -> tuple[bool, int, int, int]:
    """Whether a program holds its rows, how many they are, elements of a tile's row, and warps. A thread has 2
    elements: more would spill on some architectures."""
    length, halved = z.shape[-1], 2 if z.dtype == torch.float64 else 1
    block = triton.next_power_of_2(max(length, 1))
    resident = hold and block <= _LONGEST // halved
    block = block if resident else min(block, _TILE)
    return resident, max(1, _TILE // halved // block), block, max(4, block * halved // 64)


def _run(kernel, rows: int, like: torch.Tensor, arguments: tuple, hold: bool = True) -> None:
    """Kernels that read a row once do not `hold` it. Tensors that are None are never read."""
    if rows == 0:
        return
    held, tile_rows, block, warps = _tiles(like, hold)
    given = [_launch.raw(a if isinstance(a, torch.Tensor) else like) if not isinstance(a, (int, bool)) else a
             for a in arguments]  # fmt: skip
    with _launch.on_device(like):
        numbers = ((held,) if hold else ()) + (tile_rows, block)
        kernel[(triton.cdiv(rows, tile_rows),)](*given, *numbers, **{**OPTIONS, "num_warps": warps})


def logits_divergence(z0: torch.Tensor, z: torch.Tensor, js: bool) -> tuple[torch.Tensor, torch.Tensor]:
    (k, r, c), z0, z = z.shape, z0.contiguous(), z.contiguous()
    divergence, norm = _compute(z, k + 1 if js else k, r), _compute(z, k + 1, r, 2)
    if js:
        _run(_norm_kernel, r, z0, (norm, z0, r, c))
        _run(_norm_kernel, k * r, z, (norm[1:], z, k * r, c))
        _run(_js_kernel, r, z, (divergence, norm, z0, z, k, r, c, _launch.bits(1.0 / (k + 1))))
    else:
        _run(_kl_kernel, r, z, (divergence, norm, z0, z, k, r, c))
    return divergence, norm


def logits_divergence_bwd(
    g: torch.Tensor, z0: torch.Tensor, z: torch.Tensor, divergence: torch.Tensor, norm: torch.Tensor, js: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    (k, r, c), z0, z = z.shape, z0.contiguous(), z.contiguous()
    gz0, gz = torch.empty_like(z0), torch.empty_like(z)
    tensors = (gz0, gz, g.contiguous(), z0, z, divergence.contiguous(), norm.contiguous())
    if js:
        _run(_js_bwd_kernel, r, z, (*tensors, k, r, c, _launch.bits(1.0 / (k + 1))), hold=False)
    else:
        _run(_kl_bwd_kernel, r, z, (*tensors, k, r, c), hold=False)
    return gz0, gz


def _given(*classes: torch.Tensor | None) -> tuple[list, tuple[bool, ...]]:
    return [None if t is None else t.contiguous() for t in classes], tuple(t is not None for t in classes)


def logits_loss(
    z: torch.Tensor,
    y: torch.Tensor,
    mult: torch.Tensor | None,
    add: torch.Tensor | None,
    margin: torch.Tensor | None,
    class_weight: torch.Tensor | None,
    s: float,
    ignore_index: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (n, c), z = z.shape, z.contiguous()
    loss, weight, norm = _compute(z, n), _compute(z, n), _compute(z, n, 2)
    classes, there = _given(mult, add, margin, class_weight)
    tensors = (loss, weight, norm, z, y.contiguous(), *classes)
    _run(_loss_kernel, n, z, (*tensors, n, c, ignore_index, _launch.bits(s), *there))
    return loss, weight, norm


def logits_loss_bwd(
    g: torch.Tensor,
    z: torch.Tensor,
    y: torch.Tensor,
    mult: torch.Tensor | None,
    add: torch.Tensor | None,
    margin: torch.Tensor | None,
    norm: torch.Tensor,
    s: float,
) -> torch.Tensor:
    (n, c), z = z.shape, z.contiguous()
    gz = torch.empty_like(z)
    classes, there = _given(mult, add, margin)
    tensors = (gz, g.contiguous(), z, y.contiguous(), *classes, norm.contiguous())
    _run(_loss_bwd_kernel, n, z, (*tensors, n, c, _launch.bits(s), *there), hold=False)
    return gz


def logits_stats(z: torch.Tensor, y: torch.Tensor, ignore_index: int) -> tuple[torch.Tensor, torch.Tensor]:
    (n, c), z = z.shape, z.contiguous()
    stats, norm = _compute(z, 4, n), _compute(z, n, 2)
    _run(_stats_kernel, n, z, (stats, norm, z, y.contiguous(), n, c, ignore_index), hold=False)
    return stats, norm


def logits_scan(a: torch.Tensor, b: torch.Tensor, y: torch.Tensor, t: torch.Tensor, ignore_index: int) -> torch.Tensor:
    (n, c), k, b = b.shape, len(t), b.contiguous()
    losses = _compute(b, k, n)
    tensors = (losses, a.contiguous(), b, y.contiguous(), t.contiguous())
    if k:
        _run(_scan_kernel, n, b, (*tensors, k, n, c, ignore_index), hold=False)
    return (losses.double().sum(1) / (y != ignore_index).sum()).to(t.dtype)

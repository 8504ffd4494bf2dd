# SPDX-License-Identifier: Apache-2.0
"""K tangents beside primal values, by the backend in force: tensors of any dense layout as the kernels of the tangents
and row_tangents families want them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastflat.backends import kernels

#: Activations whose derivatives the kernels know, by their number there.
SIGMOID, TANH, SILU, GELU, GELU_TANH = 1, 2, 3, 4, 5


def combine(
    shape: Sequence[int],
    *,
    t0: Tensor | None = None,
    p0: Tensor | None = None,
    t1: Tensor | None = None,
    p1: Tensor | None = None,
    f0: Tensor | None = None,
    r0: Tensor | None = None,
    f1: Tensor | None = None,
    r1: Tensor | None = None,
    shift: Tensor | None = None,
    axis: int | None = None,
    group: int = 0,
    kind: int = 0,
) -> Tensor:
    """``a0 t0[k] + a1 t1[k] + f0 r0[k] + f1 r1[k] + shift[k]`` in one pass, ``[K, *shape]``.

    Args:
        shape: of the value whose tangents these are.
        t0, t1: tangents ``[K, *shape]``.
        p0, p1: the factors a0, a1, each of the value's shape or ``[C]``; with ``kind`` what makes those of an
            activation (:mod:`fastflat._ops.tangents`).
        f0, f1: of the value's shape; r0, r1, shift: ``[K, C]``, their numbers of channels.
        axis, group: what a channel is: an axis, each block of so many along the last axis, or everything.
    """
    view = _View(shape, axis, group, next(t for t in (t0, t1, f0) if t is not None))
    out = kernels(view.device).tangents_combine(
        view.tangents(t0), view.primal(p0), view.tangents(t1), view.primal(p1),
        view.primal(f0), view.numbers(r0), view.primal(f1), view.numbers(r1), view.numbers(shift), None, kind,
    )  # fmt: skip
    return view.back(out)


def product(t: Tensor, factor: Tensor) -> Tensor:
    """K tangents times a primal factor, of their shape or one that broadcasts to it."""
    return combine(factor.shape, t0=t, p0=factor) if factor.shape == t.shape[1:] else t * factor


def sums(
    t: Tensor, p: Tensor | None, total: bool, *, axis: int | None = None, group: int = 0
) -> tuple[Tensor | None, Tensor | None]:
    """``sum t[k] p`` and ``sum t[k]`` over the elements of each channel, ``[K, C]`` in fp32 or fp64; None where not
    asked for."""
    view = _View(t.shape[1:], axis, group, t)
    _, dots, totals = kernels(view.device).tangents_sums(view.tangents(t), view.primal(p), None, None, None, total)
    return None if p is None else dots, totals if total else None


class _View:
    """How the kernels see a tensor: ``[O, C, I]`` in the order in which the tangents lie in memory."""

    def __init__(self, shape: Sequence[int], axis: int | None, group: int, like: Tensor) -> None:
        self.shape, self.dtype, self.device = tuple(shape), like.dtype, like.device.type
        lead = like.dim() - len(self.shape)
        self.order = _order(like, lead) if not group else None
        dims = [self.shape[d] for d in self.order] if self.order else self.shape
        if group:
            self.parts = (1, math.prod(dims) // group, group)
        elif axis is None:
            self.parts = (1, 1, math.prod(dims))
        else:
            axis %= len(self.shape)
            place = self.order.index(axis) if self.order else axis
            self.parts = (math.prod(dims[:place]), dims[place], math.prod(dims[place + 1 :]))

    def _seen(self, t: Tensor, lead: int) -> Tensor:
        if self.order:
            t = t.permute(*range(lead), *(lead + d for d in self.order))
        return t.to(self.dtype).contiguous().view(*t.shape[:lead], *self.parts)

    def tangents(self, t: Tensor | None) -> Tensor | None:
        return None if t is None else self._seen(t, 1)

    def primal(self, p: Tensor | None) -> Tensor | None:
        if p is None or tuple(p.shape) == self.shape:
            return None if p is None else self._seen(p, 0)
        return self.numbers(p[None])[0]

    def numbers(self, r: Tensor | None) -> Tensor | None:
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        return None if r is None else r.reshape(r.shape[0], self.parts[1]).to(wide).contiguous()

    def back(self, out: Tensor) -> Tensor:
        if not self.order:
            return out.view(out.shape[0], *self.shape)
        out = out.view(out.shape[0], *(self.shape[d] for d in self.order))
        return out.permute(0, *(1 + self.order.index(d) for d in range(len(self.order))))


def _order(t: Tensor, lead: int) -> tuple[int, ...] | None:
    """The axes of a value, outermost in memory first, where that is channels-last; None for their own order."""
    if t.is_contiguous() or t.dim() - lead not in (4, 5):
        return None
    order = (0, *range(2, t.dim() - lead), 1)
    last = t.permute(*range(lead), *(lead + d for d in order))
    return order if last.is_contiguous() else None


def norm(
    x: Tensor | None,
    normal: Tensor,
    inv: Tensor,
    weight: Tensor | None,
    along_weight: Tensor | None,
    along_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Layer norm forward: tangents of the result ``[K, R, D]`` and of the saved mean and inverse deviation ``[K, R]``;
    see ``fastflat::row_tangents_norm``."""
    T = next(t for t in (x, along_weight, along_bias) if t is not None).dtype
    of = kernels(normal.device.type).row_tangents_norm
    return of(
        *(_in(t, T) for t in (x, normal)), _wide(inv, T), *(_in(t, T) for t in (weight, along_weight, along_bias)), True
    )


def norm_backward(
    g: Tensor | None,
    x: Tensor | None,
    mean: Tensor | None,
    scale: Tensor | None,
    along_weight: Tensor | None,
    normal: Tensor,
    grad: Tensor,
    inv: Tensor,
    weight: Tensor | None,
) -> Tensor:
    """Layer norm backward: tangents of the gradient by the input; see ``fastflat::row_tangents_norm_bwd``."""
    T = normal.dtype
    tangents = (_in(g, T), _in(x, T), _wide(mean, T), _wide(scale, T), _in(along_weight, T))
    of = kernels(normal.device.type).row_tangents_norm_bwd
    return of(*tangents, _in(normal, T), _in(grad, T), _wide(inv, T), _in(weight, T), True)


def softmax(t: Tensor, p: Tensor, axis: int, scale: Tensor | None = None, log: bool = False) -> Tensor:
    """``s q (t[k] - <q, t[k]>)`` along an axis of the value, q = p or exp(p); s has that axis of size 1."""
    rows, back = _row_view(p, axis)
    of = kernels(p.device.type).row_tangents_softmax
    scale = None if scale is None else _wide(scale.reshape(-1), t.dtype)
    return back(of(rows(t), rows(p.to(t.dtype)), scale, log))


def softmax_backward(g: Tensor | None, along: Tensor | None, p: Tensor, grad: Tensor, axis: int) -> Tensor:
    """Tangents of ``p (grad - <grad, p>)``, g of grad and `along` of p."""
    T = (g if along is None else along).dtype
    rows, back = _row_view(p, axis)
    of = kernels(p.device.type).row_tangents_softmax_bwd
    return back(of(*(None if t is None else rows(t.to(T)) for t in (g, along, p, grad))))


def _row_view(p: Tensor, axis: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """How values like p and their tangents become rows along an axis, and tangents come back."""
    n = max(p.dim(), 1)
    shape, from_end = (p.shape or (1,)), axis % n - n

    def rows(t: Tensor) -> Tensor:
        lead = t.shape[: t.dim() - p.dim()]
        return t.reshape(*lead, *shape).movedim(from_end, -1).reshape(*lead, -1, shape[from_end]).contiguous()

    def back(t: Tensor) -> Tensor:
        moved = [size for d, size in enumerate(shape) if d != axis % n]
        return t.view(t.shape[0], *moved, shape[from_end]).movedim(-1, from_end).reshape(t.shape[0], *p.shape)

    return rows, back


def _in(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype).contiguous()


def _wide(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Numbers of rows in the type of arithmetic."""
    return _in(t, torch.float64 if dtype == torch.float64 else torch.float32)

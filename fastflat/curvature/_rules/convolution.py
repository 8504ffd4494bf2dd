# SPDX-License-Identifier: Apache-2.0
"""Convolutions: six terms, in each of which one operand carries K. K joins the batch or the channels of one call.

Of ``z = conv(x, W)`` with output gradient g, each term is a convolution or one half of its backward::

    forward    conv(x_k, W)   batch K N            conv(x, W_k)    K output channels
    by input   dgrad(g_k, W)  batch K N            dgrad(g, W_k)   K input channels
    by weight  wgrad(g_k, x)  K output channels    wgrad(g, x_k)   K input channels

Results whose channels hold K come as ``[N, K, C, ...]`` and are added where ``[K, N, C, ...]`` is wanted, which
copies whole images and no single elements.

When one call, and when K? Joining the batch never lost (1.0 to 2.7 times a loop, one thread of an AVX-512 CPU, oneDNN).
Joining channels won by 1.0 to 3.4 times up to K weights of a million elements (4 MB) together, and lost by up to 2
times beyond: :data:`_LARGEST`. Groups join the batch only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastflat.curvature._program import Step
from fastflat.curvature._rules._table import PARTIAL, PRIMAL, Call, rule

aten = torch.ops.aten

#: Elements of K weights together up to which K joins the channels.
_LARGEST = 1 << 20


#: Elements of a joined result up to which K are one call: the library's own copies of larger ones take more memory and
#: no less time.
_AT_ONCE = 1 << 21


class Geometry(NamedTuple):
    """Arguments of a convolution that are not tensors."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int

    @property
    def out_axis(self) -> int:
        """The axis of the weight that holds output channels."""
        return 1 if self.transposed else 0

    @property
    def in_axis(self) -> int:
        return 0 if self.transposed else 1


def _joined(w: Tensor, axis: int) -> Tensor:
    """Weights ``[K, a, b, ...]`` with K joined to one of their channel axes: ``[K a, b, ...]`` or ``[a, K b, ...]``."""
    return w.flatten(0, 1) if axis == 0 else w.transpose(0, 1).flatten(1, 2)


def _channels(x: Tensor) -> Tensor:
    """``[K, N, C, ...]`` as ``[N, K C, ...]``."""
    return x.transpose(0, 1).flatten(1, 2)


def _per_k(y: Tensor, k: int) -> Tensor:
    """``[N, K C, ...]`` as a view ``[K, N, C, ...]``."""
    return y.unflatten(1, (k, -1)).transpose(0, 1)


def _plus(out: Tensor | None, term: Tensor) -> Tensor:
    return term if out is None else out.add_(term)


def _each(out: Tensor | None, k: int, make: Callable[[int], Tensor]) -> Tensor:
    """``out_k + make(k)``, one k after another."""
    if out is None:
        return torch.stack([make(i) for i in range(k)])
    for i in range(k):
        out[i].add_(make(i))
    return out


def _in_pieces(out: Tensor | None, k: int, size: int, make: Callable[[slice], Tensor]) -> Tensor:
    """``out + make(slice of K)``, as many K at once as keep what carries them, ``size`` elements each, small."""
    count = -(-k // max(1, min(k, _AT_ONCE // max(size, 1))))
    step = -(-k // count)
    if step >= k:
        return _plus(out, make(slice(0, k)))
    fresh = out is None
    for start in range(0, k, step):
        some = slice(start, min(start + step, k))
        piece = make(some)
        if out is None:
            out = piece.new_empty(k, *piece.shape[1:])
        (out[some].copy_ if fresh else out[some].add_)(piece)
    return out


def _joins(k: int, weight: torch.Size, shape: Geometry) -> bool:
    """Whether K joins the channels of one call."""
    return shape.groups == 1 and k * weight.numel() <= _LARGEST


def _input_gradient(g: Tensor, w: Tensor, shape: Geometry, space: Sequence[int]) -> Tensor:
    """dgrad(g, w) as a convolution itself: convolution_backward copies an input of which it needs the shape alone."""
    if shape.transposed:
        return aten.convolution(g, w, None, *shape[:3], False, [0] * len(space), shape.groups)
    axes = zip(space, g.shape[2:], w.shape[2:], *shape[:3], strict=True)
    rest = [size - ((n - 1) * stride - 2 * pad + apart * (k - 1) + 1) for size, n, k, stride, pad, apart in axes]
    return aten.convolution(g, w, None, *shape[:3], True, rest, shape.groups)


def _weight_gradient(g: Tensor, x: Tensor, w: Tensor, shape: Geometry) -> Tensor:
    return aten.convolution_backward(g, x, w, None, *shape, [False, True, False])[1]


def _shaped_as(x: Tensor, *shape: int) -> Tensor:
    """A stand-in for a tensor of which only the shape is read."""
    return x.new_empty(1).expand(*shape)


@rule(aten.convolution.default)
def convolution(c: Call):
    x, w, b = c.tangents()[:3]
    shape = Geometry(*(c.primal(i) for i in range(3, 9)))
    k, out = c.k, None
    if x is not None:
        out = aten.convolution(x.flatten(0, 1), c.operand(1), None, *shape).unflatten(0, (k, -1))
    if w is not None:
        a = c.operand(0)
        if _joins(k, w.shape[1:], shape):

            def joined(some: slice) -> Tensor:
                bias = None if b is None else b[some].flatten()
                y = aten.convolution(a, _joined(w[some], shape.out_axis), bias, *shape)
                return _per_k(y, some.stop - some.start)

            return _in_pieces(out, k, c.out_shape.numel(), joined)
        out = _each(out, k, lambda i: aten.convolution(a, w[i], None, *shape))
    if b is not None:
        b = b.reshape(k, 1, -1, *(1,) * (len(c.out_shape) - 2))
        out = b.expand(k, *c.out_shape) if out is None else out.add_(b)
    return out


@rule(aten.convolution_backward.default)
def convolution_backward(c: Call):
    g, x, w = c.tangents()[:3]
    shape = Geometry(*(c.primal(i) for i in range(4, 10)))
    # The small result first: the copies that it takes are gone when the large one comes.
    by_weight = _by_weight(c, g, x, shape) if 1 in c.wanted else None
    by_input = _by_input(c, g, w, shape) if 0 in c.wanted else None
    by_bias = None
    if g is not None and 2 in c.wanted:
        by_bias = g.sum([d for d in range(1, g.dim()) if d != 2])
    return by_input, by_weight, by_bias


def _by_input(c: Call, g: Tensor | None, w: Tensor | None, shape: Geometry) -> Tensor | None:
    k, (n, _, *space) = c.k, c.shape(1)
    out = None
    if g is not None:
        weight = c.operand(2)

        def as_rows(some: slice) -> Tensor:
            return _input_gradient(g[some].flatten(0, 1), weight, shape, space).unflatten(0, (-1, n))

        out = _in_pieces(None, k, c.shape(1).numel(), as_rows)
    if w is not None:
        grad = c.operand(0)
        if _joins(k, w.shape[1:], shape):

            def joined(some: slice) -> Tensor:
                found = _input_gradient(grad, _joined(w[some], shape.in_axis), shape, space)
                return _per_k(found, some.stop - some.start)

            return _in_pieces(out, k, c.shape(1).numel(), joined)
        out = _each(out, k, lambda i: _input_gradient(grad, w[i], shape, space))
    return out


def _by_weight(c: Call, g: Tensor | None, x: Tensor | None, shape: Geometry) -> Tensor | None:
    weight = c.shape(2)
    out = None
    if g is not None:
        out = _weight_term(out, g, c.operand(1), weight, shape, shape.out_axis, lambda g_k, x: (g_k, x))
    if x is not None:
        out = _weight_term(out, x, c.operand(0), weight, shape, shape.in_axis, lambda x_k, g: (g, x_k))
    return out


def _weight_term(
    out: Tensor | None,
    moving: Tensor,
    fixed: Tensor,
    weight: torch.Size,
    shape: Geometry,
    axis: int,
    order: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> Tensor:
    """``out + wgrad`` of K tangents and one fixed operand; ``order`` puts the two as (output gradient, input)."""
    k = len(moving)
    if _joins(k, weight, shape):

        def joined(some: slice) -> Tensor:
            wide, count = [*weight], some.stop - some.start
            wide[axis] *= count
            y = _weight_gradient(*order(_channels(moving[some]), fixed), _shaped_as(fixed, *wide), shape)
            return y.unflatten(axis, (count, -1)).movedim(axis, 0)

        return _in_pieces(out, k, moving[0].numel(), joined)
    like = _shaped_as(fixed, *weight)
    return _each(out, k, lambda i: _weight_gradient(*order(moving[i], fixed), like, shape))


def _what_is_read(step: Step, value: Callable[[int], Any], read: set[int]) -> Any:
    """A backward pass without the gradients that nobody looks at: mostly those by weights, half of its arithmetic."""
    mask = [wanted and i in read for i, wanted in enumerate(step.args[10])]
    return step._replace(args=(*step.args[:10], mask, *step.args[11:])).run(value)


PRIMAL[aten.convolution_backward.default] = _what_is_read
PARTIAL.add(aten.convolution_backward.default)

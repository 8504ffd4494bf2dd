# SPDX-License-Identifier: Apache-2.0
"""Second derivatives of single ops along their tangents, ``D^2 f [x_k, x_k]``, summed within groups of tangents.

What a rule gives is the part that first-order tangents make; the second-order tangents of the arguments go through the
op like any tangent. With c = z - <p, z> for the tangent z of scores::

    a b             2 a_k b_k                       one product whose inner axis holds a whole group
    phi(x)          phi''(x) x_k^2
    softmax         p (c_k^2 - <p, c_k^2>)          log-softmax    -<p, c_k^2>
    normalisation   x^ = u i, u = x - m: with s_k = mean x^ u_k i and q_k = mean u_k^2 i^2,
                    x^'' = x^ (3 s_k^2 - q_k) - 2 u_k i s_k

Source: Griewank and Walther, Evaluating Derivatives, 2008, chapter 13; Dangel et al., Collapsing Taylor Mode Automatic
Differentiation, 2025, for the sum within the pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastflat.curvature._program import Untraceable
from fastflat.curvature._rules._linear import LINEAR
from fastflat.curvature._rules._table import Call, aligned
from fastflat.curvature._rules.batch_norm import _channel, normal_of_batch
from fastflat.curvature._rules.convolution import Geometry, _channels, _joined, _joins
from fastflat.curvature._rules.elementwise import _DIFFERENTIABLE
from fastflat.curvature._rules.reduction import reduced, weighted
from fastflat.curvature._rules.row_norm import Rows, _group_rows, _layer_rows, row_normal

aten, ops = torch.ops.aten, torch.ops.fastflat

#: Rule of each op: a function of the call and of the number of groups, which returns ``[G, *shape]``, a tuple for an op
#: with several results, or None for zero.
SECOND: dict[Callable, Callable[[Call, int], Any]] = {}

#: Linear besides those of :data:`LINEAR`, in programs that hold the loss too.
_LINEAR = LINEAR | {
    *(aten.unsafe_split.Tensor, aten.copy.default, aten.lift_fresh.default, aten.cumsum.default),
    *(aten.tril.default, aten.triu.default, aten.diagonal.default, aten.unfold.default, aten.im2col.default),
    *(aten.col2im.default, aten.scatter_add.default, aten.index_add.default, aten.rsub.Tensor, aten.rsub.Scalar),
    *(aten.threshold.default, aten.amin.default, aten.avg_pool3d.default, aten._adaptive_avg_pool3d.default),
    *(aten.replication_pad2d.default, aten.pixel_shuffle.default, aten.pixel_unshuffle.default),
    *(aten.nll_loss_forward.default, aten.nll_loss2d_forward.default, ops.general_quantize_dynamic.default),
}


def second(*targets: Callable) -> Callable:
    """Enter a function as the second-order rule of these ops."""

    def enter(function):
        for op in targets:
            SECOND[op] = function
        return function

    return enter


def bend(c: Call, groups: int) -> Any:
    """``sum_k D^2 f [x_k, x_k]`` within groups of equally many tangents, each ``[G, *shape]``; None for zero.

    Raises:
        Untraceable: the op has no second derivative that could be had.
    """
    if c.op in _LINEAR:
        return None
    found = SECOND.get(c.op)
    if found is not None:
        return found(c, groups)
    if getattr(c.op, "namespace", "") == "fastflat":
        raise Untraceable(f"{c.op} has no second derivative")
    return _by_autodiff(c, groups)


def _sum(t: Tensor, groups: int) -> Tensor:
    """``[K, ...]`` summed within groups, ``[G, ...]``."""
    return t.unflatten(0, (groups, -1)).sum(1)


def _of_products(a: Tensor, b: Tensor, groups: int) -> Tensor:
    """``2 sum_k a_k b_k`` for matrices ``[K, n, m]`` and ``[K, m, p]``: the inner axis holds a group."""
    size = len(a) // groups
    left = a.unflatten(0, (groups, size)).movedim(1, 2).flatten(2)
    return torch.bmm(left, b.reshape(groups, size * b.shape[1], b.shape[2])).mul_(2)


@second(aten.mm.default)
def mm(c: Call, groups: int):
    a, b = c.tangent(0), c.tangent(1)
    return None if a is None or b is None else _of_products(a, b, groups)


@second(aten.addmm.default)
def addmm(c: Call, groups: int):
    a, b = c.tangent(1), c.tangent(2)
    return None if a is None or b is None else _of_products(a, b, groups).mul_(c.primal(4))


@second(aten.bmm.default)
def bmm(c: Call, groups: int):
    a, b = c.tangent(0), c.tangent(1)
    return None if a is None or b is None else _sum(torch.matmul(a, b), groups).mul_(2)


@second(aten.baddbmm.default)
def baddbmm(c: Call, groups: int):
    a, b = c.tangent(1), c.tangent(2)
    return None if a is None or b is None else _sum(torch.matmul(a, b), groups).mul_(2 * c.primal(4))


@second(aten.dot.default)
def dot(c: Call, groups: int):
    a, b = c.tangent(0), c.tangent(1)
    return None if a is None or b is None else _sum((a * b).sum(1), groups).mul_(2)


@second(aten.mv.default)
def mv(c: Call, groups: int):
    a, b = c.tangent(0), c.tangent(1)
    return None if a is None or b is None else _sum((a @ b.unsqueeze(2)).squeeze(2), groups).mul_(2)


@second(aten.mul.Tensor)
def mul(c: Call, groups: int):
    a, b = c.tangent(0), c.tangent(1)
    if a is None or b is None:
        return None
    n = len(c.out_shape)
    return _sum(aligned(a, n) * aligned(b, n), groups).mul_(2)


@second(aten.div.Tensor)
def div(c: Call, groups: int):
    # y = a / b: y'' = -2 b_k (a_k - y b_k) / b^2
    b = c.tangent(1)
    if b is None:
        return None
    n = len(c.out_shape)
    a, b = c.tangent(0), aligned(b, n)
    moved = -c.out * b if a is None else aligned(a, n) - c.out * b
    return _sum(moved * b, groups).mul_(-2 / (c.primal(1) * c.primal(1)))


@second(aten.convolution.default)
def convolution(c: Call, groups: int):
    x, w = c.tangent(0), c.tangent(1)
    if x is None or w is None:
        return None
    shape = Geometry(*(c.primal(i) for i in range(3, 9)))
    size = c.k // groups
    found = []
    for x_g, w_g in zip(x.split(size), w.split(size), strict=True):
        if _joins(size, w.shape[1:], shape):
            found.append(aten.convolution(_channels(x_g), _joined(w_g, shape.in_axis), None, *shape))
        else:
            found.append(sum(aten.convolution(x_k, w_k, None, *shape) for x_k, w_k in zip(x_g, w_g, strict=True)))
    return torch.stack(found).mul_(2)


def _second_derivative(c: Call, index: int) -> Tensor:
    """``d^2 f / dx^2`` of an element-wise op by one argument."""
    values = [c.primal(i) for i in range(len(c.step.args))]
    x = values[index].detach().requires_grad_()
    values[index] = x
    cut = len(values) - len(c.step.keywords)
    with torch.enable_grad():
        y = _DIFFERENTIABLE.get(c.op, c.op)(*values[:cut], **dict(zip(c.step.keywords, values[cut:], strict=True)))
        (first,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
        if not first.requires_grad:
            return torch.zeros_like(x).detach()
        (found,) = torch.autograd.grad(first, x, torch.ones_like(first), allow_unused=True)
    return torch.zeros_like(x).detach() if found is None else found.detach()


def _silu(c: Call) -> Tensor:
    x = c.primal(0)
    s = torch.sigmoid(x)
    return s * (1 - s) * (2 + x * (1 - 2 * s))


def _mish(c: Call) -> Tensor:
    # x tanh(softplus x): with t = tanh(softplus x), t' = s (1 - t^2), t'' = s (1 - t^2) (1 - s - 2 s t).
    x = c.primal(0)
    t, s = torch.tanh(torch.nn.functional.softplus(x)), torch.sigmoid(x)
    slope = s * (1 - t * t)
    return 2 * slope + x * slope * (1 - s - 2 * s * t)


_BY_HAND = {aten.silu.default: _silu, aten.mish.default: _mish}


@second(
    *(aten.gelu.default, aten.silu.default, aten.sigmoid.default, aten.tanh.default, aten.mish.default),
    *(aten.elu.default, aten.celu.default, aten.hardswish.default, aten.hardsigmoid.default, aten.softplus.default),
    *(aten.exp.default, aten.exp2.default, aten.expm1.default, aten.log.default, aten.log1p.default, aten.log2.default),
    *(aten.sqrt.default, aten.rsqrt.default, aten.reciprocal.default, aten.square.default, aten.log10.default),
    *(aten.sin.default, aten.cos.default, aten.tan.default, aten.atan.default, aten.erf.default, aten.erfc.default),
    *(aten.sinh.default, aten.cosh.default, aten.asin.default, aten.acos.default, aten.pow.Tensor_Scalar),
)
def elementwise(c: Call, groups: int):
    x = c.tangent(0)
    make = _BY_HAND.get(c.op)
    return _sum(x * x, groups).mul_(c.once("second", lambda: make(c) if make else _second_derivative(c, 0)))


@second(aten._softmax.default, aten._safe_softmax.default)
def softmax(c: Call, groups: int):
    p, squares = _squares(c, lambda: c.out, groups)
    return (squares - (squares * p).sum(_axis(c), True)).mul_(p)


@second(aten._log_softmax.default)
def log_softmax(c: Call, groups: int):
    p, squares = _squares(c, lambda: c.out.exp(), groups)
    return -(squares * p).sum(_axis(c), True).expand(groups, *c.out_shape)


def _axis(c: Call) -> int:
    return c.primal(1) % max(len(c.out_shape), 1) + 1


def _squares(c: Call, make: Callable[[], Tensor], groups: int) -> tuple[Tensor, Tensor]:
    """p, and ``sum_k (z_k - <p, z_k>)^2``."""
    z, p = c.tangent(0), c.once("p", make)
    z = z - (z * p).sum(_axis(c), True)
    return p, _sum(z.mul_(z), groups)


@second(aten.logsumexp.default)
def logsumexp(c: Call, groups: int):
    x, dims, keep = c.tangent(0), c.primal(1), c.primal(2)
    axes = [d % x[0].dim() + 1 for d in ([dims] if isinstance(dims, int) else dims)]
    p = c.once("p", lambda: (c.primal(0) - c.primal(0).logsumexp(dims, True)).exp())
    x = x - (x * p).sum(axes, True)
    return (_sum(x.mul_(x), groups) * p).sum(axes, keep)


@second(aten.mse_loss.default)
def mse(c: Call, groups: int):
    x, t, reduction = c.tangent(0), c.tangent(1), c.primal(2)
    x = x if t is None else -t if x is None else x - t
    return reduced(_sum(x * x, groups).mul_(2), reduction)


@second(aten.binary_cross_entropy_with_logits.default)
def logits(c: Call, groups: int):
    if c.moves(1):
        return _by_autodiff(c, groups)
    x = c.tangent(0)
    bend = c.once("bend", lambda: weighted(c, lambda s, t, v: s * (1 - s) * (1 + (v - 1) * t)))
    return reduced(_sum(x * x, groups) * bend, c.primal(4))


def _normal_bend(u: Tensor, normal: Tensor, inv: Tensor, over: list[int], groups: int) -> tuple[Tensor, Tensor]:
    """The tangents of x^ and the sum of its second derivatives, from the centred tangents u of x."""
    u = u * inv
    s = (u * normal).mean(over, True)
    q = (u * u).mean(over, True)
    bent = normal * _sum(3 * s * s - q, groups) - _sum(u * s, groups).mul_(2)
    return u.addcmul_(normal, s, value=-1), bent


@second(aten.native_batch_norm.default)
def batch_norm(c: Call, groups: int):
    x, w = c.tangent(0), c.tangent(1)
    training, shape = c.primal(5), c.out_shape[0]
    n, weight = len(shape), c.primal(1)
    if x is None or (w is None and not training):
        return None
    normal, inv = normal_of_batch(c)
    normal, inv, bent = normal(), _channel(inv, n), None
    if training:
        over = [d for d in range(1, n + 1) if d != 2]
        moved, bent = _normal_bend(x - x.mean(over, True), normal, inv, over, groups)
        bent = bent if weight is None else bent.mul_(_channel(weight, n))
    else:
        moved = x * inv
    if w is not None:
        both = _sum(moved * _channel(w, n), groups).mul_(2)
        bent = both if bent is None else bent.add_(both)
    return bent, None, None


@second(aten.native_layer_norm.default)
def layer_norm(c: Call, groups: int):
    return _rows_bend(c, _layer_rows(c.out_shape[0], c.primal(1)), 2, groups)


@second(aten.native_group_norm.default)
def group_norm(c: Call, groups: int):
    return _rows_bend(c, _group_rows(c.out_shape[0], c.primal(6)), 1, groups)


def _rows_bend(c: Call, rows: Rows, weight: int, groups: int):
    x, w = rows.see_k(c.tangent(0)), rows.weight_k(c.tangent(weight))
    if x is None:
        return None
    normal, inv = row_normal(c, rows, 0, c.out[1], c.out[2], (c.place(1), c.place(2)))
    over = [d + 1 for d in rows.over]
    moved, bent = _normal_bend(x - x.mean(over, True), normal, inv, over, groups)
    if c.primal(weight) is not None:
        bent.mul_(c.primal(weight).reshape(rows.weight))
    if w is not None:
        bent.add_(_sum(moved * w, groups), alpha=2)
    return bent.reshape(groups, *c.out_shape[0]), None, None


@second(ops.fake_quantize.default, ops.general_quantize.default)
def quantize(c: Call, groups: int):
    # Linear in (x, s, z) with the residual frozen, but for what a zero-point does together with its scale.
    if c.moves(1) and c.moves(2):
        raise Untraceable("a scale and a zero-point that both move have a second derivative of their own")


def _by_autodiff(c: Call, groups: int):
    """Forward-mode AD of the op's own forward-mode AD, all K by vmap."""
    if torch.Tag.nondeterministic_seeded in getattr(c.op, "tags", ()):
        raise Untraceable(f"{c.op} draws random numbers")
    values = [c.primal(i) for i in range(len(c.step.args))]
    moving = {i: c.tangent(i) for i in range(len(values)) if c.moves(i)}
    if not moving:
        raise Untraceable(f"{c.op} has no second derivative")
    primals = tuple(values[i] for i in moving)

    def function(*replaced):
        args = list(values)
        for i, value in zip(moving, replaced, strict=True):
            args[i] = value
        cut = len(args) - len(c.step.keywords)
        return c.op(*args[:cut], **dict(zip(c.step.keywords, args[cut:], strict=True)))

    def twice(*along):
        def once(*at):
            return torch.func.jvp(function, at, along)[1]

        return torch.func.jvp(once, primals, along)[1]

    along = tuple(t.to(p.dtype) for t, p in zip(moving.values(), primals, strict=True))
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.func.vmap(twice)(*along)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise Untraceable(f"{c.op} has no second derivative") from error
    if isinstance(found, tuple):
        return tuple(_sum(t, groups) if t.is_floating_point() else None for t in found)
    return _sum(found, groups)

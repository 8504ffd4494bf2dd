# SPDX-License-Identifier: Apache-2.0
"""Derivatives by the written rule: the frozen-residual surrogate in plain PyTorch is the oracle of every mode.

Freezing the mask m, the rounding residual and the saturated codes makes the quantizer a polynomial in (x, s, z), which
PyTorch differentiates natively to any order; finite differences of the quantizer itself would see steps.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import fastflat as ff

REVERSE = [
    ff.QuantSpec.lsq(3),
    ff.QuantSpec.lsq(3, axis=0),
    ff.QuantSpec.lsq(3, axis=-1),
    ff.QuantSpec.lsq(4, group=2, signed=False),
    ff.QuantSpec.lsq(3, axis=1, symmetric=False),
    ff.QuantSpec.lsq(3, axis=1, symmetric=False, zero="float"),
    ff.QuantSpec.lsq(3, symmetric=False, zero="inside", mask="after", grad_scale=0.7),
    ff.QuantSpec.lsq(2, mask="none", grad_scale="lsq_channel", arithmetic="reciprocal"),
    ff.QuantSpec.torch(3, axis=0, estimator="lsq"),
]
every_spec = pytest.mark.parametrize("spec", REVERSE, ids=lambda s: f"{s.axis}-{s.group}-{s.zero}-{s.mask}")


pytestmark = pytest.mark.usefixtures("on_backend")


def example(spec, seed=0, dtype=torch.float64, shape=(3, 4, 6)):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=dtype)
    if spec.group:
        parameters = (*shape[:-1], shape[-1] // spec.group)
    else:
        parameters = () if spec.axis is None else (shape[spec.axis],)
    scale = torch.rand(parameters, generator=generator, dtype=dtype) * 0.3 + 0.2
    zero_point = None if spec.symmetric else torch.randn(parameters, generator=generator, dtype=dtype)
    return [x, scale] if zero_point is None else [x, scale, zero_point]


def surrogate(spec, x0, s0, z0=None):
    """The frozen form at (x0, s0, z0), as a function of (x, s, z) in native operations."""

    def spread(p: Tensor, like: Tensor) -> Tensor:
        if spec.group:
            return p.repeat_interleave(spec.group, -1)
        if spec.axis is None:
            return p
        return p.view([-1 if d == spec.axis % like.dim() else 1 for d in range(like.dim())])

    def reparametrised(p, p0):
        # A gradient factor f on p is the polynomial p0 + f (p - p0).
        return p0 + factor * (p - p0)

    factor = spec.grad_factor(x0.numel(), max(s0.numel(), 1))
    s, z = spread(s0, x0), 0.0 if z0 is None else spread(z0, x0)
    zr = z if z0 is None or spec.zero == "float" else torch.round(z).clamp(spec.qmin, spec.qmax)
    u = x0 * (1 / s) if spec.arithmetic == "reciprocal" else x0 / s
    r = torch.round(u) + zr if spec.zero == "outside" else torch.round(u + zr)
    q = r.clamp(spec.qmin, spec.qmax)
    tested = r if spec.mask == "after" else u + zr
    m = (tested >= spec.qmin) & (tested <= spec.qmax) if spec.mask != "none" else torch.ones_like(r, dtype=torch.bool)
    residual = ((q - zr) - u).detach()

    def frozen(x, s, z=None):
        s = spread(reparametrised(s, s0), x0)
        # Saturated elements: (q - z) s, with z entering through its offset from the frozen point.
        dz = 0.0 if z is None else spread(reparametrised(z, z0), x0) - spread(z0, x0)
        return torch.where(m, x + residual * s, (q - zr - dz) * s)

    return frozen


def quantizer(spec):
    return lambda x, s, z=None: ff.fake_quantize(x, s, z, spec=spec)


def loss_of(f):
    return lambda *args: (f(*args) ** 3).sum() + f(*args).sin().sum()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@every_spec
def test_value_and_gradients(spec):
    args = example(spec)
    frozen = surrogate(spec, *args)
    close(quantizer(spec)(*args), frozen(*args))
    leaves = [a.clone().requires_grad_() for a in args]
    actual = torch.autograd.grad(loss_of(quantizer(spec))(*leaves), leaves)
    expected = torch.autograd.grad(loss_of(frozen)(*leaves), leaves)
    close(actual, expected)


@every_spec
def test_double_and_triple_backward(spec):
    args = example(spec)
    leaves = [a.clone().requires_grad_() for a in args]
    results = []
    for f in (quantizer(spec), surrogate(spec, *args)):
        first = torch.autograd.grad(loss_of(f)(*leaves), leaves, create_graph=True)
        second = torch.autograd.grad(sum((g * g).sum() for g in first), leaves, create_graph=True)
        third = torch.autograd.grad(sum((g * g).sum() for g in second), leaves)
        results.append((*first, *second, *third))
    close(*results)


@every_spec
def test_forward_mode(spec):
    args = example(spec)
    tangents = example(spec, seed=1)
    frozen = surrogate(spec, *args)
    close(
        torch.func.jvp(quantizer(spec), tuple(args), tuple(tangents)),
        torch.func.jvp(frozen, tuple(args), tuple(tangents)),
    )
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(a, t) for a, t in zip(args, tangents)]
        y = torch.autograd.forward_ad.unpack_dual(quantizer(spec)(*duals))
    close(y.tangent, torch.func.jvp(frozen, tuple(args), tuple(tangents))[1])


@every_spec
def test_each_tangent_alone(spec):
    args, tangents = example(spec), example(spec, seed=1)
    frozen = surrogate(spec, *args)
    for k in range(len(args)):

        def only(v, f, k=k):
            return f(*args[:k], v, *args[k + 1 :])

        actual = torch.func.jvp(lambda v: only(v, quantizer(spec)), (args[k],), (tangents[k],))
        close(actual, torch.func.jvp(lambda v: only(v, frozen), (args[k],), (tangents[k],)))


@every_spec
def test_tangent_is_the_transpose_of_the_gradient(spec):
    args, tangents = tuple(example(spec)), tuple(example(spec, seed=1))
    _, ty = torch.func.jvp(quantizer(spec), args, tangents)
    y, pullback = torch.func.vjp(quantizer(spec), *args)
    g = torch.randn_like(y)
    close((g * ty).sum(), sum((a * b).sum() for a, b in zip(pullback(g), tangents)))


@every_spec
def test_hessian_is_that_of_the_frozen_form_and_symmetric(spec):
    args = example(spec, shape=(2, 2, 4))
    everything = tuple(range(len(args)))
    actual = torch.func.hessian(loss_of(quantizer(spec)), argnums=everything)(*args)
    expected = torch.func.hessian(loss_of(surrogate(spec, *args)), argnums=everything)(*args)
    close(actual, expected)
    for i, j in itertools.product(everything, everything):
        a = actual[i][j].reshape(args[i].numel(), args[j].numel())
        close(a, actual[j][i].reshape(args[j].numel(), args[i].numel()).T)


@every_spec
def test_products_of_jvp_and_grad_in_every_nesting(spec):
    args, v = tuple(example(spec)), tuple(example(spec, seed=2))
    everything = tuple(range(len(args)))
    results = []
    for f in (quantizer(spec), surrogate(spec, *args)):
        gradient = torch.func.grad(loss_of(f), argnums=everything)
        forward_over_reverse = torch.func.jvp(gradient, args, v)[1]
        reverse_over_reverse = torch.func.vjp(gradient, *args)[1](v)
        reverse_over_forward = torch.func.grad(lambda *a: torch.func.jvp(loss_of(f), a, v)[1], argnums=everything)(
            *args
        )
        forward_over_forward = torch.func.jvp(lambda *a: torch.func.jvp(loss_of(f), a, v)[1], args, v)[1]
        linear = torch.func.linearize(gradient, *args)[1](*v)
        close(linear, forward_over_reverse)
        results.append((forward_over_reverse, reverse_over_reverse, reverse_over_forward, forward_over_forward))
    close(*results)


@every_spec
def test_vmap(spec):
    f, batch = quantizer(spec), 5
    samples = [example(spec, seed=k) for k in range(batch)]
    stacked = [torch.stack(p) for p in zip(*samples)]
    n = len(stacked)
    for in_dims in itertools.product((0, None), repeat=n):
        if all(d is None for d in in_dims):
            continue
        args = [p if d == 0 else p[0] for p, d in zip(stacked, in_dims)]
        one = [[p[k] if d == 0 else p[0] for p, d in zip(stacked, in_dims)] for k in range(batch)]
        close(torch.func.vmap(f, in_dims)(*args), torch.stack([f(*a) for a in one]))
        everything = tuple(range(n))
        gradient = torch.func.grad(loss_of(f), argnums=everything)
        actual = torch.func.vmap(gradient, in_dims)(*args)
        close(actual, tuple(torch.stack(g) for g in zip(*(gradient(*a) for a in one))))
        product = lambda *a, gradient=gradient: torch.func.jvp(gradient, a, a)[1]  # noqa: E731
        close(torch.func.vmap(product, in_dims)(*args), tuple(torch.stack(g) for g in zip(*(product(*a) for a in one))))
    # Batch axes in other places, two levels deep.
    moved = [p.movedim(0, -1) for p in stacked]
    close(torch.func.vmap(f, -1, -1)(*moved), torch.func.vmap(f)(*stacked).movedim(0, -1))
    twice = [torch.stack([p, p.flip(0)]) for p in stacked]
    close(torch.func.vmap(torch.func.vmap(f))(*twice)[1], torch.func.vmap(f)(*stacked).flip(0))


@every_spec
def test_many_products_at_once(spec):
    """vmap over tangents of jvp of grad: K Hessian-vector products of one point."""
    args = tuple(example(spec))
    tangents = [tuple(example(spec, seed=k)) for k in range(4)]
    gradient = torch.func.grad(loss_of(quantizer(spec)), argnums=tuple(range(len(args))))
    product = lambda *v: torch.func.jvp(gradient, args, v)[1]  # noqa: E731
    actual = torch.func.vmap(product)(*(torch.stack(t) for t in zip(*tangents)))
    close(actual, tuple(torch.stack(p) for p in zip(*(product(*v) for v in tangents))))


@every_spec
def test_batched_cotangents(spec):
    leaves = [a.requires_grad_() for a in example(spec)]
    y = quantizer(spec)(*leaves)
    cotangents = torch.randn(4, *y.shape, dtype=y.dtype)
    expected = [torch.autograd.grad(y, leaves, g, retain_graph=True) for g in cotangents]
    actual = torch.autograd.grad(y, leaves, cotangents, is_grads_batched=True, retain_graph=True)
    close(actual, tuple(torch.stack(g) for g in zip(*expected)))


@every_spec
def test_checked_by_torch_inside_the_frozen_form(spec):
    """gradcheck of the surrogate proves the oracle itself against finite differences."""
    args = example(spec, shape=(2, 2, 4))
    frozen = surrogate(spec, *args)
    leaves = [a.clone().requires_grad_() for a in args]
    assert torch.autograd.gradcheck(frozen, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(frozen, leaves)


@pytest.mark.parametrize("spec", [ff.QuantSpec(3), ff.QuantSpec(3, axis=1), ff.QuantSpec.torch(3, group=3)], ids=str)
def test_constant_scale(spec):
    x, *parameters = example(spec)
    leaf = x.clone().requires_grad_()
    y = ff.fake_quantize(leaf, *parameters, spec=spec)
    g = torch.randn_like(y)
    (gx,) = torch.autograd.grad(y, leaf, g, create_graph=True)
    frozen = surrogate(spec, x, *parameters)
    close(gx, torch.func.vjp(lambda v: frozen(v, *parameters), x)[1](g)[0])
    close(torch.func.jvp(lambda v: ff.fake_quantize(v, *parameters, spec=spec), (x,), (g,))[1], gx)
    with pytest.raises(ValueError, match="scale and zero_point must need no gradient with estimator='ste'"):
        ff.fake_quantize(x, parameters[0].clone().requires_grad_(), *parameters[1:], spec=spec)
    with pytest.raises(ValueError, match="scale and zero_point must carry no tangent"):
        torch.func.jvp(lambda s: ff.fake_quantize(x, s, *parameters[1:], spec=spec), (parameters[0],), (parameters[0],))


@pytest.mark.parametrize(
    "spec", [ff.QuantSpec(3), ff.QuantSpec(3, axis=1), ff.QuantSpec(3, group=3, signed=False)], ids=str
)
def test_dynamic_scale(spec):
    (x, _), v = example(spec), example(spec, seed=3)[0]
    y, scale = ff.fake_quantize_dynamic(x, spec=spec)
    close(y, ff.fake_quantize(x, scale, spec=spec))
    frozen = surrogate(spec, x, scale)
    expected = torch.func.vjp(lambda u: frozen(u, scale), x)[1](v)[0]
    leaf = x.clone().requires_grad_()
    out, s = ff.fake_quantize_dynamic(leaf, spec=spec)
    assert not s.requires_grad
    (gx,) = torch.autograd.grad(out, leaf, v, create_graph=True)
    close(gx, expected)
    values = lambda u: ff.fake_quantize_dynamic(u, spec=spec)[0]  # noqa: E731
    close(torch.func.jvp(values, (x,), (v,))[1], expected)
    cubic = lambda u: (values(u) ** 3).sum()  # noqa: E731
    hessian = torch.func.hessian(cubic)(x).reshape(x.numel(), -1)
    close(hessian, torch.func.hessian(lambda u: (frozen(u, scale) ** 3).sum())(x).reshape(x.numel(), -1))
    batch = torch.stack([x, v])
    for actual, *parts in zip(
        torch.func.vmap(lambda u: ff.fake_quantize_dynamic(u, spec=spec))(batch),
        ff.fake_quantize_dynamic(x, spec=spec),
        ff.fake_quantize_dynamic(v, spec=spec),
    ):
        close(actual, torch.stack(parts))


def test_16_bit_data_keeps_the_dtypes_of_its_gradients():
    spec = ff.QuantSpec.lsq(4, axis=0)
    x = torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True)
    for dtype in (torch.float32, torch.bfloat16):
        scale = torch.full((4,), 0.25, dtype=dtype, requires_grad=True)
        y = ff.fake_quantize(x, scale, spec=spec)
        assert y.dtype == torch.bfloat16
        gx, gs = torch.autograd.grad(y.sum(), (x, scale))
        assert (gx.dtype, gs.dtype) == (torch.bfloat16, dtype)
    wide = torch.randn(4, 8, requires_grad=True)
    y = ff.fake_quantize(wide, scale.detach().float().requires_grad_(), spec=spec, dtype=torch.bfloat16)
    assert y.dtype == torch.bfloat16
    (gx,) = torch.autograd.grad(y.float().sum(), wide)
    assert gx.dtype == torch.float32
    _, ty = torch.func.jvp(
        lambda v: ff.fake_quantize(v, scale.detach().float(), spec=spec, dtype=torch.bfloat16), (wide,), (wide,)
    )
    assert ty.dtype == torch.bfloat16


def test_saved_memory_is_the_data_and_the_scale():
    spec = ff.QuantSpec.lsq(4)
    x, s = torch.randn(1000, requires_grad=True), torch.tensor(0.2, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ff.fake_quantize(x, s, spec=spec)
    assert {t.data_ptr() for t in saved} == {x.data_ptr(), s.data_ptr()}


@pytest.mark.parametrize(
    "spec", [ff.QuantSpec.lsq(4), ff.QuantSpec.lsq(4, axis=0, symmetric=False)], ids=["tensor", "channel"]
)
def test_torch_compile_forward_and_backward(spec):
    args = [a.float() for a in example(spec)]
    f = lambda *a: ff.fake_quantize(*a, spec=spec) * 2  # noqa: E731
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    results = []
    for g in (f, compiled):
        leaves = [a.clone().requires_grad_() for a in args]
        y = g(*leaves)
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    for actual, expected in zip(results[1], results[0]):
        torch.testing.assert_close(actual, expected)  # a compiled graph holds the dispatcher's op, sums and all
    torch._dynamo.reset()


def test_torch_compile_of_the_dynamic_form():
    spec = ff.QuantSpec(4, axis=0)
    f = lambda x: ff.fake_quantize_dynamic(x, spec=spec)[0] * 2  # noqa: E731
    x = torch.randn(4, 6, requires_grad=True)
    y = torch.compile(f, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(y, f(x))
    assert torch.equal(torch.autograd.grad(y.square().sum(), x)[0], torch.autograd.grad(f(x).square().sum(), x)[0])
    torch._dynamo.reset()


def test_func_transforms_inside_compile_raise():
    spec = ff.QuantSpec.lsq(4)
    x, s = torch.randn(6), torch.tensor(0.3)
    f = lambda v: torch.func.jvp(lambda u: ff.fake_quantize(u, s, spec=spec), (v,), (v,))[1]  # noqa: E731
    with pytest.raises(Exception, match=r"torch\.func"):
        torch.compile(f, fullgraph=True, backend="aot_eager")(x)
    torch._dynamo.reset()

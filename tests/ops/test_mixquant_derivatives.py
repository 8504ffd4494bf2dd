# SPDX-License-Identifier: Apache-2.0
"""Derivatives of mixtures in every mode: the oracle freezes masks and residuals and leaves the rest to PyTorch."""

from __future__ import annotations

import itertools

import pytest
import torch

import fastflat as ff
from fastflat._ops import scale_shape

BITS = (2, 3, 5)
SPECS = [
    ff.QuantSpec.lsq(4),
    ff.QuantSpec.lsq(4, axis=0),
    ff.QuantSpec.lsq(4, axis=-1, grad_scale=0.7, signed=False),
    ff.QuantSpec.lsq(4, group=2, mask="after", arithmetic="reciprocal"),
    ff.QuantSpec.lsq(4, axis=1, mask="none", grad_scale="lsq_channel"),
]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.axis}-{s.group}-{s.mask}")
pytestmark = pytest.mark.usefixtures("on_backend")


def example(spec, seed=0, shape=(3, 4, 6), weights=None):
    """x, scales and weights; one weight is 0."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    axis = -1 if spec.axis is None else spec.axis % len(shape)
    parameters = (len(BITS), *scale_shape(x.shape, axis, spec.group or 0))
    scale = torch.rand(parameters, generator=g, dtype=torch.float64) * 0.3 + 0.2
    weight = torch.randn(len(BITS), generator=g, dtype=torch.float64)
    weight[1] = 0
    return [x, scale, weight]


def surrogate(spec, x0, s0, w0):
    """The frozen form at (x0, s0, w0), as a function of (x, s, w) in native operations."""

    def spread(p):
        if spec.group:
            return p.repeat_interleave(spec.group, -1)
        if spec.axis is None:
            return p
        return p.view([-1 if d == spec.axis % x0.dim() else 1 for d in range(x0.dim())])

    parts = []
    for j, b in enumerate(BITS):
        grid = spec.replace(bits=b)
        u = x0 / spread(s0[j])
        d = u.round().clamp(grid.qmin, grid.qmax)
        tested = u.round() if spec.mask == "after" else u
        m = (tested >= grid.qmin) & (tested <= grid.qmax)
        m = torch.ones_like(m) if spec.mask == "none" else m
        parts.append((m, torch.where(m, d - u, d), grid.grad_factor(x0.numel(), s0[j].numel())))

    def frozen(x, s, w):
        y = 0
        for j, (m, t, factor) in enumerate(parts):
            step = s0[j] + factor * (s[j] - s0[j])
            y = y + w[j] * (m * x + t * spread(step))
        return y

    return frozen


def mixture(spec):
    return lambda x, s, w: ff.mixquant(x, s, w, bits=BITS, spec=spec)


def loss_of(f):
    return lambda *args: (f(*args) ** 3).sum() + f(*args).sin().sum()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@every_spec
def test_three_orders_of_reverse_mode(spec):
    args = example(spec)
    args[2][1] = 0.3  # the oracle's own gradient of a scale with weight 0 is 0, its higher ones go on
    leaves = [a.clone().requires_grad_() for a in args]
    results = []
    for f in (mixture(spec), surrogate(spec, *args)):
        first = torch.autograd.grad(loss_of(f)(*leaves), leaves, create_graph=True)
        second = torch.autograd.grad(sum((g * g).sum() for g in first), leaves, create_graph=True)
        third = torch.autograd.grad(sum((g * g).sum() for g in second), leaves)
        results.append((*first, *second, *third))
    close(*results)


@every_spec
def test_hessian_with_a_weight_of_zero(spec):
    """A candidate that is left out of y still has its place in the derivatives by its weight."""
    args = example(spec, shape=(2, 2, 4))
    everything = (0, 1, 2)
    actual = torch.func.hessian(loss_of(mixture(spec)), argnums=everything)(*args)
    expected = torch.func.hessian(loss_of(surrogate(spec, *args)), argnums=everything)(*args)
    close(actual, expected)
    for i, j in itertools.product(everything, everything):
        a = actual[i][j].reshape(args[i].numel(), args[j].numel())
        close(a, actual[j][i].reshape(args[j].numel(), args[i].numel()).T)


@every_spec
def test_forward_mode_and_transpose(spec):
    args, tangents = tuple(example(spec)), tuple(example(spec, seed=1))
    frozen = surrogate(spec, *args)
    y, ty = torch.func.jvp(mixture(spec), args, tangents)
    close((y, ty), torch.func.jvp(frozen, args, tangents))
    _, pullback = torch.func.vjp(mixture(spec), *args)
    g = torch.randn_like(y)
    close((g * ty).sum(), sum((a * b).sum() for a, b in zip(pullback(g), tangents, strict=True)))
    for k in range(3):

        def only(v, f, k=k):
            return f(*args[:k], v, *args[k + 1 :])

        actual = torch.func.jvp(lambda v: only(v, mixture(spec)), (args[k],), (tangents[k],))
        close(actual, torch.func.jvp(lambda v: only(v, frozen), (args[k],), (tangents[k],)))


@every_spec
def test_products_of_jvp_and_grad_in_every_nesting(spec):
    args, v = tuple(example(spec)), tuple(example(spec, seed=2))
    everything = (0, 1, 2)
    results = []
    for f in (mixture(spec), surrogate(spec, *args)):
        gradient = torch.func.grad(loss_of(f), argnums=everything)
        forward_over_reverse = torch.func.jvp(gradient, args, v)[1]
        reverse_over_reverse = torch.func.vjp(gradient, *args)[1](v)
        reverse_over_forward = torch.func.grad(lambda *a: torch.func.jvp(loss_of(f), a, v)[1], argnums=everything)(
            *args
        )
        forward_over_forward = torch.func.jvp(lambda *a: torch.func.jvp(loss_of(f), a, v)[1], args, v)[1]
        results.append((forward_over_reverse, reverse_over_reverse, reverse_over_forward, forward_over_forward))
    close(*results)


@every_spec
def test_vmap(spec):
    f, batch = mixture(spec), 4
    samples = [example(spec, seed=k) for k in range(batch)]
    stacked = [torch.stack(p) for p in zip(*samples, strict=True)]
    gradient = torch.func.grad(loss_of(f), argnums=(0, 1, 2))
    for in_dims in itertools.product((0, None), repeat=3):
        if all(d is None for d in in_dims):
            continue
        args = [p if d == 0 else p[0] for p, d in zip(stacked, in_dims, strict=True)]
        one = [[p[k] if d == 0 else p[0] for p, d in zip(stacked, in_dims, strict=True)] for k in range(batch)]
        close(torch.func.vmap(f, in_dims)(*args), torch.stack([f(*a) for a in one]))
        actual = torch.func.vmap(gradient, in_dims)(*args)
        close(actual, tuple(torch.stack(g) for g in zip(*(gradient(*a) for a in one), strict=True)))
    moved = [p.movedim(0, -1) for p in stacked]
    close(torch.func.vmap(f, -1, -1)(*moved), torch.func.vmap(f)(*stacked).movedim(0, -1))
    args = tuple(samples[0])
    product = lambda *v: torch.func.jvp(gradient, args, v)[1]  # noqa: E731
    actual = torch.func.vmap(product)(*stacked)
    close(actual, tuple(torch.stack(p) for p in zip(*(product(*v) for v in samples), strict=True)))


@every_spec
def test_batched_cotangents(spec):
    leaves = [a.requires_grad_() for a in example(spec)]
    y = mixture(spec)(*leaves)
    cotangents = torch.randn(3, *y.shape, dtype=y.dtype)
    expected = [torch.autograd.grad(y, leaves, g, retain_graph=True) for g in cotangents]
    actual = torch.autograd.grad(y, leaves, cotangents, is_grads_batched=True, retain_graph=True)
    close(actual, tuple(torch.stack(g) for g in zip(*expected, strict=True)))


@every_spec
def test_the_oracle_agrees_with_finite_differences(spec):
    args = example(spec, shape=(2, 2, 4))
    leaves = [a.clone().requires_grad_() for a in args]
    frozen = surrogate(spec, *args)
    assert torch.autograd.gradcheck(frozen, leaves)
    close(mixture(spec)(*args), frozen(*args))


def test_constant_scales():
    spec = ff.QuantSpec(4, axis=0)
    x, scale, weight = example(spec)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    y = ff.mixquant(x, scale, weight, bits=BITS, spec=spec)
    first = torch.autograd.grad((y**2).sum(), leaves, create_graph=True)
    assert all(g is not None for g in torch.autograd.grad(sum(g.sum() for g in first), leaves))
    with pytest.raises(ValueError, match="scales must carry no tangent with estimator='ste'"):
        torch.func.jvp(lambda s: ff.mixquant(x, s, weight, bits=BITS, spec=spec), (scale,), (scale,))


def test_16_bit_data_keeps_the_dtypes_of_its_gradients():
    spec = ff.QuantSpec.lsq(4, axis=0)
    x = torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True)
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [x, torch.full((3, 4), 0.25, dtype=dtype), torch.full((3,), 0.3, dtype=dtype)]
        leaves = [t.detach().requires_grad_() for t in leaves]
        y = ff.mixquant(*leaves, bits=BITS, spec=spec)
        assert y.dtype == torch.bfloat16
        first = torch.autograd.grad(y.float().square().sum(), leaves, create_graph=True)
        assert [g.dtype for g in first] == [torch.bfloat16, dtype, dtype]
        second = torch.autograd.grad(sum(g.float().square().sum() for g in first), leaves)
        assert [g.dtype for g in second] == [torch.bfloat16, dtype, dtype]
    wide = torch.randn(4, 8, requires_grad=True)
    y = ff.mixquant(wide, torch.ones(3, 4), torch.ones(3), bits=BITS, spec=spec, dtype=torch.float16)
    assert y.dtype == torch.float16
    assert torch.autograd.grad(y.float().sum(), wide)[0].dtype == torch.float32


def test_saved_memory_is_the_data_the_scales_and_vectors():
    x, s = torch.randn(1000, requires_grad=True), torch.full((3,), 0.2, requires_grad=True)
    w, saved = torch.full((3,), 0.3, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ff.mixquant(x, s, w, bits=BITS, spec=ff.QuantSpec.lsq(4))
    assert sum(t.numel() for t in saved) == 1000 + 5 * 3
    assert {x.data_ptr(), s.data_ptr(), w.data_ptr()} <= {t.data_ptr() for t in saved}


@pytest.mark.parametrize("spec", SPECS[:2], ids=["tensor", "channel"])
def test_torch_compile_forward_and_backward(spec):
    args = [a.float() for a in example(spec)]
    width, half_range = torch.tensor(3.4), torch.full(args[1].shape[1:], 2.0)
    for f, inputs in (
        (lambda *a: mixture(spec)(*a) * 2, args),
        (lambda x, s, w: ff.mixquant(x, s, w, bits=torch.tensor([2, 3, 5]), spec=spec), args),
        (lambda x, r, b: ff.frac_quantize(x, r, b, spec=spec), (args[0], half_range, width)),
    ):
        results = []
        for g in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
            leaves = [a.clone().requires_grad_() for a in inputs]
            y = g(*leaves)
            results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
        for actual, expected in zip(results[1], results[0], strict=True):
            # A compiled graph holds the dispatcher's op, whose sums have their own order.
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        torch._dynamo.reset()


def test_second_order_of_a_learned_width():
    """y is linear in the fraction: the second derivative in b is 0, the mixed ones are those of the two candidates."""
    spec, r = ff.QuantSpec.lsq(4), torch.tensor(2.0, dtype=torch.float64)
    x, b = torch.randn(40, dtype=torch.float64), torch.tensor(3.3, dtype=torch.float64)
    f = lambda x, r, b: ff.frac_quantize(x, r, b, spec=spec).sum()  # noqa: E731
    hessian = torch.func.hessian(f, argnums=(0, 1, 2))(x, r, b)
    assert hessian[2][2] == 0
    masks = []
    for k in (3, 4):
        grid = spec.replace(bits=k)
        u = x / (r / grid.qmax)
        masks.append(((u >= grid.qmin) & (u <= grid.qmax)).double())
    close(hessian[0][2], masks[1] - masks[0])
    close(hessian[2][0], masks[1] - masks[0])


def test_inference_mode_leaves_nothing_behind():
    x, s, w = torch.randn(9), torch.ones(2), torch.ones(2, requires_grad=True)
    spec = ff.QuantSpec.lsq(4, eps=1e-5)
    with torch.inference_mode():
        ff.mixquant(x, s, w, bits=(2, 6), spec=spec)
    y = ff.mixquant(x, s, w, bits=(2, 6), spec=spec)
    assert torch.autograd.grad(y.sum(), w)[0].shape == (2,)

# SPDX-License-Identifier: Apache-2.0
"""Derivatives of noisy, PACT, EWGS and minifloat quantizers by the written rule, in every mode of autograd.

The oracle is a surrogate in native operations that freezes, at the point in question, the mask m, the draw and what
rounding took away; PyTorch differentiates it to any order.
"""

from __future__ import annotations

import pytest
import torch

import fastflat as ff

pytestmark = pytest.mark.usefixtures("on_backend")

SPECS = {
    "uniform": ff.QuantSpec.lsq(3, noise="uniform"),
    "uniform_channel": ff.QuantSpec.lsq(3, noise="uniform", axis=1, symmetric=False, zero="float"),
    "normal_group": ff.QuantSpec.lsq(3, noise="normal", group=3),
    "temper": ff.QuantSpec.lsq(3, noise="temper", axis=0, symmetric=False, zero="inside"),
    "bypass": ff.QuantSpec.lsq(3, noise="bypass", symmetric=False, zero="float"),
    "stochastic": ff.QuantSpec.lsq(3, rounding="stochastic", axis=-1),
    "away": ff.QuantSpec.lsq(3, rounding="away", mask="after"),
    "pact": ff.QuantSpec.lsq(3, signed=False, estimator="pact"),
    "pact_zero": ff.QuantSpec.lsq(3, estimator="pact", axis=1, symmetric=False, zero="float"),
    "e2m1": ff.QuantSpec.lsq(format="e2m1", bits=4, axis=0),
    "binary": ff.QuantSpec.lsq(format="binary", bits=1, grad_scale=0.7),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
NU, A = 0.6, 0.3


def example(spec, seed=0, shape=(3, 4, 6)):
    """x, scale and (affine specs) zero_point in fp64, and the other arguments of a call."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    parameters = () if spec.axis is None else (shape[spec.axis],)
    if spec.group:
        parameters = (*shape[:-1], shape[-1] // spec.group)
    scale = torch.rand(parameters, generator=generator, dtype=torch.float64) * 0.3 + 0.2
    zero = [] if spec.symmetric else [torch.randn(parameters, generator=generator, dtype=torch.float64)]
    extra = {"spec": spec}
    if spec.draws:
        extra["state"] = ff.draw_state(generator=generator)
    if spec.noise != "none":
        extra["nu"] = NU
    if spec.noise == "temper":
        extra["a"] = A
    return [x, scale, *zero], extra


def spread(spec, p, x):
    if spec.group:
        return p.repeat_interleave(spec.group, -1)
    return p if spec.axis is None else p.view([-1 if d == spec.axis % x.dim() else 1 for d in range(x.dim())])


def surrogate(spec, inputs, extra):
    """The frozen form as a function of (x, s, z): y = m x + s f_s (d0 - m u0) - (1 - m) (s z - s0 z0) ..., written with
    what the op returns at the point and the mask of its own first derivative."""
    x0, s0, z0 = (*(t.detach() for t in inputs), None)[:3]
    y0 = ff.fake_quantize(x0, s0, z0, **extra)
    probe = x0.clone().requires_grad_()
    y = ff.fake_quantize(probe, s0, z0, **extra)
    m = torch.autograd.grad(y, probe, torch.ones_like(y))[0]
    assert bool(((m == 0) | (m == 1)).all())
    s, z = spread(spec, s0, x0), 0.0 if z0 is None else spread(spec, z0, x0)
    d0 = y0 / s
    q0 = d0 + z  # the code, with the noise in it
    factor = spec.grad_factor(x0.numel(), s0.numel())
    kept = (y0 == x0) & (m == 1) if spec.noise == "bypass" else torch.zeros_like(m, dtype=torch.bool)

    def function(x, scale, zero=None):
        s = spread(spec, s0 + factor * (scale - s0), x)
        z = 0.0 if zero is None else spread(spec, z0 + factor * (zero - z0), x)
        inside = x if spec.estimator == "pact" else x + s * (d0 - x0 / spread(spec, s0, x))
        if spec.estimator == "pact":
            inside = inside + (y0 - x0)
        outside = s * (q0 - z)
        y = torch.where(m == 1, inside, outside)
        return torch.where(kept, x, y)

    return function


def op(extra):
    return lambda *inputs: ff.fake_quantize(*inputs, **extra)


@every_spec
def test_gradients(spec):
    inputs, extra = example(spec)
    leaves = [t.requires_grad_() for t in inputs]
    frozen = surrogate(spec, inputs, extra)
    y, expected = op(extra)(*leaves), frozen(*leaves)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(y)
    for actual, want in zip(torch.autograd.grad(y, leaves, g), torch.autograd.grad(expected, leaves, g)):
        torch.testing.assert_close(actual, want, rtol=1e-10, atol=1e-12)


@every_spec
def test_second_order(spec):
    inputs, extra = example(spec, 1)
    frozen = surrogate(spec, inputs, extra)

    def loss(function):
        return lambda *p: (function(*p).sin() * torch.linspace(0.5, 1.5, p[0].numel()).view_as(p[0])).sum()

    arguments = tuple(range(len(inputs)))
    v = tuple(torch.randn_like(t) for t in inputs)
    for f in (lambda h: torch.func.jvp(torch.func.grad(h, arguments), tuple(inputs), v)[1],):
        for actual, want in zip(f(loss(op(extra))), f(loss(frozen))):
            torch.testing.assert_close(actual, want, rtol=1e-9, atol=1e-10)
    leaves = [t.clone().requires_grad_() for t in inputs]
    for h, results in ((loss(op(extra)), actual := []), (loss(frozen), want := [])):
        first = torch.autograd.grad(h(*leaves), leaves, create_graph=True)
        results += torch.autograd.grad(sum((a * b).sum() for a, b in zip(first, v)), leaves)
    for a, b in zip(actual, want):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@every_spec
def test_forward_mode_is_the_transpose(spec):
    inputs, extra = example(spec, 2)
    v = tuple(torch.randn_like(t) for t in inputs)
    y, ty = torch.func.jvp(op(extra), tuple(inputs), v)
    g = torch.randn_like(y)
    _, vjp = torch.func.vjp(op(extra), *inputs)
    assert float((g * ty).sum()) == pytest.approx(sum(float((a * b).sum()) for a, b in zip(vjp(g), v)), rel=1e-9)


@every_spec
def test_vmap_over_data_and_tangents(spec):
    inputs, extra = example(spec, 3)
    batch = torch.stack([inputs[0], inputs[0] + 0.1, -inputs[0]])
    batched = torch.func.vmap(lambda x: op(extra)(x, *inputs[1:]), randomness="same")(batch)
    for row, x in zip(batched, batch):
        torch.testing.assert_close(row, op(extra)(x, *inputs[1:]), rtol=0, atol=0)
    tangents = torch.randn(3, *inputs[0].shape, dtype=torch.float64)
    product = torch.func.vmap(
        lambda v: torch.func.jvp(
            torch.func.grad(lambda x: op(extra)(x, *inputs[1:]).square().sum()), (inputs[0],), (v,)
        )[1],
        randomness="same",
    )(tangents)
    frozen = surrogate(spec, inputs, extra)
    expected = torch.func.vmap(
        lambda v: torch.func.jvp(torch.func.grad(lambda x: frozen(x, *inputs[1:]).square().sum()), (inputs[0],), (v,))[
            1
        ]
    )(tangents)
    torch.testing.assert_close(product, expected, rtol=1e-9, atol=1e-10)


@every_spec
def test_compiled(spec):
    torch._dynamo.reset()
    inputs, extra = example(spec, 4)
    leaves = [t.clone().requires_grad_() for t in inputs]
    y = op(extra)(*leaves)
    g = torch.randn_like(y)
    expected = torch.autograd.grad(y, leaves, g)
    compiled = torch.compile(op(extra), fullgraph=True, backend="aot_eager")
    z = compiled(*leaves)
    assert torch.equal(z, y)
    for a, b in zip(torch.autograd.grad(z, leaves, g), expected):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_pact_is_the_paper():
    """dL/dalpha of y = round(clamp(x, 0, alpha) (2^b - 1) / alpha) alpha / (2^b - 1) is the sum of gy beyond alpha."""
    spec = ff.QuantSpec(4, signed=False, estimator="pact", scale_is="absmax")
    x = torch.randn(1000) * 2
    alpha = torch.tensor(1.5, requires_grad=True)
    x.requires_grad_()
    y = ff.fake_quantize(x, alpha, spec=spec)
    steps = 15 / alpha.detach()
    torch.testing.assert_close(y, torch.round(x.clamp(0, 1.5) * steps) / steps)
    g = torch.randn(1000)
    gx, ga = torch.autograd.grad(y, (x, alpha), g)
    assert torch.equal(gx, torch.where((x >= 0) & (x <= 1.5), g, 0.0))
    torch.testing.assert_close(ga, g[x > 1.5].sum(), rtol=1e-5, atol=1e-5)


def test_ewgs_is_the_paper():
    """gx = gy (1 + delta sign(gy) (x_n - x_q)) inside the grid; the diagonal quadratic gets its exact gradient."""
    spec = ff.QuantSpec.lsq(3, estimator="ewgs", grad_scale="none")
    x = torch.randn(500, dtype=torch.float64, requires_grad=True)
    s = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    delta = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    y = ff.fake_quantize(x, s, spec=spec, delta=delta)
    g = torch.randn_like(y)
    gx, gs, gd = torch.autograd.grad(y, (x, s, delta), g)
    u, q = (x / s).detach(), (y / s).detach()
    m = ((u >= -4) & (u <= 3)).double()
    k = 1 + 0.7 * g.sign() * (u - q)
    torch.testing.assert_close(gx, m * k * g)
    torch.testing.assert_close(gs, (g * (q - m * k * u)).sum())
    torch.testing.assert_close(gd, (m * g.abs() * (u - q) * x).sum().detach())
    # L = sum h q^2 / 2 in units of the scale: delta_i = h_i / |g_i| makes the gradient h x exact.
    h = 1.3
    for value in (0.31, -0.77, 0.9):
        x = torch.tensor([value], dtype=torch.float64, requires_grad=True)
        one = torch.ones((), dtype=torch.float64)
        code = float(ff.fake_quantize(x, one, spec=spec, delta=0.0).detach())
        if code == 0:
            continue
        y = ff.fake_quantize(x, one, spec=spec, delta=h / abs(h * code))
        assert float(torch.autograd.grad((h * y.square() / 2).sum(), x)[0]) == pytest.approx(h * value, rel=1e-14)


def test_second_order_of_ewgs_is_the_plain_rule():
    inputs = [torch.randn(20, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)]
    v = (torch.randn(20, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64))

    def product(spec, **extra):
        loss = lambda *p: ff.fake_quantize(*p, spec=spec, **extra).square().sum()  # noqa: E731
        return torch.func.jvp(loss, tuple(inputs), v)[1]

    plain = ff.QuantSpec.lsq(3)
    assert torch.equal(product(plain), product(plain.replace(estimator="ewgs"), delta=0.5))


@pytest.mark.parametrize("scale_is", ["log2", "absmax", "range"])
def test_parametrised_scales(scale_is):
    """The gradient of the parameter is that of s by the chain rule."""
    spec = ff.QuantSpec.lsq(4, axis=0)
    x = torch.randn(5, 30, dtype=torch.float64)
    s = torch.rand(5, dtype=torch.float64) * 0.3 + 0.1
    p = {"log2": s.log2(), "absmax": s * 7, "range": s * 15}[scale_is].requires_grad_()
    slope = {"log2": s * torch.log(torch.tensor(2.0, dtype=torch.float64)), "absmax": 1 / 7, "range": 1 / 15}[scale_is]
    s = s.requires_grad_()
    y, z = ff.fake_quantize(x, s, spec=spec), ff.fake_quantize(x, p, spec=spec.replace(scale_is=scale_is))
    torch.testing.assert_close(y, z, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(z, p, g)[0], torch.autograd.grad(y, s, g)[0] * slope)


def test_dynamic_scales_are_constants():
    x = torch.randn(4, 64, dtype=torch.float64, requires_grad=True)
    spec = ff.QuantSpec(format="e2m1", group=32, scale_rule="floor")
    y, scale = ff.fake_quantize_dynamic(x, spec=spec)
    g = torch.randn_like(y)
    inside = (x / scale.repeat_interleave(32, -1)).abs() <= 6
    assert torch.equal(torch.autograd.grad(y, x, g)[0], torch.where(inside, g, 0.0))
    assert not bool(inside.all())  # floor clips
    product = torch.func.jvp(lambda x: ff.fake_quantize_dynamic(x, spec=spec)[0], (x.detach(),), (g,))[1]
    assert torch.equal(product, torch.where(inside, g, 0.0))
    batched = torch.func.vmap(lambda x: ff.fake_quantize_dynamic(x, spec=spec)[0])(x.detach().view(4, 1, 64))
    assert torch.equal(batched.view(4, 64), y.detach())


@pytest.mark.parametrize("mask", ["before", "after", "none"])
@pytest.mark.parametrize("estimator", ["ste", "lsq"])
def test_what_is_not_above_zero_passes_no_gradient_of_a_rectified_grid(estimator, mask):
    """Those of a ReLU before the same quantizer; also where every other element passes."""
    spec = ff.QuantSpec(bits=4, signed=False, rectified=True, mask=mask, estimator=estimator)
    x = torch.tensor([-1.0, -0.0, 0.0, 0.3, 1.0, 5.0, torch.nan], requires_grad=True)
    for function in (
        lambda x, spec: ff.fake_quantize(x, torch.tensor(0.1), spec=spec),
        lambda x, spec: ff.fake_quantize_dynamic(x[:6], spec=spec.replace(estimator="ste"))[0],
    ):
        found, expected = (
            torch.autograd.grad(function(given, rule).sum(), x)[0]
            for given, rule in ((x, spec), (x.relu(), spec.replace(rectified=False)))
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        assert found[:3].tolist() == [0.0, 0.0, 0.0]

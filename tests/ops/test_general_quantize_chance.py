# SPDX-License-Identifier: Apache-2.0
"""Noise and stochastic rounding: distributions, what stays where it is, repetition, and what is kept in memory."""

from __future__ import annotations

import math

import pytest
import torch

import fastflat as ff

pytestmark = pytest.mark.usefixtures("compiled")

N = 1 << 16
S = torch.tensor(0.25)
NOISES = ("uniform", "normal", "temper", "bypass")


def noisy(noise, **changes):
    return ff.QuantSpec.lsq(4, noise=noise, **changes)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("noise", "kurtosis"), [("uniform", 1.8), ("normal", 3.0)])
def test_additive_noise_has_the_moments(noise, kurtosis):
    """Inside the grid y - x = s nu xi: mean 0, variance (s nu)^2 / 12, no correlation with its neighbours."""
    x = torch.full((N,), 0.3)
    e = (ff.fake_quantize(x, S, spec=noisy(noise), nu=0.5, generator=seeded()) - x).double()
    sigma = 0.25 * 0.5 / math.sqrt(12)
    assert abs(float(e.mean())) < 5 * sigma / math.sqrt(N)
    assert float(e.var()) == pytest.approx(sigma**2, rel=0.03)
    assert float((e**4).mean() / e.var() ** 2) == pytest.approx(kurtosis, rel=0.06)
    for lag in range(1, 9):
        assert abs(float((e[:-lag] * e[lag:]).mean())) < 5 * sigma**2 / math.sqrt(N)
    if noise == "uniform":
        assert float(e.abs().max()) <= 0.25 * 0.5 / 2 * (1 + 1e-5)


def test_additive_noise_is_clamped_to_the_grid():
    x = torch.linspace(-4, 4, N)
    for noise in ("uniform", "normal"):
        y = ff.fake_quantize(x, S, spec=noisy(noise), nu=3.0, generator=seeded())
        assert float(y.min()) == -8 * 0.25
        assert float(y.max()) == 7 * 0.25


@pytest.mark.parametrize("fraction", [0.5, 0.25, 0.9])
def test_stochastic_rounding_is_unbiased(fraction):
    """Both neighbours occur, the upper one with the probability of the fraction; a half splits evenly."""
    spec = ff.QuantSpec(4, rounding="stochastic")
    for base in (-3, 2):
        x = torch.full((N,), (base + fraction) * 0.25)
        codes = ff.fake_quantize(x, S, spec=spec, generator=seeded()) / 0.25
        assert set(codes.tolist()) == {float(base), float(base + 1)}
        share = float((codes == base + 1).double().mean())
        assert abs(share - fraction) < 5 * math.sqrt(fraction * (1 - fraction) / N)


@pytest.mark.parametrize("format", ["int", "e2m1", "e4m3", "e3m2"])
def test_stochastic_rounding_keeps_values_of_the_grid(format):
    spec = (
        ff.QuantSpec(format=format, rounding="stochastic") if format != "int" else ff.QuantSpec(rounding="stochastic")
    )
    x = ff.fake_quantize(torch.linspace(-20, 20, N), S, spec=spec.evaluation())
    for seed in range(3):
        assert torch.equal(ff.fake_quantize(x, S, spec=spec, generator=seeded(seed)), x)


def test_stochastic_minifloat_is_unbiased_across_binades():
    spec = ff.QuantSpec(format="e2m1", rounding="stochastic")
    one = torch.ones(())
    for value, low, high in ((5.0, 4.0, 6.0), (2.5, 2.0, 3.0), (0.1, 0.0, 0.5), (-3.5, -4.0, -3.0)):
        y = ff.fake_quantize(torch.full((N,), value), one, spec=spec, generator=seeded())
        assert set(y.tolist()) <= {low, high}
        assert float(y.double().mean()) == pytest.approx(value, abs=5 * (high - low) / 2 / math.sqrt(N))


def test_binary_stochastic_has_the_mean():
    spec = ff.QuantSpec(format="binary", rounding="stochastic")
    y = ff.fake_quantize(torch.full((N,), 0.1), S, spec=spec, generator=seeded())
    assert set(y.tolist()) == {-0.25, 0.25}
    assert float(y.double().mean()) == pytest.approx(0.1, abs=5 * 0.25 / math.sqrt(N))


def test_temper_interpolates():
    """a = 1 without noise is the clipped value; a = 0 without noise is Q."""
    x = torch.linspace(-4, 4, 1001)
    plain = ff.fake_quantize(x, S, spec=ff.QuantSpec.lsq(4))
    spec = noisy("temper")
    assert torch.equal(ff.fake_quantize(x, S, spec=spec, nu=0.0, a=0.0), plain)
    clipped = ff.fake_quantize(x, S, spec=spec, nu=0.0, a=1.0)
    torch.testing.assert_close(clipped, x.clamp(-8 * 0.25, 7 * 0.25), rtol=1e-6, atol=1e-7)
    half = ff.fake_quantize(x, S, spec=spec, nu=0.0, a=0.5)
    torch.testing.assert_close(half, (plain + clipped) / 2, rtol=1e-6, atol=1e-7)


def test_bypass_keeps_the_share():
    x = torch.randn(N)
    plain = ff.fake_quantize(x, S, spec=ff.QuantSpec.lsq(4))
    y = ff.fake_quantize(x, S, spec=noisy("bypass"), nu=0.3, generator=seeded())
    kept = (y == x) & (y != plain)
    assert bool(((y == x) | (y == plain)).all())
    assert float(kept.double().mean()) == pytest.approx(0.3, abs=0.01)
    assert torch.equal(ff.fake_quantize(x, S, spec=noisy("bypass"), nu=1.0), x)
    assert torch.equal(ff.fake_quantize(x, S, spec=noisy("bypass"), nu=0.0), plain)


@pytest.mark.parametrize(
    "spec", [*(noisy(n) for n in NOISES), ff.QuantSpec.lsq(4, rounding="stochastic")], ids=lambda s: s.noise
)
def test_the_generator_rules(spec):
    x = torch.randn(999)
    nu = None if spec.noise == "none" else 0.5

    def call(**source):
        return ff.fake_quantize(x, S, spec=spec, nu=nu, **source)

    assert torch.equal(call(generator=seeded(7)), call(generator=seeded(7)))
    torch.manual_seed(3)
    first, second = call(), call()
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(call(), first)
    state = ff.draw_state()
    assert torch.equal(call(state=state), call(state=state))


@pytest.mark.parametrize("noise", NOISES)
def test_evaluation_has_no_chance(noise):
    x = torch.randn(100)
    spec = noisy(noise).evaluation()
    assert not spec.draws
    assert torch.equal(ff.fake_quantize(x, S, spec=spec), ff.fake_quantize(x, S, spec=ff.QuantSpec.lsq(4)))


@pytest.mark.parametrize("noise", NOISES)
def test_backward_draws_again_and_nothing_random_is_kept(noise):
    """Saved for backward: x, the scalars and 16 bytes of state; y and the gradients follow from the same draws."""
    x = torch.randn(5000, requires_grad=True)
    scale = S.clone().requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = ff.fake_quantize(x, scale, spec=noisy(noise), nu=0.5, state=ff.draw_state(generator=seeded(1)))
    extra = sum(t.numel() * t.element_size() for t in saved if t is not x)
    assert extra <= 64
    gx, gs = torch.autograd.grad(y, (x, scale), torch.ones_like(y))
    # y = d s with dy/ds = d - m u: where the gradient passes, y - s dy/ds = x.
    d = y.detach() / 0.25
    inside = gx != 0
    share = torch.where(inside, d - x.detach() / 0.25, d)
    assert float(gs) == pytest.approx(
        float(share.double().sum()) * noisy(noise).grad_factor(5000, 1), rel=1e-3, abs=1e-4
    )


def test_16_bit_and_double_draw_the_same():
    state = ff.draw_state(generator=seeded(2))
    x = torch.full((1000,), 0.25)
    spec = noisy("normal")
    full = ff.fake_quantize(x, S, spec=spec, state=state)
    double = ff.fake_quantize(x.double(), S.double(), spec=spec, state=state)
    torch.testing.assert_close(double.float(), full, rtol=1e-6, atol=1e-7)
    assert torch.equal(ff.fake_quantize(x.bfloat16(), S, spec=spec, state=state), full.bfloat16())


def test_vmap_honours_randomness():
    x = torch.zeros(3, 40)
    call = lambda v: ff.fake_quantize(v, S, spec=noisy("uniform"))  # noqa: E731
    same = torch.func.vmap(call, randomness="same")(x)
    assert torch.equal(same[0], same[1])
    different = torch.func.vmap(call, randomness="different")(x)
    assert not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(call)(x)


def test_batched_cotangents_see_one_draw():
    x = torch.randn(50, requires_grad=True)
    y = ff.fake_quantize(x, S, spec=noisy("uniform"), nu=2.0)
    g = torch.randn(4, 50)
    batched = torch.autograd.grad(y, x, g, is_grads_batched=True, retain_graph=True)[0]
    single = torch.stack([torch.autograd.grad(y, x, row, retain_graph=True)[0] for row in g])
    assert torch.equal(batched, single)


def test_schedules_do_not_recompile():
    torch._dynamo.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    step = torch.compile(
        lambda x, nu: ff.fake_quantize(x, S, spec=noisy("uniform"), nu=nu), backend=count, fullgraph=True
    )
    x = torch.randn(64)
    for nu in (1.0, 0.5, 0.25):
        step(x, torch.tensor(nu))
    assert len(graphs) == 1


def test_reference_and_kernels_share_a_state():
    x = torch.randn(777)
    state = ff.draw_state(generator=seeded(4))
    for noise in NOISES:
        y = ff.fake_quantize(x, S, spec=noisy(noise), state=state)
        with ff.backend("reference"):
            assert torch.equal(ff.fake_quantize(x, S, spec=noisy(noise), state=state), y)


@pytest.mark.parametrize(
    ("spec", "extra", "message"),
    [
        (ff.QuantSpec.lsq(4), {"nu": 0.5}, "nu must be None unless the spec has noise"),
        (ff.QuantSpec.lsq(4), {"generator": torch.Generator()}, "generator must be None unless"),
        (ff.QuantSpec.lsq(4, rounding="away"), {"state": torch.zeros(2).long()}, "state must be None unless"),
        (noisy("uniform"), {"a": 0.5}, "a must be None unless the spec has noise='temper'"),
        (noisy("uniform"), {"nu": torch.ones(2)}, "nu must be a number or a 0-dim floating tensor"),
        (noisy("uniform"), {"nu": "1"}, "nu must be a number or a 0-dim tensor, got str"),
        (noisy("uniform"), {"state": torch.zeros(2)}, "state must be int64 of shape"),
        (
            noisy("uniform"),
            {"state": torch.zeros(2).long(), "generator": torch.Generator()},
            "generator must be None when",
        ),
        (noisy("uniform"), {"delta": 0.1}, "delta must be None unless the spec has estimator='ewgs'"),
        (ff.QuantSpec.lsq(4, estimator="ewgs"), {}, "delta must be given with estimator='ewgs'"),
    ],
)
def test_bad_calls_get_one_line(spec, extra, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        ff.fake_quantize(torch.ones(3), S, spec=spec, **extra)
    assert "\n" not in str(caught.value)

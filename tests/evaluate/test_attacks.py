# SPDX-License-Identifier: Apache-2.0
"""Attacks on inputs: closed forms on linear models, masks, and that nothing else changes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastflat.evaluate import data_range, fgsm, pgd, project

from .models import convolutional, images, linear, quantized, unchanged


def rise(logits, y):
    """A loss that is linear in the logits: ``z_1 - z_0``."""
    return logits[:, 1] - logits[:, 0]


def free(**options):
    return {"lo": None, "hi": None, "loss": rise, **options}


def some(count=5, size=6, seed=1):
    return torch.randn(count, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_fgsm_raises_a_linear_loss_by_eps_times_the_dual_norm():
    model, x = linear(), some()
    w = (model[1].weight[1] - model[1].weight[0]).detach()
    for norm, dual in (("linf", w.abs().sum()), ("l2", w.norm())):
        found = fgsm(model, x, None, 0.25, norm=norm, **free())
        grown = rise(model(found), None) - rise(model(x), None)
        torch.testing.assert_close(grown, torch.full_like(grown, 0.25) * dual, rtol=1e-12, atol=0)
    corner = fgsm(model, x, None, 0.25, **free())
    assert torch.equal(corner, x + 0.25 * w.sign())


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("start", [True, False])
def test_pgd_reaches_the_optimum_of_a_linear_loss(norm, start):
    model, x = linear(), some()
    w = (model[1].weight[1] - model[1].weight[0]).detach()
    steps = 10 if norm == "linf" else 200  # a random point of the sphere closes in on the optimum step by step
    g = torch.Generator().manual_seed(0)
    found = pgd(model, x, None, 0.25, steps=steps, step=0.06, norm=norm, random_start=start, generator=g, **free())
    best = x + 0.25 * (w.sign() if norm == "linf" else w / w.norm())
    torch.testing.assert_close(found, best, rtol=0, atol=1e-12 if norm == "linf" else 1e-6)


def test_cross_entropy_falls_when_targeted_and_rises_when_not():
    model, x = linear(), some(50)
    y = torch.arange(50) % 3
    before = nn.functional.cross_entropy(model(x), y, reduction="none")
    for targeted, sign in ((False, 1), (True, -1)):
        for found in (
            fgsm(model, x, y, 1e-3, targeted=targeted, lo=None, hi=None),
            pgd(model, x, y, 1e-3, targeted=targeted, lo=None, hi=None, random_start=False),
        ):
            after = nn.functional.cross_entropy(model(found), y, reduction="none")
            assert bool(((after - before) * sign > 0).all())


def test_small_gradients_still_have_a_direction():
    model, x = linear(dtype=torch.float32), some().float()
    with torch.no_grad():
        model[1].weight *= 1e-30  # squares underflow in float32
    found = fgsm(model, x, None, 0.5, norm="l2", **free())
    torch.testing.assert_close((found - x).norm(dim=1), torch.full((5,), 0.5), rtol=1e-5, atol=0)


def test_no_gradient_means_no_step():
    model, x = linear(), some()
    with torch.no_grad():
        model[1].weight.zero_()
    for norm in ("linf", "l2"):
        assert torch.equal(fgsm(model, x, None, 0.5, norm=norm, **free()), x)


def test_inactive_samples_keep_every_bit():
    x, y = images(12)
    active = torch.arange(12) % 3 == 0
    for found in (
        pgd(quantized().eval(), x, y, 0.1, active=active),
        fgsm(quantized().eval(), x, y, 0.1, active=active),
        pgd(quantized().eval(), x.bfloat16().float(), y, 0.1, active=active, restarts=2, norm="l2"),
    ):
        moved = (found != x).flatten(1).any(1)
        assert bool(moved[active].all())
    found = pgd(quantized().eval(), x, y, 0.1, active=active)
    assert torch.equal(found[~active].view(torch.int32), x[~active].view(torch.int32))
    assert torch.equal(pgd(quantized().eval(), x, y, 0.1, active=torch.zeros(12, dtype=torch.bool)), x)


def test_frozen_samples_stop_where_they_first_fool_the_model():
    model, (x, y) = convolutional().eval(), images(40)
    options = {"steps": 6, "step": 0.01, "random_start": False}
    trail = [x] + [pgd(model, x, y, 0.2, **{**options, "steps": k}) for k in range(1, 7)]
    fooled = torch.stack([model(t).argmax(1) != y for t in trail])
    assert 3 < int(fooled[0].sum()) < int(fooled[5].sum()) < 40  # some at once, some on the way, some never
    first = torch.where(fooled.any(0), fooled.int().argmax(0), 6)
    want = torch.stack([trail[k][i] for i, k in enumerate(first.tolist())])
    assert torch.equal(pgd(model, x, y, 0.2, freeze=True, **options), want)
    same = pgd(model, x, y, 0.2, freeze=lambda logits, labels: logits.argmax(1) != labels, **options)
    assert torch.equal(same, want)
    never = pgd(model, x, y, 0.2, freeze=lambda logits, _: logits[:, 0].isnan(), **options)
    assert torch.equal(never, trail[6])
    assert torch.equal(pgd(model, x, y, 0.2, freeze=lambda logits, _: ~logits[:, 0].isnan(), **options), x)


def test_frozen_samples_stay_frozen_where_a_model_changes_its_mind():
    class Fickle(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            z = torch.stack([x.sum(1), -x.sum(1)], 1)
            return z.flip(1) if self.calls == 2 else z

    x = torch.full((1, 2), 0.5)
    options = {"eps": 0.4, "step": 0.1, "random_start": False}
    one = pgd(Fickle(), x, torch.tensor([0]), steps=1, **options)
    assert torch.equal(pgd(Fickle(), x, torch.tensor([0]), steps=4, freeze=True, **options), one)


def test_a_run_that_fools_the_model_beats_one_of_higher_loss():
    class Cliff(nn.Module):
        def forward(self, x):
            near, far = torch.tensor([0.01, 0.0, 0.0]), torch.tensor([0.0, 0.01, -9.0])
            return torch.where(x > 0.5, far, near) + 0 * x

    x, y = torch.full((40, 1), 0.5), torch.zeros(40, dtype=torch.long)
    model, g = Cliff(), torch.Generator().manual_seed(0)
    losses = nn.functional.cross_entropy(model(torch.tensor([[0.4], [0.6]])), y[:2], reduction="none")
    assert losses[0] > losses[1]
    assert bool((pgd(model, x, y, 0.1, step=0.0, steps=1, restarts=12, generator=g) > 0.5).all())


def test_restarts_never_do_worse_and_are_reproducible():
    model, (x, y) = convolutional().eval(), images(40)
    runs = {}
    for restarts in (1, 4):
        g = torch.Generator().manual_seed(5)
        runs[restarts] = pgd(model, x, y, 0.04, steps=3, restarts=restarts, generator=g)
    fooled = {k: model(v).argmax(1) != y for k, v in runs.items()}
    losses = {k: nn.functional.cross_entropy(model(v), y, reduction="none") for k, v in runs.items()}
    assert bool((fooled[4] >= fooled[1]).all())
    same = fooled[4] == fooled[1]
    assert bool((losses[4] >= losses[1] - 1e-6)[same].all())
    assert not torch.equal(runs[1], runs[4])
    again = pgd(model, x, y, 0.04, steps=3, restarts=4, generator=torch.Generator().manual_seed(5))
    assert torch.equal(again, runs[4])
    torch.manual_seed(1)
    one, two = (pgd(model, x, y, 0.04, steps=1) for _ in range(2))
    assert not torch.equal(one, two)  # torch's own generator moves on


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_types_ball_and_box(dtype, norm):
    model, (x, y) = convolutional().eval().to(dtype), images(8)
    x = x.to(dtype)
    eps = 0.1 if norm == "linf" else 1.0
    found = pgd(model, x, y, eps, norm=norm)
    assert found.dtype == dtype
    assert not found.requires_grad
    d = (found.double() - x.double()).flatten(1)
    length = d.abs().amax(1) if norm == "linf" else d.norm(dim=1)
    assert bool((length <= eps * (1 + 1e-5) + (0.04 if dtype == torch.bfloat16 else 1e-6)).all())
    assert bool((length > 0.5 * eps).all())
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1


@pytest.mark.parametrize("make", [convolutional, quantized])
def test_the_model_is_as_before(make):
    model, (x, y) = make().eval(), images(6)
    model[3].train()
    g = torch.Generator().manual_seed(0)
    with unchanged(model):
        fgsm(model, x, y, 0.1)
        pgd(model, x, y, 0.1, restarts=2, freeze=True, generator=g)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            pgd(model, x, y, 0.1, generator=g)

        def broken(logits, y):
            raise KeyError("broken")

        with pytest.raises(KeyError):
            fgsm(model, x, y, 0.1, loss=broken)


def test_normalised_images_keep_the_range_and_the_radius_of_each_channel():
    mean, std = torch.tensor([0.2, 0.5]), torch.tensor([0.1, 0.4])
    pixels = torch.rand(5, 2, 3, 3)
    x = (pixels - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    model = linear(size=18, dtype=torch.float32)
    lo, hi = data_range(mean, std)
    radius = 0.1 / std.view(-1, 1, 1)
    found = pgd(model, x, torch.zeros(5, dtype=torch.long), radius, lo=lo, hi=hi)
    back = found * std.view(-1, 1, 1) + mean.view(-1, 1, 1)
    assert float((back - pixels).abs().max()) <= 0.1 + 1e-6
    assert float((back - pixels).abs().amax()) > 0.09
    assert float(back.min()) >= -1e-6
    assert float(back.max()) <= 1 + 1e-6


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    shape=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    eps=st.floats(0, 3, width=32),
    norm=st.sampled_from(["linf", "l2"]),
    spread=st.sampled_from([1e-3, 1.0, 100.0]),
)
def test_projection_lies_in_ball_and_box_and_is_idempotent(seed, shape, eps, norm, spread):
    g = torch.Generator().manual_seed(seed)
    centre = torch.rand(shape, generator=g)
    x = centre + spread * torch.randn(shape, generator=g)
    found = project(x, centre, eps, norm=norm)
    d = (found - centre).double().flatten(1)
    assert bool((d.abs().amax(1) if norm == "linf" else d.norm(dim=1)).le(eps + 1e-6).all())
    assert bool(((found >= 0) & (found <= 1)).all())
    again = project(found, centre, eps, norm=norm)
    assert torch.equal(again, found) if norm == "linf" else torch.allclose(again, found, rtol=1e-6, atol=1e-6)
    near = centre + 0.9 * (found - centre)  # inside already: stays in every bit
    assert torch.equal(project(near, centre, eps * 1.01 + 1e-6, norm=norm), near)


def test_the_random_start_fills_the_ball_evenly():
    from fastflat.evaluate._ball import start

    x = torch.zeros(20000, 2, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    length = start(x, 2.0, "l2", g).norm(dim=1)
    assert float(length.max()) <= 2
    assert abs(float((length < 1).double().mean()) - 0.25) < 0.02  # a disk of half the radius has a quarter of its area
    square = start(x, 2.0, "linf", g)
    assert abs(float(square.mean())) < 0.05
    assert abs(float(square.var()) - 4 / 3) < 0.05


X, Y = images(4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": -0.1}, "eps must be finite and at least 0, got -0.1"),
        ({"eps": math.nan}, "eps must be finite and at least 0"),
        ({"eps": "8/255"}, "eps must be a number or a tensor, got str"),
        ({"eps": torch.tensor([-1.0])}, "eps must be finite and at least 0"),
        ({"eps": torch.zeros(5)}, r"eps must broadcast to \[4, 1, 8, 8\]"),
        ({"eps": 8.0}, r"eps must be at most the range of the data \(1\), got 8; eps is in the units of the inputs"),
        ({"eps": 9.0, "norm": "l2"}, r"range of the data \(8\), got 9"),
        ({"norm": "l1"}, "norm must be 'linf' or 'l2', got 'l1'"),
        ({"lo": 1.0, "hi": 1.0}, "lo must be below hi everywhere, got lo 1, hi 1"),
        ({"lo": torch.tensor([2.0])}, "lo must be below hi everywhere"),
        ({"lo": "0"}, "lo must be a number, a tensor or None"),
        ({"step": -1.0}, "step must be finite and at least 0"),
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"restarts": 0}, "restarts must be an integer of at least 1"),
        ({"restarts": 2, "random_start": False}, "restarts must be 1 without random starts"),
        ({"y": torch.tensor([0, 1, 2, 3])}, "y must lie in 0 to 2, the classes of the logits, got 0 to 3"),
        ({"y": torch.tensor([0, -1, 2, 2])}, "y must lie in 0 to 2.*got -1 to 2"),
        ({"y": torch.tensor([0.0] * 4)}, r"y must be integers \[B=4\]"),
        ({"y": Y[:3]}, r"y must be integers \[B=4\]"),
        ({"x": X * 255}, r"x must lie in \[lo, hi\], got .*; for normalised images pass lo, hi = data_range"),
        ({"x": X[:0], "y": Y[:0]}, "x must hold at least one sample"),
        ({"x": X.long()}, r"x must be a floating tensor \[B, ...\]"),
        ({"x": torch.full_like(X, math.nan)}, "x must be finite"),
        ({"active": torch.ones(4)}, r"active must be a bool tensor \[B=4\]"),
        ({"loss": lambda z, y: z.sum()}, r"loss must return one number for each sample, \[B=4\], got \[\]"),
        ({"loss": lambda z, y: z.sum(1), "y": None, "freeze": True}, "y must be labels"),
        ({"freeze": lambda z, y: z}, r"freeze must return a bool tensor \[B=4\], got torch.float32 \[4, 3\]"),
        ({"loss": lambda z, y: z.detach().sum(1)}, "model must be differentiable in its inputs"),
        ({"loss": lambda z, y: (z * math.inf).sum(1)}, "gradients must be finite"),
        ({"model": convolutional()}, "model must keep samples apart, got 1 in train mode; call model.eval"),
        ({"model": nn.Sequential(nn.Flatten(0), nn.Linear(256, 3))}, r"model must return logits \[B=4, C\], got \[3\]"),
        ({"model": lambda x: x}, "model must be a torch.nn.Module, got function"),
    ],
)
def test_bad_input_is_one_line(change, message):
    arguments = {"model": convolutional().eval(), "x": X, "y": Y, "eps": 0.1} | change
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        pgd(**arguments)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("fastflat::evaluate.pgd: ")


def test_nan_logits_are_one_line():
    model = convolutional().eval()
    with torch.no_grad():
        model[5].bias[0] = math.nan
    with pytest.raises(ValueError, match=r"evaluate\.fgsm: logits must be numbers, got NaN"):
        fgsm(model, X, Y, 0.1)


def test_inference_mode_is_one_line():
    with torch.inference_mode(), pytest.raises(ValueError, match=r"outside of torch\.inference_mode"):
        fgsm(convolutional().eval(), X, Y, 0.1)

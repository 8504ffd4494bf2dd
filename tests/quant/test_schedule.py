# SPDX-License-Identifier: Apache-2.0
"""Noisy quantizers in a model: schedules, checkpoints, learned delta, evaluation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fastflat as ff
from fastflat.quant import NoiseSchedule, quantizers


def network(noise="temper", **changes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    ff.prepare(model, weights=ff.QuantSpec.lsq(4, noise=noise, **changes))
    return model


def test_values_follow_the_curve():
    model = network()
    schedule = NoiseSchedule(model, 10, nu=0.8, a=0.5)
    for _ in range(10):
        schedule.step()
    for _, q in quantizers(model):
        assert float(q.nu) == pytest.approx(0.8 / math.e)
        assert float(q.a) == pytest.approx(0.5 / math.e)
    for curve, middle, end in (("linear", 0.5, 0.0), ("cosine", 0.5, 0.0), ("constant", 1.0, 1.0)):
        schedule = NoiseSchedule(model, 10, curve=curve)
        schedule.last_step = 5
        assert schedule.values()[0] == pytest.approx(middle)
        schedule.last_step = 10
        assert schedule.values()[0] == pytest.approx(end, abs=1e-12)


def test_a_run_resumes_from_its_checkpoint():
    def run(model, schedule, steps):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
        for _ in range(steps):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            schedule.step()

    whole, part = network(), network()
    torch.manual_seed(5)
    run(whole, NoiseSchedule(whole, 4, a=0.5), 6)
    torch.manual_seed(5)
    first = NoiseSchedule(part, 4, a=0.5)
    run(part, first, 3)
    saved = {"model": part.state_dict(), "schedule": first.state_dict(), "random": torch.get_rng_state()}
    assert "0.weight_quantizer.nu" in saved["model"]
    resumed = network()
    resumed.load_state_dict(saved["model"])
    second = NoiseSchedule(resumed, 1)
    second.load_state_dict(saved["schedule"])
    torch.set_rng_state(saved["random"])
    run(resumed, second, 3)
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()):
        assert torch.equal(a, b)


def test_evaluation_is_hard_rounding():
    model, plain = network("uniform"), network("none")
    x = torch.randn(5, 8)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    assert torch.equal(model(x), plain.eval()(x))


@pytest.mark.parametrize("learn", [False, True])
def test_ewgs_trains(learn):
    spec = ff.QuantSpec.lsq(3, estimator="ewgs")
    q = ff.quant.Quantizer(spec, learn_delta=learn)
    x = torch.randn(100, requires_grad=True)
    q.initialise_from(x)
    q(x).square().sum().backward()
    assert isinstance(q.delta, nn.Parameter) is learn
    assert x.grad is not None
    assert bool(q.scale.grad.isfinite())
    if learn:
        assert float(q.delta.grad) != 0
    assert "delta" in q.state_dict()
    q.eval()(x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"horizon": 0}, "horizon must be a positive number of steps, got 0"),
        ({"horizon": 5, "curve": "step"}, "curve must be one of"),
        ({"horizon": 5, "nu": math.nan}, "nu must be finite"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule(network(), **arguments)
    with pytest.raises(ValueError, match="model must have a quantizer with noise"):
        NoiseSchedule(network("none"), 5)
    schedule = NoiseSchedule(network(), 5)
    with pytest.raises(ValueError, match="state must have the entries"):
        schedule.load_state_dict({"horizon": 3})

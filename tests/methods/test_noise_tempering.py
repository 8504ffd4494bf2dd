# SPDX-License-Identifier: Apache-2.0
"""Noise tempering on a model: what is refused, what evaluation computes, and what a checkpoint continues."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastflat as ff
from fastflat.methods import NoiseTempering


def net(**activations):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    spec = ff.QuantSpec.lsq(bits=2, signed=False, **activations)
    model = ff.prepare(model, weights=ff.QuantSpec.lsq(bits=3, axis=0), activations=spec)
    x, y = torch.rand(8, 1, 8, 8), torch.randint(3, (8,))
    return ff.calibrate(model, [x]), x, y


def test_evaluation_rounds_hard_and_noise_fades():
    model, x, _ = net()
    hard = model.eval()(x)
    tempering = NoiseTempering(model, 10)
    assert torch.equal(model(x), hard)
    model.train()
    assert not torch.equal(model[0](x), model[0](x))
    for _ in range(200):
        tempering.step()
    torch.testing.assert_close(model[0](x), model[0].eval()(x))


def test_hessian_rule_reaches_every_quantizer_and_leaves_the_model():
    model, x, y = net()
    tempering = NoiseTempering(model, 10, delta="hessian")
    model.train()
    before = copy.deepcopy(model.state_dict())
    found = tempering.update_delta([(x, y), (x.flip(0), y.flip(0))], F.cross_entropy)
    assert set(found) == {name for name, _ in ff.quant.quantizers(model)}
    assert all(0 < value <= 1 for value in found.values())
    after = model.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before if not k.endswith(".delta"))
    assert all(float(after[f"{k}.delta"]) == pytest.approx(v) for k, v in found.items())
    assert model.training
    assert not [p for p in model.parameters() if p.grad is not None]


def test_traces_are_those_of_the_dense_hessian():
    model, x, y = net()
    tempering = NoiseTempering(model, 10, delta="hessian")
    quantizer = model[4].input_quantizer
    found = tempering.update_delta([(x, y)], F.cross_entropy, probes=800)["4.input_quantizer"]
    model.eval()
    inputs = []
    handle = quantizer.register_forward_hook(lambda _m, _i, out: inputs.append(out.detach()))
    model(x)
    handle.remove()
    weight = model[4].quantized_weight().detach()

    def loss(z):
        return F.cross_entropy(F.linear(z.view_as(inputs[0]), weight, model[4].bias.detach()), y)

    z = inputs[0].flatten()
    dense, g = torch.autograd.functional.hessian(loss, z), torch.autograd.functional.jacobian(loss, z)
    want = float(quantizer.step.detach()) * float(dense.trace()) / z.numel() / (3 * float(g.std(correction=0)))
    assert 0 < want < 1
    assert found == pytest.approx(want, rel=0.15)


def test_learned_delta_is_trained_and_stays_in_range():
    model, x, y = net()
    tempering = NoiseTempering(model, 10, delta="learned")
    opt = torch.optim.SGD(ff.param_groups(model, lr=0.1, weight_decay=1e-3))
    deltas = [q.delta for _, q in ff.quant.quantizers(model)]
    for _ in range(5):
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
        tempering.step()
    assert all(isinstance(d, nn.Parameter) and 0 <= float(d.detach()) <= 1 for d in deltas)
    assert any(float(d.detach()) != pytest.approx(1e-3) for d in deltas)


def test_checkpoint_continues():
    model, _, _ = net()
    tempering = NoiseTempering(model, 50)
    for _ in range(7):
        tempering.step()
    again, _, _ = net()
    other = NoiseTempering(again, 3)
    other.load_state_dict(tempering.state_dict())
    again.load_state_dict(model.state_dict())
    assert other.values() == tempering.values()
    assert float(again[0].weight_quantizer.nu) == pytest.approx(0.5 * 2.718281828 ** (-7 / 10))


def test_works_under_autocast():
    model, x, y = net()
    NoiseTempering(model, 10)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(x).float(), y)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"delta": "guess"}, "delta must be one of fixed, hessian, learned, got 'guess'"),
        ({"a": 2.0}, "a must lie in 0 to 1, got 2.0"),
        ({"nu": float("nan")}, "nu must be finite and at least 0, got nan"),
        ({"tau": 0}, "tau must be a positive int, got 0"),
    ],
)
def test_options_are_refused(options, line):
    model, _, _ = net()
    with pytest.raises(ValueError, match=line):
        NoiseTempering(model, 10, **options)
    assert all(q.spec.noise == "none" for _, q in ff.quant.quantizers(model))


def test_models_are_refused():
    with pytest.raises(ValueError, match="model must have quantizers, got none"):
        NoiseTempering(nn.Linear(2, 2), 10)
    fixed = ff.prepare(nn.Linear(2, 2), weights=ff.QuantSpec(bits=4))
    with pytest.raises(ValueError, match="estimator 'lsq' or 'ewgs' and no other noise, got estimator='ste'"):
        NoiseTempering(fixed, 10)
    model, _, _ = net()
    tempering = NoiseTempering(model, 10, delta="hessian")
    with pytest.raises(ValueError, match="batches must bring inputs to some quantizer, got none"):
        tempering.update_delta([], F.cross_entropy)

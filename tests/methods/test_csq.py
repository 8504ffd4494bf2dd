# SPDX-License-Identifier: Apache-2.0
"""CSQ in a plain loop: on its target, exact at the end, resumable, and clear about what it cannot take."""

import copy

import pytest
import torch
from torch import nn

import fastflat as ff
from fastflat.methods import CSQ
from fastflat.methods.csq import grid_bits


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


def train(model, csq, steps=range(20), total=20):
    opt = torch.optim.SGD(csq.param_groups(weight_decay=1e-4), lr=0.1, momentum=0.9)
    for step in steps:
        g = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 1, 8, 8, generator=g), torch.randint(3, (8,), generator=g)
        csq.schedule(step / total)
        opt.zero_grad()
        (nn.functional.cross_entropy(model(x), y) + csq.penalty()).backward()
        opt.step()


def test_is_exact_and_on_its_target():
    model = network()
    names = list(model.state_dict())
    csq = CSQ(model, planes=6, target=2.5, strength=0.3)
    train(model, csq)
    layers = csq.harden()
    assert CSQ.mean_bits(layers) <= 2.5
    assert all(layer.bits >= 1 for layer in layers.values())
    assert sorted(model.state_dict()) == sorted(names)
    assert sorted(n for n, p in model.named_parameters() if p.requires_grad) == sorted(names)
    for name, layer in layers.items():
        assert torch.equal(model.get_submodule(name).weight, layer.step * layer.codes)
    with pytest.raises(RuntimeError, match="must be in its planes"):
        csq.penalty()


def test_resumes_with_the_models_state():
    first, second = network(), network()
    a, b = (CSQ(m, planes=4, target=2, strength=0.3) for m in (first, second))
    train(first, a, range(18))  # past the search
    assert a.fixed
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert b.fixed
    assert a.bits() == b.bits()
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(first(x), second(x))
    train(first, a, range(18, 20))
    train(second, b, range(18, 20))
    assert torch.equal(first(x), second(x))


def test_beside_quantized_activations_and_autocast():
    model = ff.prepare(network(), activations=ff.QuantSpec(bits=8))
    ff.calibrate(model, [torch.randn(4, 1, 8, 8)])
    csq = CSQ(model, planes=4, target=3)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.randn(4, 1, 8, 8)).float().square().mean() + csq.penalty()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad and p.dim())


def test_closes_the_weakest_planes_opens_the_strongest_and_keeps_one():
    layer = nn.Linear(4, 4)
    csq = CSQ(layer, planes=4, target=1)
    with torch.no_grad():
        layer.parametrizations.weight[0].m.copy_(torch.tensor([0.5, -1.0, 0.9, 0.5]))
    csq.fix()
    assert (layer.parametrizations.weight[0].m > 0).tolist() == [False, False, True, False]
    csq = CSQ(layer := nn.Linear(4, 4), planes=4, target=3)
    with torch.no_grad():
        layer.parametrizations.weight[0].m.copy_(torch.tensor([0.5, -1.0, -0.2, -0.3]))
    csq.fix()
    assert (layer.parametrizations.weight[0].m > 0).tolist() == [True, False, True, True]
    other = nn.Linear(4, 4)
    csq = CSQ(other, planes=2, target=1)
    with torch.no_grad():
        other.parametrizations.weight[0].m.copy_(torch.tensor([-2.0, -1.0]))
    assert csq.fix() == {"": 1}


@pytest.mark.parametrize(("kept", "bits"), [((True,) * 3, 4), ((False, True, True), 3), ((True, False, True), 4)])
def test_bits_of_a_grid(kept, bits):
    assert grid_bits(kept) == bits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"planes": 0}, "planes must be an int from 1 to 16, got 0"),
        ({"target": 0.5}, r"target must lie in 1 to planes \(8\), got 0.5"),
        ({"target": 9}, "target must lie in 1 to planes"),
        ({"strength": -1.0}, "strength must be a finite number"),
        ({"end": float("nan")}, "end must be a finite number"),
        ({"search": 0.0}, "search must lie in 0 to 1"),
        ({"skip": ("*",)}, "must hold a linear, convolution or embedding layer"),
    ],
)
def test_refused(options, message):
    model = network()
    with pytest.raises(ValueError, match=message):
        CSQ(model, **options)
    assert list(model.state_dict()) == list(network().state_dict())


def test_refused_weights():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="weights must not be shared, got one of 0 and 1"):
        CSQ(model)
    with pytest.raises(ValueError, match="weights must be in floats"):
        CSQ(ff.prepare(network(), weights=ff.QuantSpec(bits=4)))
    model = network()
    model[3].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="weights must be finite, got NaN or infinity in 3"):
        CSQ(model)

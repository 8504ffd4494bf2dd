# SPDX-License-Identifier: Apache-2.0
"""Searches of widths: within the budget, ordinary layers at the end, clear refusals."""

import pytest
import torch
from torch import nn

import fastflat as ff
from fastflat.methods import SoftBits, sensitive_bits
from fastflat.methods.mixed_precision import KINDS, SCORES


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 3))


def mean(bits, model):
    sizes = {name: model.get_submodule(name).weight.numel() for name in bits}
    return sum(b * sizes[name] for name, b in bits.items()) / sum(sizes.values())


@pytest.mark.parametrize("kind", KINDS)
def test_soft_searches_end_within_the_budget(kind):
    model, x, y = network(), torch.randn(32, 6), torch.randint(3, (32,))
    held = [m.weight for m in model if isinstance(m, nn.Linear)]
    soft = SoftBits(model, kind=kind, widths=(2, 3, 4, 8), target=3.5, strength=5.0, skip=("4",))
    first = float(soft.expected_bits().detach())
    opt = torch.optim.Adam(model.parameters(), 0.03)
    before = [p.detach().clone() for p in held]
    for _ in range(30):
        opt.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x).float(), y) + soft.penalty()
        loss.backward()
        opt.step()
    assert abs(float(soft.expected_bits().detach()) - 3.5) < abs(first - 3.5)
    bits = soft.finish()
    assert set(bits) == {"0", "2"}
    assert mean(bits, model) <= 3.5
    after = [m.weight for m in model if isinstance(m, nn.Linear)]
    assert all(a is b for a, b in zip(held, after, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    ff.prepare(model, weights=ff.QuantSpec.lsq(bits=4), bits=bits)
    assert len(model[0].quantized_weight().unique()) <= 2 ** bits["0"]
    with pytest.raises(RuntimeError, match="finish"):
        soft.penalty()


@pytest.mark.parametrize("kind", SCORES)
def test_sensitivities_leave_the_model_and_spend_on_what_matters(kind):
    model, x, y = network().eval(), torch.randn(64, 6), torch.randint(3, (64,))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    data = None if kind == "weights" else [(x, y)]
    bits = sensitive_bits(model, nn.functional.cross_entropy, data, target=3, kind=kind, widths=(2, 3, 4))
    assert mean(bits, model) <= 3
    assert set(
        sensitive_bits(model, nn.functional.cross_entropy, data, target=4, kind=kind, widths=(2, 4)).values()
    ) == {4}
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())


def test_resumes_from_the_models_state():
    a, b = network(), network()
    first, second = (SoftBits(m, kind="edmips", widths=(2, 4), target=3) for m in (a, b))
    with torch.no_grad():
        a[0].parametrizations.weight[0].logits.copy_(torch.tensor([3.0, -1.0]))
    b.load_state_dict(a.state_dict())
    assert first.choose() == second.choose()
    x = torch.randn(2, 6)
    assert torch.equal(a(x), b(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "haq"}, "kind must be one of dnas, edmips, fracbits, diffq, got 'haq'"),
        ({"widths": (4, 2)}, "widths must be ascending ints"),
        ({"widths": ()}, "widths must be ascending ints"),
        ({"widths": tuple(range(2, 11))}, "8 candidates at most"),
        ({"target": 1.5}, "target must be at least the narrowest width, 2, got 1.5"),
        ({"tau": 0.0}, "tau positive"),
        ({"skip": ("*",)}, "must hold a linear or convolution layer"),
    ],
)
def test_refused(options, message):
    model = network()
    with pytest.raises(ValueError, match=message):
        SoftBits(model, **{"kind": "dnas", "target": 4, **options})
    assert list(model.state_dict()) == list(network().state_dict())


def test_refused_models_and_data():
    model = network()
    with pytest.raises(ValueError, match="kind='weights' needs none"):
        sensitive_bits(model, target=4)
    with pytest.raises(ValueError, match="kind must be one of trace"):
        sensitive_bits(model, target=4, kind="hessian")
    with pytest.raises(ValueError, match="weights must be in floats"):
        SoftBits(ff.prepare(network(), weights=ff.QuantSpec(bits=4)), kind="dnas", target=4)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="must not be shared"):
        SoftBits(model, kind="dnas", target=4)

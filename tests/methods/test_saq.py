# SPDX-License-Identifier: Apache-2.0
"""SAQ over LIQ layers and the generator of widths: budgets, states, what it leaves alone, what it refuses."""

import copy

import pytest
import torch
from torch import nn

import fastflat as ff
from fastflat.methods import SAMQ, SAQ, prepare_liq


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 16), nn.Linear(16, 3)
    )


def searched(target=2e4):
    model, x = network(), torch.randn(8, 1, 8, 8)
    layers = prepare_liq(model, x, skip=("5",))
    opt = SAQ(
        model, rho=0.1, lr=0.02, momentum=0.9, model=model, quantizers=[(s.liq, s.latent) for s in layers.values()]
    )
    y = torch.randint(3, (8,))
    return model, layers, opt, lambda: nn.functional.cross_entropy(model(x), y)


def test_counts_keep_modes_and_buffers():
    model = network().train()
    model[1].eval()
    before = {k: v.clone() for k, v in model[1].state_dict().items()}
    layers = prepare_liq(model, torch.randn(3, 1, 8, 8), skip=("5",))
    assert {n: layer.multiplies for n, layer in layers.items()} == {"0": 36 * 36, "4": 144 * 16}
    assert model.training
    assert not model[1].training
    assert all(torch.equal(v, model[1].state_dict()[k]) for k, v in before.items())


def test_an_update_moves_the_controller_alone():
    model, layers, opt, loss = searched()
    search = SAMQ(model, layers, target=9 * (1296 + 2304))
    before, own = copy.deepcopy(model.state_dict()), copy.deepcopy(search.state_dict())
    reward = search.update(opt, loss)
    after = model.state_dict()
    assert reward > 0
    assert all(torch.equal(v, after[k]) for k, v in before.items() if not k.endswith("_extra_state"))
    assert all(p.grad is None for p in model.parameters())
    assert any(not torch.equal(v, search.state_dict()[k]) for k, v in own.items() if k.startswith("head"))


def test_finds_the_budget():
    """With a loss that rewards nothing, REINFORCE goes to the target; the choice never exceeds it."""
    model, layers, _, _ = searched()
    search = SAMQ(model, layers, target=9 * (1296 + 2304), strength=30.0, lr=0.02, unit=1e5)
    torch.manual_seed(1)

    def far():
        with torch.no_grad():
            draws = [search.bops(search.draw().bits) for _ in range(20)]
        return sum((b - search.target) ** 2 for b in draws) / 20

    first = far()
    for _ in range(80):
        search.reinforce(search.draw(), 0.0)
    assert far() < 0.5 * first
    assert search.bops(search.choose()) <= search.target
    other = SAMQ(model, layers, target=search.target, lr=0.02)
    other.load_state_dict(search.state_dict())
    assert other.choose() == search.choose()


def test_widths_travel_with_the_state():
    a, b = (searched()[0] for _ in range(2))
    layers = {"0": a[0].parametrizations.weight[0], "4": a[4].parametrizations.weight[0]}
    for liq, at in zip(layers.values(), (0, 2), strict=True):
        liq.chosen = at
    b.load_state_dict(a.state_dict())
    assert [b[i].parametrizations.weight[0].chosen for i in (0, 4)] == [0, 2]
    assert len(a[0].weight.unique()) <= 4


@pytest.mark.parametrize("case", [1, 2, 3])
def test_trains_in_all_cases(case):
    model, x, y = network(), torch.randn(8, 1, 8, 8), torch.randint(3, (8,))
    layers = prepare_liq(model, x, widths=(4,))
    pairs = [(s.liq, s.latent) for s in layers.values()]
    opt = SAQ(model, rho=0.05, case=case, lr=0.05, momentum=0.9, quantizers=pairs)

    def closure():
        opt.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x).float(), y)
        loss.backward()
        return loss

    losses = [float(opt.step(closure).detach()) for _ in range(25)]
    assert losses[-1] < 0.6 * losses[0]


def test_refused():
    x = torch.randn(4, 1, 8, 8)
    model = network()
    with pytest.raises(ValueError, match="widths must be ascending ints from 2 to 16"):
        prepare_liq(model, x, widths=(4, 2))
    with pytest.raises(ValueError, match="must hold a linear or convolution layer"):
        prepare_liq(model, x, skip=("*",))
    with pytest.raises(ValueError, match="weights must be in floats"):
        prepare_liq(ff.prepare(network(), weights=ff.QuantSpec(bits=4)), x)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="must not be shared"):
        prepare_liq(tied, torch.randn(2, 4))
    twice = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="must reach each layer once, got 2 calls"):
        prepare_liq(nn.Sequential(twice, twice), torch.randn(2, 4))
    assert list(model.state_dict()) == list(network().state_dict())
    layers = prepare_liq(model, x)
    with pytest.raises(ValueError, match="target must be at least that of the narrowest choice"):
        SAMQ(model, layers, target=10.0)
    with pytest.raises(ValueError, match="layers must be those of prepare_liq, got none"):
        SAMQ(model, {}, target=10.0)
    search = SAMQ(model, layers, target=1e6)
    draw = search.draw()
    with pytest.raises(ArithmeticError, match="reward is nan"):
        search.reinforce(draw, float("nan"))

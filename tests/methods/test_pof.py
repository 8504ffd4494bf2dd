# SPDX-License-Identifier: Apache-2.0
"""Weak heads: what they leave as it was, the modes they work in, and what is refused."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastflat as ff
from fastflat.methods import pof as module


def _net(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3, bias=bias))


def _batch(count=40, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=g), torch.randint(3, (count,), generator=g)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_only_the_head_changes_and_comes_back(bias, training):
    net = _net(bias).train(training)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    pof = ff.methods.PoF(net)
    with pof.weakened(*_batch()):
        assert pof.is_weak
        inside = net.state_dict()
        assert {k for k in before if not torch.equal(before[k], inside[k])} == {
            "3.weight",
            *({"3.bias"} if bias else ()),
        }
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert net.training is training
    assert 0 < float(pof.shift) <= 2 * float(pof.length)


def test_an_exception_gives_the_head_back():
    net = _net()
    before, pof = net[3].weight.detach().clone(), ff.methods.PoF(net)
    with pytest.raises(KeyError), pof.weakened(*_batch()):
        raise KeyError("stop")
    assert torch.equal(net[3].weight, before)
    with pytest.raises(ValueError, match=r"y must be int64 \[N=40\], got torch.int64 \[3\]"):
        pof.weaken(_batch()[0], _batch(3)[1])
    assert torch.equal(net[3].weight, before)


def test_the_features_are_what_is_trained():
    net, (x, y) = _net(), _batch()
    head = [p.detach().clone() for p in net[3].parameters()]
    before = [p.detach().clone() for p in net[:3].parameters()]
    pof = ff.methods.PoF(net)
    opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for step in range(3):
        with pof.weakened(*_batch(64, step)):
            opt.zero_grad()
            F.cross_entropy(net(x), y).backward()
            opt.step()
    assert all(torch.equal(p, q) for p, q in zip(net[3].parameters(), head, strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(net[:3].parameters(), before, strict=True))
    assert not any(p.requires_grad for p in net[3].parameters())
    pof.finish()
    assert all(p.requires_grad for p in net[3].parameters())


def test_t_is_the_least_of_the_grid():
    """Against heads that are built one by one."""
    net, (x, y) = _net().eval(), _batch()
    pof = ff.methods.PoF(net)
    pof.weaken(x, y)
    pof.restore()
    features, head = net[:3](x).detach(), net[3]
    own = nn.Linear(12, 3)
    own.load_state_dict(head.state_dict())
    F.cross_entropy(own(features), y).backward()

    def loss(t):
        w, b = own.weight - t * own.weight.grad, own.bias - t * own.bias.grad
        return float(F.cross_entropy(features @ w.T + b, y).detach())

    t = 1.0
    while loss(t) <= loss(0.0):
        t *= 2
    grid = [t * k / 16 for k in range(1, 17)]
    assert float(pof.length) == pytest.approx(min(grid, key=loss), abs=t / 16 + 1e-6)
    assert loss(float(pof.length)) == pytest.approx(min(map(loss, grid)), abs=1e-6)


def test_autocast_and_half_precision():
    net = _net()
    pof = ff.methods.PoF(net)
    with torch.autocast("cpu", dtype=torch.bfloat16), pof.weakened(*_batch()):
        assert float(pof.length) > 0
    half = _net().bfloat16()
    before = half[3].weight.detach().clone()
    pof = ff.methods.PoF(half)
    with pof.weakened(_batch()[0].bfloat16(), _batch()[1]):
        assert not torch.equal(half[3].weight, before)
    assert torch.equal(half[3].weight, before)


def test_separable_and_infinite_features_leave_the_head():
    net = nn.Sequential(nn.Identity(), nn.Linear(2, 2))
    net[0].weight = nn.Parameter(torch.ones(1))
    pof = ff.methods.PoF(net)
    x, y = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
    for features in (x, x * torch.inf):
        with pof.weakened(features, y):
            assert float(pof.length) == float(pof.shift) == 0


def test_draws_are_those_of_the_generator():
    shifts = []
    for _ in range(2):
        pof = ff.methods.PoF(_net(), generator=torch.Generator().manual_seed(7))
        pof.weaken(*_batch())
        shifts.append(float(pof.shift))
    assert shifts[0] == shifts[1]


def test_hook_begins_late_and_takes_the_batches_before():
    net, hook = _net(), module._PostTraining(0.5, memory=20)
    opt = ff.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    hook.prepare(net)
    hook.start(net, opt, 6)
    weak, heads = [], []
    for step in range(6):
        hook.before(step)
        weak.append(hook._pof is not None and hook._pof.is_weak)
        opt.zero_grad()
        hook.loss(net, *_batch(8, step))[0].backward()
        opt.step()
        hook.after(step)
        heads.append(net[3].weight.detach().clone())
    assert weak == [False] * 3 + [True] * 3
    assert not torch.equal(heads[1], heads[2])
    assert torch.equal(heads[2], heads[5])
    assert [len(y) for _, y in hook._batches] == [8, 8, 8]
    other = module._PostTraining(0.5, memory=20)
    other.load_state_dict(hook.state_dict())
    assert all(torch.equal(a, b) for p, q in zip(hook._batches, other._batches, strict=True) for a, b in zip(p, q))
    hook.finish()
    assert net[3].weight.requires_grad


def test_refused():
    tied = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    tied[2].weight = tied[0].weight
    fixed = _net()
    for p in fixed[:3].parameters():
        p.requires_grad_(False)
    quantized = ff.prepare(_net(), weights=ff.QuantSpec(bits=4))
    for model, options, message in (
        (nn.Sequential(nn.ReLU()), {}, "model must have a linear layer as its head, got none"),
        (_net(), {"head": "4"}, "head must be the name of a layer, got '4'"),
        (_net(), {"head": "1"}, "head must be a plain torch.nn.Linear, got '1', a BatchNorm1d"),
        (quantized, {}, "head must be a plain torch.nn.Linear, got '3', a QuantLinear"),
        (tied, {}, "head must have weights of its own, got one shared with 0"),
        (fixed, {}, "model must have parameters before the head that require a gradient, got none"),
        (_net(), {"span": -1.0}, "span must be a finite number of at least 0, got -1.0"),
        (3, {}, "model must be a torch.nn.Module"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            ff.methods.PoF(model, **options)
    behind = nn.Sequential(_net(), nn.Softmax(1))
    with pytest.raises(ValueError, match=r"model must return what its head '0\.3' gives, got something else"):
        ff.methods.PoF(behind).weaken(*_batch())

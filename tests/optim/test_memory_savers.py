# SPDX-License-Identifier: Apache-2.0
"""AdamW with 8-bit states, and fp32 copies of 16-bit weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastflat.optim import SGD, AdamW8bit, MasterWeights
from fastflat.optim.eight_bit import Blocks, _values


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest_values(signed):
    values = _values(signed)
    assert len(values.unique()) == 256
    assert values.max() == 1
    assert (values == 0).any()
    # Blocks of one value each of the table, with 1 among them as the largest.
    x = torch.cat([values, values * 3.0, torch.zeros(256)])
    codes, most = Blocks.encode(x, signed)
    assert (codes.dtype, most.tolist()) == (torch.uint8, [1.0, 3.0, 0.0])
    torch.testing.assert_close(Blocks.decode(codes, most, signed), x)
    x = torch.randn(1000) if signed else torch.rand(1000)
    rows = nn.functional.pad(x, (0, 24)).view(4, 256)
    scaled = values[None, None] * rows.abs().amax(1)[:, None, None]
    best = (rows[..., None] - scaled).abs().amin(2).flatten()[:1000]
    torch.testing.assert_close((Blocks.decode(*Blocks.encode(x, signed), signed) - x).abs(), best, rtol=1e-4, atol=1e-6)


def test_small_parameters_are_those_of_adamw():
    torch.manual_seed(0)
    a, b = (nn.Parameter(torch.linspace(-1, 1, 30)) for _ in range(2))
    ours, theirs = AdamW8bit([a], lr=0.1, weight_decay=0.1), torch.optim.AdamW([b], lr=0.1, weight_decay=0.1)
    for _ in range(20):
        a.grad = torch.randn(30)
        b.grad = a.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(a, b)
    assert ours.state[a]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_have_eight_bits_and_go_on_after_a_stop(dtype, tmp_path):
    torch.manual_seed(0)
    p, gradients = nn.Parameter(torch.randn(5000).to(dtype)), [torch.randn(5000).to(dtype) for _ in range(6)]
    opt = AdamW8bit([p], lr=0.01)
    for step, g in enumerate(gradients):
        if step == 3:
            torch.save(opt.state_dict(), tmp_path / "state.pt")
            other = nn.Parameter(p.detach().clone())
            resumed = AdamW8bit([other], lr=0.5)
            resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        p.grad = g
        opt.step()
        if step >= 3:
            other.grad = g.clone()
            resumed.step()
    assert torch.equal(p, other)
    assert sum(v.nbytes for v in opt.state[p].values() if isinstance(v, torch.Tensor)) < 2.1 * 5000


def test_a_small_second_moment_makes_no_large_step():
    """Beside a gradient of 1 those of 1e-6 have states near 0, both of them."""
    p = nn.Parameter(torch.zeros(4096))
    opt = AdamW8bit([p], lr=0.1, weight_decay=0.0)
    for _ in range(20):
        p.grad = torch.full((4096,), 1e-6)
        p.grad[::256] = 1.0
        opt.step()
    assert p.abs().max() < 20 * 0.1 * 2


def test_refused():
    p = nn.Parameter(torch.zeros(3))
    for options, text in (
        ({"lr": -1.0}, "lr must be at least 0, got -1.0"),
        ({"betas": (1.0, 0.9)}, r"betas must lie in \[0, 1\)"),
    ):
        with pytest.raises(ValueError, match=text):
            AdamW8bit([p], **options)
    for options, text in (
        ({"scale": 0.0}, "scale must be positive and finite"),
        ({"growth": 0}, "growth must be 1 or"),
    ):
        with pytest.raises(ValueError, match=text):
            MasterWeights([p], torch.optim.SGD, **options)
    with pytest.raises(TypeError, match=r"params must be tensors of floats, got torch\.int64"):
        MasterWeights([torch.zeros(1, dtype=torch.int64)], torch.optim.SGD)
    with pytest.raises(ValueError, match="params must hold a parameter, got none"):
        MasterWeights([], torch.optim.SGD)


def test_masters_step_as_fp32_weights_and_skip_what_overflows():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    whole, half = copy.deepcopy(model), model.half()
    for p, q in zip(whole.parameters(), half.parameters(), strict=True):
        p.data.copy_(q)
    groups = [{"params": half[0].parameters(), "lr": 0.05}, {"params": list(half[2].parameters())}]
    opt = MasterWeights(groups, lambda ps: SGD(ps, lr=0.1, momentum=0.9), scale=1024.0, growth=3)
    theirs = SGD(
        [{"params": whole[0].parameters(), "lr": 0.05}, {"params": whole[2].parameters()}], lr=0.1, momentum=0.9
    )
    for step in range(6):
        x = torch.randn(16, 6)
        opt.zero_grad()
        opt.scaled(half(x.half()).float().square().mean()).backward()
        if step == 1:
            next(half.parameters()).grad[0, 0] = torch.inf
            before = copy.deepcopy(half.state_dict())
            assert not opt.step()
            assert opt.scale == 512.0
            assert all(torch.equal(v, before[k]) for k, v in half.state_dict().items())
            continue
        assert opt.step()
        theirs.zero_grad()
        whole(x).square().mean().backward()
        theirs.step()
    assert opt.scale == 1024.0
    for p, q, m in zip(whole.parameters(), half.parameters(), opt._masters, strict=True):
        torch.testing.assert_close(p, m, rtol=0.02, atol=2e-3)
        assert torch.equal(m.half(), q)

    state = opt.state_dict()
    fresh = copy.deepcopy(half)
    with torch.no_grad():
        fresh[0].weight.zero_()
    groups = [{"params": fresh[0].parameters(), "lr": 0.05}, {"params": list(fresh[2].parameters())}]
    other = MasterWeights(groups, lambda ps: SGD(ps, lr=0.1, momentum=0.9), scale=1.0)
    other.load_state_dict(state)
    assert other.scale == 1024.0
    assert all(torch.equal(p, q) for p, q in zip(fresh.parameters(), half.parameters(), strict=True))
    with pytest.raises(ValueError, match="masters must have the shapes"):
        other.load_state_dict({**state, "masters": state["masters"][1:]})
    with torch.no_grad():
        fresh[0].weight.fill_(2.0)
    other.adopt()
    assert (other._masters[0] == 2).all()


def test_a_sparse_gradient_moves_nothing():
    """Not even the parameters before it."""
    dense, table = torch.nn.Parameter(torch.ones(4)), torch.nn.Embedding(5, 3, sparse=True)
    opt = AdamW8bit([dense, table.weight], lr=0.1)
    (dense.sum() + table(torch.tensor([1, 2])).sum()).backward()
    with pytest.raises(RuntimeError, match="gradients must be dense"):
        opt.step()
    assert torch.equal(dense, torch.ones(4))
    assert not opt.state

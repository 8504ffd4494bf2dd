# SPDX-License-Identifier: Apache-2.0
"""CURE: the penalty in the weights, and that a model stays as it was."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastflat as ff
from fastflat.methods import CURELoss, curvature_penalty


def some(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(activation=nn.Softplus):
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), activation(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 3))
    return nn.Sequential(*layers)


@pytest.mark.parametrize("squared", [True, False])
def test_gradient_beside_finite_differences(squared):
    """Of a linear model, whose signs, and so z, do not change with small steps."""
    model = nn.Linear(5, 2).double()
    x, y = some(6, 5).double(), torch.arange(6) % 2

    def loss():
        return curvature_penalty(model, x, y, 0.7, squared=squared).mean()

    loss().backward()
    found, step = model.weight.grad.clone(), 1e-6
    for i, j in ((0, 0), (1, 3)):
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                model.weight[i, j] += sign * step
                ends.append(float(loss()))
                model.weight[i, j] -= sign * step
        assert found[i, j].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-6)


def test_the_model_stays_as_it_was():
    model = network().train()
    model[1].eval()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    x, y = some(6, 1, 8, 8), torch.arange(6) % 3
    found = curvature_penalty(model, x, y, 0.5)
    assert found.shape == (6,)
    assert found.requires_grad
    assert [m.training for m in model] == [True, False, True, True, True, True]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert x.grad is None
    assert not x.requires_grad
    with torch.no_grad():
        again = curvature_penalty(model, x, y, 0.5)
    assert not again.requires_grad
    torch.testing.assert_close(again, found.detach())


@pytest.mark.parametrize("squared", [True, False])
def test_a_loss_without_curvature_has_zero_gradients(squared):
    model = nn.Linear(4, 3)
    nn.init.zeros_(model.weight)
    penalty = curvature_penalty(model, some(5, 4), torch.arange(5) % 3, 1.0, squared=squared)
    assert torch.equal(penalty, torch.zeros(5))
    penalty.sum().backward()
    assert torch.equal(model.weight.grad, torch.zeros(3, 4))


def test_training_lowers_the_curvature_of_a_quantized_network_under_autocast():
    model = ff.prepare(network(nn.ReLU), weights=ff.QuantSpec.lsq(bits=4, axis=0)).train()
    x, y = some(24, 1, 8, 8), torch.arange(24) % 3
    opt, objective, losses = torch.optim.Adam(model.parameters(), lr=1e-2), CURELoss(1.0, strength=4.0), []
    for step in range(12):
        opt.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=step < 2):
            loss, scores = objective(model, x, y)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert scores.shape == (24, 3)
    assert losses[-1] < losses[2]
    counts = [b for name, b in model.named_buffers() if name.endswith("num_batches_tracked")]
    assert counts[0] == 12
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_lengths_and_strength():
    objective, x, y = CURELoss((0.1, 0.5), strength=0), some(4, 5), torch.arange(4) % 3
    found = []
    for epoch in (0, 1, 7):
        objective.set_epoch(epoch)
        found.append(objective.h)
    assert found == [0.1, 0.5, 0.5]
    model = nn.Linear(5, 3)
    assert torch.equal(objective(model, x, y)[0], F.cross_entropy(model(x), y))
    loss, scores = CURELoss(0.3, 2.0, squared=False)(model, x, y)
    want = F.cross_entropy(scores, y) + 2 * curvature_penalty(model, x, y, 0.3, squared=False).mean()
    torch.testing.assert_close(loss, want)


def test_refused():
    model, x, y = nn.Linear(5, 3), some(4, 5), torch.arange(4) % 3
    with pytest.raises(ValueError, match="h must be a finite number over 0, got 0"):
        curvature_penalty(model, x, y, 0)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        curvature_penalty(F.relu, x, y, 0.1)
    with pytest.raises((TypeError, ValueError), match=r"x must be a floating tensor \[B, ...\]"):
        curvature_penalty(model, x.long(), y, 0.1)
    with pytest.raises((TypeError, ValueError), match=r"y must be integers \[B=4\]"):
        curvature_penalty(model, x, y[:2], 0.1)
    with pytest.raises(ValueError, match=r"model must return logits \[B=4, C\]"):
        curvature_penalty(nn.Flatten(0), x, y, 0.1)
    with pytest.raises(ValueError, match=r"loss must return one number for each sample, \[B=4\]"):
        curvature_penalty(model, x, y, 0.1, loss=F.cross_entropy)
    with pytest.raises((TypeError, ValueError), match="model must be differentiable in its inputs"):
        curvature_penalty(model, x, y, 0.1, loss=lambda scores, _: scores.detach().sum(1))
    coupled = nn.Sequential(model, nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(ValueError, match="model must keep samples apart, got 1 without running statistics"):
        curvature_penalty(coupled, x, y, 0.1)
    with torch.inference_mode(), pytest.raises((TypeError, ValueError), match=r"outside of torch\.inference_mode"):
        curvature_penalty(model, x, y, 0.1)
    with pytest.raises(ValueError, match="strength must be a finite number of at least 0, got -1"):
        CURELoss(strength=-1)
    with pytest.raises(ValueError, match="lengths must hold at least one"):
        CURELoss(())
    with pytest.raises(ValueError, match="epoch must be an integer of at least 0, got -1"):
        CURELoss().set_epoch(-1)

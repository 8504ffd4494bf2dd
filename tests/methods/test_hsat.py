# SPDX-License-Identifier: Apache-2.0
"""Curricula of adversarial training: curvature beside explicit Hessians, limits, samples that leave the batch, and that
a model stays as it was."""

import copy
import functools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastflat as ff
from fastflat import evaluate
from fastflat.functional import softmax_stats
from fastflat.methods import CurriculumAdversarialLoss, curriculum_attack, get, input_curvature


class Counted(nn.Module):
    """How many samples each pass of the model takes."""

    def __init__(self, model):
        super().__init__()
        self.model, self.seen = model, []

    def forward(self, x):
        self.seen.append(len(x))
        return self.model(x)


class Dome(nn.Module):
    """Two scores, x^2 and 0."""

    def forward(self, x):
        return torch.stack([x[:, 0].square(), torch.zeros_like(x[:, 0])], 1)


class Steep(nn.Module):
    """Two scores, sqrt(|x|) and 0: no derivative at 0."""

    def forward(self, x):
        return torch.stack([x[:, 0].abs().sqrt(), torch.zeros_like(x[:, 0])], 1)


def some(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(activation=nn.ReLU):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), activation(), nn.Flatten(), nn.Linear(144, 3)).eval()


def sample(n=12, dtype=torch.float32):
    return some(n, 1, 8, 8).sigmoid().to(dtype), torch.arange(n) % 3


def difficulty(metric, model, x, y):
    if metric == "hessian":
        return input_curvature(model, x, y)
    with torch.no_grad():
        return softmax_stats(model(x), y).gap


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_curvature_beside_explicit_hessians(activation):
    model, (x, y) = network(activation).double(), sample(4, torch.float64)

    def loss(row, label):
        return F.cross_entropy(model(row.view(1, 1, 8, 8)), label[None])

    each = [(functools.partial(loss, label=y[k]), x[k].flatten()) for k in range(4)]
    H = torch.stack([torch.autograd.functional.hessian(f, row) for f, row in each])
    g = torch.stack([torch.autograd.functional.jacobian(f, row) for f, row in each])
    exact = torch.linalg.eigvalsh(H)[:, -1]
    found = [input_curvature(model, x, y, products) for products in (1, 2, 12)]
    want = torch.einsum("bi,bij,bj->b", g, H, g) / g.square().sum(1)
    torch.testing.assert_close(found[0], want, rtol=1e-9, atol=0)
    for fewer, more in zip(found, [*found[1:], exact], strict=True):
        assert (fewer <= more * (1 + 1e-9)).all()
    torch.testing.assert_close(found[2], exact, rtol=1e-4, atol=0)
    if activation is nn.ReLU:  # rank C - 1
        torch.testing.assert_close(found[1], exact, rtol=1e-9, atol=0)


def test_negative_curvature_has_its_sign():
    x, y = torch.full((1, 1), 0.1, dtype=torch.float64), torch.zeros(1, dtype=torch.long)
    p = torch.sigmoid(-x.square())
    want = -2 * p + p * (1 - p) * (2 * x).square()
    assert want < 0
    torch.testing.assert_close(input_curvature(Dome(), x, y, 3), want[0])
    assert float(input_curvature(Dome(), torch.zeros_like(x), y)) == 0  # where the gradient vanishes


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("metric", ["probability", "hessian"])
def test_stopped_samples_leave_the_batch_and_change_nothing(metric, norm):
    model, (x, y) = Counted(network().double()), sample(24, torch.float64)
    psi, active = difficulty(metric, model, x, y), torch.arange(24) % 4 != 0
    limit, eps = psi.quantile(0.6), 0.1 if norm == "linf" else 1.0
    options = {"step": eps / 5, "steps": 6, "metric": metric, "norm": norm, "active": active, "random_start": False}
    found, seen = {}, {}
    for compact in (True, False):
        model.seen.clear()
        found[compact] = curriculum_attack(model, x, y, eps, limit, compact=compact, **options)
        seen[compact] = list(model.seen)
    torch.testing.assert_close(found[True], found[False], rtol=0, atol=1e-12)
    assert seen[False] == [24] * 7
    assert seen[True] == sorted(seen[True], reverse=True)
    assert seen[True][0] == 18
    assert seen[True][-1] < seen[True][1] < 18
    moved = (found[True] - x).flatten(1)
    assert moved.any()
    assert not moved[~active | (psi > limit)].any()
    assert (moved.abs().amax(1) if norm == "linf" else moved.norm(dim=1)).max() <= eps + 1e-12
    assert (difficulty(metric, model, found[True], y) <= psi.clamp(min=limit) + 1e-12).all()


def test_a_batch_that_stopped_takes_no_further_pass():
    model, (x, y) = Counted(network()), sample()
    assert torch.equal(curriculum_attack(model, x, y, 0.1, -1), x)
    assert model.seen == [12]
    model.seen.clear()
    assert torch.equal(curriculum_attack(model, x, y, 0.1, 1, active=torch.zeros(12, dtype=torch.bool)), x)
    assert model.seen == []


def test_random_start_beyond_the_limit_goes_back_to_x():
    model, (x, y) = network(), sample()
    psi = difficulty("probability", model, x, y)
    options = {"steps": 1, "step": 0.0, "generator": torch.Generator().manual_seed(0)}
    found = curriculum_attack(model, x, y, 0.3, psi, **options)  # each may stay as hard as it is
    still = (found == x).flatten(1).all(1)
    assert (difficulty("probability", model, found, y) <= psi + 1e-6).all()
    assert still.any()
    assert not still.all()


def test_limit_of_one_is_the_attack_of_evaluate():
    model, (x, y) = network().double(), sample(dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    want = evaluate.pgd(model, x, y, 0.1, steps=5, generator=g)
    g.manual_seed(0)
    torch.testing.assert_close(curriculum_attack(model, x, y, 0.1, 1.0, steps=5, generator=g), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("metric", ["probability", "hessian"])
def test_training_on_a_quantized_network_with_batch_norm(metric):
    model = ff.prepare(network(), weights=ff.QuantSpec.lsq(bits=4, axis=0)).train()
    x, y = sample()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    hook, losses = get("hsat").hook(eps=0.05, steps=3, metric=metric), []
    hook.start(model, opt, 8)
    for step in range(8):
        hook.before(step)
        opt.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=step == 0):
            loss, scores = hook.loss(model, x, y)
        assert scores.shape == (12, 3)
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    assert all(module.training for module in model.modules())
    assert losses[-1] < losses[0]
    counts = [b for name, b in model.named_buffers() if name.endswith("num_batches_tracked")]
    assert counts[0] == 8
    assert hook.state_dict()["limit"] == 1
    assert 8 * 12 <= hook.objective.samples <= 8 * 12 * 4


def test_leaves_the_model_and_the_random_state_alone():
    model, (x, y) = network(), sample()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    curriculum_attack(model, x, y, 0.1, 0.2, metric="hessian", generator=torch.Generator().manual_seed(0))
    input_curvature(model, x, y)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_curvature_is_limited_by_the_largest_of_late():
    model, (x, y) = network().double(), sample(dtype=torch.float64)
    options = {"eps": 0.1, "steps": 4, "metric": "hessian", "begin": 1.0, "random_start": False}
    objective = CurriculumAdversarialLoss(**options)
    _, scores = objective(model, x, y)
    torch.testing.assert_close(scores, model(evaluate.pgd(model, x, y, 0.1, steps=4, random_start=False)))
    most = objective.scale
    assert most >= input_curvature(model, x, y).max()
    assert objective.samples == 5 * 12
    with torch.no_grad():
        model[-1].weight.mul_(1e-3)
    objective(model, x, y)
    assert objective.samples == 2 * 5 * 12
    assert float(objective.scale) == pytest.approx(0.99 * float(most))
    other = CurriculumAdversarialLoss(**options)
    other.load_state_dict(copy.deepcopy(objective.state_dict()))
    assert other.state_dict() == objective.state_dict()
    fixed = CurriculumAdversarialLoss(**options, scale=1e-9)
    fixed.load_state_dict(objective.state_dict())
    assert torch.equal(fixed(model, x, y)[1], model(x))
    assert fixed.scale == 1e-9


def test_refused():
    model, (x, y) = network(), sample(6)
    for options, message in (
        ({"limit": math.nan}, "limit must be a number, a tensor or a function, got nan"),
        ({"limit": torch.ones(5)}, r"limit must hold one number or B=6, got torch.float32 \[5\]"),
        ({"metric": "loss"}, "metric must be one of probability, hessian, got 'loss'"),
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"products": 0}, "products must be an integer of at least 1, got 0"),
        ({"eps": torch.ones(1, 1, 1)}, "eps must be a number, got Tensor; put the normalisation into the model"),
        ({"eps": None}, "eps must be a number, got NoneType"),
        ({"limit": torch.ones(6) > 0}, "limit must hold one number or B=6, got torch.bool"),
        ({"lo": "0"}, "lo must be a number, got str"),
        ({"step": -1.0}, "step must be finite and at least 0, got -1"),
        ({"norm": "l1"}, "norm must be 'linf' or 'l2', got 'l1'"),
        ({"lo": 1.0}, "lo must be below hi everywhere, got lo 1, hi 1"),
        ({"eps": 8}, "eps must be at most the range of the data"),
        ({"y": y + 1}, "y must lie in 0 to 2"),
        ({"model": network().train()}, "model must keep samples apart"),
        ({"model": nn.Conv2d(1, 2, 3)}, r"model must return logits \[B=6, C\]"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            curriculum_attack(**{"model": model, "x": x, "y": y, "eps": 0.1, "limit": 0.3} | options)
    with pytest.raises(ValueError, match="products must be an integer of at least 1, got 0"):
        input_curvature(model, x, y, 0)
    for products in (1, 2):
        with pytest.raises(ValueError, match="gradients must be finite, got NaN or infinity"):
            input_curvature(Steep(), torch.zeros(2, 3), torch.arange(2), products)
    for options, message in (
        ({"begin": math.inf}, "begin must be a finite number, got inf"),
        ({"end": "1"}, "end must be a finite number, got '1'"),
        ({"ramp": 0}, "ramp must be above 0 and at most 1, got 0"),
        ({"scale": 1.0}, "scale must be None for the metric 'probability'"),
        ({"scale": 0.0, "metric": "hessian"}, "scale must be finite and above 0, got 0"),
        ({"metric": "loss"}, "metric must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            CurriculumAdversarialLoss(**options)
    objective = CurriculumAdversarialLoss()
    with pytest.raises(ValueError, match=r"share must lie in \[0, 1\], got 1.5"):
        objective.set_progress(1.5)
    with pytest.raises(ValueError, match="state must hold limit, scale, got limit"):
        objective.load_state_dict({"limit": 1.0})
    with pytest.raises(ValueError, match="limit must be a finite number, got nan"):
        objective.load_state_dict({"limit": math.nan, "scale": None})
    with pytest.raises(TypeError, match="scale must be one number or None, got str"):
        objective.load_state_dict({"limit": 1.0, "scale": "1"})
    assert objective.limit == 0.3

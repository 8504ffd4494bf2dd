# SPDX-License-Identifier: Apache-2.0
"""Noise of batches beside explicit matrices; what the learner finds, sets, keeps, leaves alone and refuses."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastflat as ff
from fastflat import curvature, methods
from fastflat.methods import lab
from fastflat.methods import rmt as module


def _net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def _data(count=24, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, dtype=torch.float64, generator=g), torch.randint(3, (count,), generator=g)


def _explicit(net, x, y):
    shapes = {k: p.shape for k, p in net.named_parameters()}
    flat = torch.cat([p.detach().flatten() for p in net.parameters()])

    def loss(w):
        parts = w.split([s.numel() for s in shapes.values()])
        params = {k: p.view(s) for (k, s), p in zip(shapes.items(), parts, strict=True)}
        return F.cross_entropy(torch.func.functional_call(net, params, (x,)), y)

    return torch.autograd.functional.hessian(loss, flat)


def _sgd(net, **options):
    return torch.optim.SGD(net.parameters(), **{"lr": 0.1, "momentum": 0.9, **options})


def test_noise_is_that_of_the_matrices():
    net, (x, y) = _net(), _data()
    op = curvature.Hessian(net, F.cross_entropy, [(x, y)])
    batches = list(zip(x.split(6), y.split(6), strict=True))
    whole = _explicit(net, x, y)
    E = torch.stack([_explicit(net, *batch) for batch in batches]) - whole
    u = torch.linalg.eigh(whole).eigenvectors[:, -1]
    want = (E @ u).square().sum(1).mean().sqrt()
    assert methods.hessian_noise(op, batches, 3 * u) == pytest.approx(float(want), rel=1e-9)
    v = torch.randn(len(u), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    want = (E @ (v / v.norm())).square().sum(1).mean().sqrt()
    assert methods.hessian_noise(op, batches) == pytest.approx(float(want), rel=1e-9)


def test_noise_and_rates_by_batch():
    assert methods.noise_of_batch(3.0, 256, 64) == 1.5
    # b = B / (1 - B/N): 100 for 50 of 100, 100/9 for 10 of 100.
    assert methods.noise_of_batch(3.0, 50, 10, examples=100) == pytest.approx(1.0)
    assert methods.noise_of_batch(3.0, 100, 10, examples=100) == 0.0
    assert methods.batch_eigenvalue(2.0, 0.0) == 2.0
    assert methods.sgd_rate(0.1, 100, 10, 2.0, 1.0, examples=100) == pytest.approx(0.1 * 2.5 / 2)


@pytest.mark.parametrize("ratio", [1.0, 0.25])
def test_eigenvalues_are_those_of_the_scaled_matrix(ratio):
    net, (x, y) = _net(), _data()
    head = {"params": net[2].parameters(), "lr": 0.1 * ratio}
    opt = torch.optim.SGD([{"params": net[0].parameters()}, head], lr=0.1, momentum=0.5)
    n = sum(p.numel() for p in net.parameters())
    learner = methods.LanczosLearner(net, F.cross_entropy, opt, lanczos_steps=n)
    learner.step(x, y)
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in (net[0], net[2])]
    root = torch.cat([torch.ones(sizes[0]), torch.full((sizes[1],), ratio**0.5)]).double()
    S = root[:, None] * _explicit(net, x, y) * root
    theta, U = torch.linalg.eigh(S)
    assert learner.largest == pytest.approx(float(theta[-1]), rel=1e-9)
    # The weights of the rule are those of its first vector, of signs drawn from the seed 0.
    v = curvature._vectors.rademacher(1, n, torch.Generator().manual_seed(0), dtype=torch.float64)[0] / n**0.5
    s = (2 * ((U.T @ v).square() * theta.clamp(max=0).square()).sum()).sqrt()
    assert learner.smallest == pytest.approx(2 * float(s), rel=1e-6)
    lr, momentum = methods.heavy_ball(learner.largest, learner.smallest)
    assert [g["lr"] for g in opt.param_groups] == pytest.approx([lr / 2, ratio * lr / 2])
    assert [g["momentum"] for g in opt.param_groups] == [momentum] * 2
    assert learner.products == n


def test_the_model_stays_as_it_is():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    net[4].eval()
    (x, y), opt = _data(), _sgd(net)
    before, state = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    modes = [m.training for m in net.modules()]
    methods.LanczosLearner(net, F.cross_entropy, opt).step(x.float(), y)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert [m.training for m in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in net.parameters())
    assert opt.param_groups[0]["lr"] != 0.1


@pytest.mark.parametrize("kind", [torch.optim.SGD, ff.optim.SGD, ff.optim.SAM])
def test_quantized_networks_learn(kind):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    x, y = _data(64)
    x, y = x.float(), x[:, :3].argmax(1)
    spec = ff.QuantSpec.lsq(bits=4)
    net = ff.prepare(net, weights=spec.replace(axis=0), activations=spec)
    ff.calibrate(net, [x])
    opt = kind(ff.param_groups(net, lr=0.01, scale_lr=0.001), momentum=0.9)
    learner = methods.LanczosLearner(net, F.cross_entropy, opt, every=10, lanczos_steps=10)

    def closure():
        opt.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss

    losses = []
    for _ in range(40):
        learner.step(x, y)
        losses.append(float(opt.step(closure).detach()))
    assert learner.products == 70  # at 0, 1, 2, 5, 10, 20, 30
    assert losses[-1] < 0.5 * losses[0]
    first, second = (g["lr"] for g in opt.param_groups)
    assert second == pytest.approx(first / 10)


def test_a_stopped_run_goes_on_as_it_would_have():
    ends = []
    for stop in (None, 5):
        net, (x, y) = _net(), _data()
        opt = _sgd(net)
        learner = methods.LanczosLearner(net, F.cross_entropy, opt, every=3)
        for step in range(8):
            if step == stop:
                state = json.loads(json.dumps(learner.state_dict()))
                saved, opt = opt.state_dict(), _sgd(net, lr=0.5)
                learner = methods.LanczosLearner(net, F.cross_entropy, opt, every=3)
                learner.load_state_dict(state)
                opt.load_state_dict(saved)
            learner.step(x, y)
            opt.zero_grad()
            F.cross_entropy(net(x), y).backward()
            opt.step()
        ends.append([p.detach() for p in net.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))


def test_means_of_measurements():
    net, opt = _net(), _sgd(_net())
    found = []
    for memory in (0.0, 0.5):
        opt = _sgd(net)
        learner = methods.LanczosLearner(net, F.cross_entropy, opt, every=1, memory=memory)
        seen = []
        for seed in range(3):
            learner.step(*_data(seed=seed))
            seen.append(learner.largest)
        found.append(seen)
    (a, b, c), means = found
    assert means == pytest.approx([a, (a + 2 * b) / 3, (a + 2 * b + 4 * c) / 7])


def test_zeros_of_a_convex_loss_do_not_make_the_momentum_one():
    """Scores shifted alike are one loss, so that the Hessian has zeros and nothing below."""
    torch.manual_seed(0)
    net, (x, y) = nn.Linear(4, 3).double(), _data()
    opt = _sgd(net)
    learner = methods.LanczosLearner(net, F.cross_entropy, opt, every=20, lanczos_steps=15, max_momentum=0.8)
    for _ in range(300):
        learner.step(x, y)
        opt.zero_grad()
        F.cross_entropy(net(x), y).backward()
        opt.step()
    assert learner.momentum == pytest.approx(0.8)
    assert all(p.grad.abs().max() < 1e-5 for p in net.parameters())


def test_a_flat_loss_sets_nothing():
    net, (x, y) = nn.Linear(4, 1).double(), _data()
    opt = _sgd(net)
    learner = methods.LanczosLearner(net, lambda out, _: out.mean(), opt)
    learner.step(x, y)
    assert learner.lr is None
    assert (opt.param_groups[0]["lr"], opt.param_groups[0]["momentum"]) == (0.1, 0.9)


def test_schedules_and_rates_that_are_tensors():
    net, (x, y) = _net(), _data()
    opt = _sgd(net, lr=torch.tensor(0.1))
    rate = opt.param_groups[0]["lr"]
    learner = methods.LanczosLearner(net, F.cross_entropy, opt, schedule=lambda step: 0.5**step)
    for step in range(3):
        learner.step(x, y)
        assert opt.param_groups[0]["lr"] is rate
        assert float(rate) == pytest.approx(learner.lr * 0.5**step)


def test_a_loss_that_is_not_finite_changes_nothing():
    net, (x, y) = _net(), _data()
    opt = _sgd(net)
    learner = methods.LanczosLearner(net, F.cross_entropy, opt, every=1)
    learner.step(x, y)
    before = learner.state_dict(), dict(opt.param_groups[0])
    with pytest.raises(FloatingPointError, match="a product with the operator holds NaN"):
        learner.step(x * torch.nan, y)
    assert (learner.state_dict(), dict(opt.param_groups[0])) == before


@pytest.mark.parametrize("kind", [ff.optim.SGD, ff.optim.SAM])
def test_the_hook_keeps_the_schedule_of_its_loop(kind):
    net, hook, rates = _net(), module._OnTheFly(every=2), []
    opt = kind(net.parameters(), lr=0.1, momentum=0.9)

    def after(step):
        rates.append(opt.param_groups[0]["lr"] * (step + 1) / hook.learner.lr)
        opt.load_state_dict(opt.state_dict())  # which makes other groups

    hook.after = after
    lab.fit(net, lambda _: opt, _data(), 6, 0, batch=12, schedule=lambda step: 1 / (step + 1), hook=hook)
    assert rates == pytest.approx([1.0] * 6)
    assert opt.param_groups[0]["momentum"] == hook.learner.momentum != 0.9
    assert hook.learner.products == 4 * 8  # at 0, 1, 2 and 4, once however many passes a step takes


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"every": 0}, "every must be an integer of at least 1, got 0"),
        ({"lanczos_steps": 1}, "lanczos_steps must be an integer of at least 2, got 1"),
        ({"factor": 0.0}, "factor must be a finite number over 0"),
        ({"memory": 1.0}, "memory must lie in 0 to 1, below 1"),
        ({"max_momentum": -0.1}, "max_momentum must lie in 0 to 1, below 1"),
        ({"optimizer": torch.optim.Adam}, "optimizer must be SGD without Nesterov and dampening, got Adam"),
        ({"optimizer": torch.optim.RMSprop}, "optimizer must be SGD without Nesterov and dampening, got RMSprop"),
        ({"optimizer": ff.optim.LARS}, "optimizer must be SGD without Nesterov and dampening, got LARS"),
        ({"sgd": {"nesterov": True}}, "optimizer must be SGD without Nesterov and dampening, got SGD"),
        ({"sgd": {"dampening": 0.5}}, "optimizer must be SGD without Nesterov and dampening, got SGD"),
        ({"sgd": {"lr": 0.0}}, "optimizer must have a rate over 0"),
    ],
)
def test_refused(options, line):
    net, options = _net(), dict(options)
    kind, of_sgd = options.pop("optimizer", None), options.pop("sgd", {})
    opt = kind(net.parameters(), lr=0.1) if kind else _sgd(net, **of_sgd)
    with pytest.raises(ValueError, match=line):
        methods.LanczosLearner(net, F.cross_entropy, opt, **options)


def test_refused_objects():
    net = _net()
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, got Sequential"):
        methods.LanczosLearner(net, F.cross_entropy, net)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got function"):
        methods.LanczosLearner(F.relu, F.cross_entropy, _sgd(net))
    with pytest.raises(ValueError, match="params must name parameters of the model"):
        methods.LanczosLearner(_net(), F.cross_entropy, _sgd(net))
    learner = methods.LanczosLearner(net, F.cross_entropy, _sgd(net))
    with pytest.raises(ValueError, match="state must hold count, largest"):
        learner.load_state_dict({"lr": 1.0})


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: methods.batch_eigenvalue(-1.0, 0.1), "eigenvalue must be a finite number of at least 0, got -1.0"),
        (lambda: methods.batch_eigenvalue(1.0, float("nan")), "noise must be a finite number of at least 0, got nan"),
        (lambda: methods.noise_of_batch(1.0, 0, 64), "batch must be a finite number over 0, got 0"),
        (lambda: methods.noise_of_batch(1.0, 64, 128, examples=100), "base_batch must be at most the examples"),
        (lambda: methods.noise_of_batch(1.0, 64, 100, examples=100), "base_batch must be less than the examples"),
        (lambda: methods.stable_rate(0.0), "eigenvalue must be a finite number over 0"),
        (lambda: methods.stable_rate(1.0, 1.0), "momentum must lie in 0 to 1, below 1"),
        (lambda: methods.sgd_rate(0.1, 64, 32, 0.0, 1.0), "eigenvalue must be a finite number over 0"),
        (lambda: methods.adam_rate(0.1, 0.0, 64, 32), "eps must be a finite number over 0"),
        (lambda: methods.heavy_ball(1.0, 2.0), r"smallest must lie in 0 to the largest \(1.0\), got 2.0"),
        (lambda: methods.hessian_noise(_operator(), []), "batches must hold at least one, got none"),
        (lambda: methods.hessian_noise(_operator(), [], torch.ones(4)), r"direction must be \[n=43\], got \[4\]"),
        (lambda: methods.hessian_noise(_operator(), [], torch.zeros(43)), "direction must have a length over 0"),
    ],
)
def test_refused_numbers(call, line):
    with pytest.raises(ValueError, match=line):
        call()


def _operator():
    return curvature.Hessian(_net(), F.cross_entropy, [_data()])

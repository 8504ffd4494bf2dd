# SPDX-License-Identifier: Apache-2.0
"""The bound on more kinds of networks, what the loss leaves alone, and the models that are refused."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastflat as ff
from fastflat.evaluate import weight_attack
from fastflat.methods import weight_margin as module
from fastflat.methods.lab.networks import MLP, ConvNet, ResNet20


class Viewed(nn.Module):
    """A network with sizes, functions and a layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 2, 3, padding="same", dilation=2)
        self.fc = nn.Linear(12, 3)

    def forward(self, x):
        x = torch.relu(self.conv(F.relu(self.conv(x))))
        return self.fc(x.view(x.size(0), -1))


def _bounded(model, x, y, eps, seed=0, **options):
    """Whether corners of the ball change no score by more than its bound."""
    margin = ff.methods.WeightMargin(model, eps, **options)
    bound, clean = margin.bound(x, y), model(x).detach()
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _ in range(6):
            for name in margin.layers:
                w = model.get_submodule(name).weight
                w.copy_(
                    kept[f"{name}.weight".lstrip(".")] + eps * torch.randn(w.shape, generator=g, dtype=w.dtype).sign()
                )
            change = model(x) - clean
            change = (change - change.gather(1, y[:, None])).abs()
            assert bool((change <= bound * (1 + 1e-12) + 1e-12).all())
        for name, p in model.named_parameters():
            p.copy_(kept[name])
    return bound


@pytest.mark.parametrize("eps", [1e-3, 0.1])
@pytest.mark.parametrize("kind", ["viewed", "convnet", "mlp", "linear"])
def test_the_bound_holds(kind, eps):
    torch.manual_seed(0)
    model, shape = {
        "viewed": lambda: (Viewed(), (2, 6)),
        "convnet": lambda: (ConvNet(1, 8, 3), (1, 8, 8)),
        "mlp": lambda: (MLP(1, 4, 3), (1, 4, 4)),
        "linear": lambda: (nn.Linear(5, 3), (5,)),
    }[kind]()
    model.double().eval()
    x, y = torch.randn(4, *shape).double(), torch.tensor([0, 2, 1, 0])
    bound = _bounded(model, x, y, eps)
    assert bool((bound > 0).all())


def test_certified_samples_bear_the_strongest_attack_found():
    torch.manual_seed(0)
    x, y = torch.randn(60, 5), torch.randint(3, (60,))
    x[:, :3] += 8 * F.one_hot(y, 3)
    model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3))
    opt = torch.optim.Adam(model.parameters(), lr=0.01)
    margin = ff.methods.WeightMargin(model, 0.01, margin=0.1)
    for _ in range(80):
        opt.zero_grad()
        margin(x, y)[0].backward()
        opt.step()
    sure = margin.certified(x, y)
    assert int(sure.sum()) > 10
    with weight_attack(model, F.cross_entropy, [(x, y)], 0.01, 20):
        assert bool((model(x).argmax(1) == y)[sure].all())


def test_a_wider_margin_bears_more():
    """At equal accuracy the loss rises less under attack, and the attacked accuracy is no lower."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 2, generator=g)
    y = (x[:, 0] > 0).long()
    x[:, 0] += torch.where(y == 1, 0.5, -0.5)
    ends = {}
    for strength in (0.0, 0.3):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 2))
        margin = ff.methods.WeightMargin(model, 0.05, margin=strength)
        opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(150):
            opt.zero_grad()
            margin(x, y)[0].backward()
            opt.step()
        with weight_attack(model, F.cross_entropy, [(x, y)], 0.1, 10) as attack:
            ends[strength] = float((model(x).argmax(1) == y).double().mean()), attack.losses[0], attack.losses[-1]
        assert float((model(x).argmax(1) == y).double().mean()) > 0.97
    plain, wide = ends[0.0], ends[0.3]
    assert wide[0] >= plain[0]
    assert wide[2] / wide[1] < plain[2] / plain[1]


def test_bounds_leave_the_model_as_it_was():
    model = ConvNet(1, 8, 3).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    margin = ff.methods.WeightMargin(model)
    margin.bound(torch.randn(4, 1, 8, 8), torch.zeros(4, dtype=torch.long))
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())
    with pytest.raises(ValueError, match=r"y must be integers \[B=4\], got torch.int64 \[3\]"):
        margin(torch.randn(4, 1, 8, 8), torch.zeros(3, dtype=torch.long))
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_autocast_half_and_dead_layers():
    model, y = MLP(1, 4, 3), torch.tensor([0, 1])
    x = torch.randn(2, 1, 4, 4)
    margin = ff.methods.WeightMargin(model, 0.01, 0.1, 0.01)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, scores = margin(x, y)
    assert scores.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
    half = MLP(1, 4, 3).bfloat16()
    loss, _ = ff.methods.WeightMargin(half)(x.bfloat16(), y)
    loss.backward()
    with torch.no_grad():
        model.fc2.weight.zero_()
        model.fc2.bias.zero_()
    model.zero_grad()
    loss, _ = margin(x * 0, y)
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


def test_hook_raises_eps():
    hook = module._Hook(0.1, 0.01, rise=0.5)
    hook.start(MLP(1, 4, 3), None, 8)
    seen = []
    for step in range(8):
        hook.before(step)
        seen.append(hook._margin.eps)
    assert seen == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1, 0.1, 0.1])


class _Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.b(x + self.a(x))


class _Branching(_Two):
    def forward(self, x):
        return self.a(x) if x.sum() > 0 else self.b(x)


def test_refused():
    linear = nn.Linear(3, 3)
    for model, options, message in (
        (_Two(), {}, "got add, which does not follow a alone"),
        (ResNet20(1, 8, 3), {}, "which does not follow"),
        (_Branching(), {}, "one that cannot be traced"),
        (nn.Sequential(linear, nn.GELU(), nn.Linear(3, 3)), {}, "got 1, a GELU"),
        (nn.Sequential(linear, nn.LeakyReLU(2.0), nn.Linear(3, 3)), {}, "got 1, a LeakyReLU"),
        (nn.Sequential(nn.BatchNorm1d(3), linear), {}, "a batch norm that is not behind a layer"),
        (nn.Sequential(linear, nn.ReLU()), {}, "model must end in a linear layer, got 0"),
        (nn.ReLU(), {}, "model must end in a linear layer, got no layer"),
        (nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"), linear), {}, "padding 'circular'"),
        (ff.prepare(nn.Sequential(nn.Linear(3, 3)), weights=ff.QuantSpec(bits=4)), {}, "a QuantLinear"),
        (linear, {"eps": -1.0}, "eps must be a finite number of at least 0, got -1.0"),
        (nn.Sequential(linear), {"layers": ["1"]}, "layers must be some of 0, got '1'"),
        (nn.Sequential(linear), {"layers": []}, "layers must be some of 0"),
        (3, {}, "model must be a torch.nn.Module"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            ff.methods.WeightMargin(model, **options)

# SPDX-License-Identifier: Apache-2.0
"""Sharpness-aware optimizers of others on fastflat's passes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastflat as ff


class SAM(torch.optim.Optimizer):
    """The interface that many projects copy, written from the paper (Foret et al. 2021; adaptive: Kwon et al. 2021)."""

    eta = 0.0

    def __init__(self, params, base_optimizer, rho=0.05, adaptive=False, **options):
        super().__init__(params, {"rho": rho, "adaptive": adaptive, **options})
        self.base_optimizer = base_optimizer(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    def weighed(self, p, group):
        return (p.abs() + self.eta) * p.grad if group["adaptive"] else p.grad

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        pairs = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([self.weighed(p, group).norm() for p, group in pairs]).norm()
        for p, group in pairs:
            self.state[p]["old_p"] = p.clone()
            t = (p.abs() + self.eta) if group["adaptive"] else 1.0
            p.add_(t * self.weighed(p, group) * (group["rho"] / (norm + 1e-12)))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.copy_(self.state[p]["old_p"])
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure):
        self.first_step(zero_grad=True)
        with torch.enable_grad():
            closure()
        self.second_step()


BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}),
    "nesterov": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "adam": (torch.optim.Adam, {"lr": 1e-2, "weight_decay": 1e-3}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-2}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 1e-3}),
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 33), nn.Tanh(), nn.Linear(33, 4))


def train(model, opt, steps=50, closure=False, schedule=None):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x, y = torch.randn(16, 12, generator=generator), torch.randint(0, 4, (16,), generator=generator)

        def loss(x=x, y=y):
            value = nn.functional.cross_entropy(model(x), y)
            value.backward()
            return value

        loss()
        if closure:
            opt.step(loss)
            opt.zero_grad()
        else:
            opt.first_step(zero_grad=True)
            loss()
            opt.second_step(zero_grad=True)
        if schedule is not None:
            schedule.step()


def close(theirs, ours):
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_fifty_steps_agree_to_rounding(base, adaptive):
    kind, options = BASES[base]
    theirs, ours = network(), network()
    a = SAM(theirs.parameters(), kind, rho=0.05, adaptive=adaptive, **options)
    b = SAM(ours.parameters(), kind, rho=0.05, adaptive=adaptive, **options)
    groups = b.param_groups
    train(theirs, a, 3)
    train(ours, b, 3)  # states that are there go on
    (entry,) = ff.accelerate_optimizer(b, strict=True).entries
    assert entry.swapped
    assert type(b).__name__ == "SAM"
    assert isinstance(b, SAM)
    train(theirs, a)
    train(ours, b)
    close(theirs, ours)
    assert b.param_groups is groups is b.base_optimizer.param_groups
    assert list(groups[0]) == list(a.param_groups[0])
    assert ff.restore(b) == 1
    train(theirs, a, 3)
    train(ours, b, 3)
    close(theirs, ours)
    for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
        for name, value in a.base_optimizer.state[p].items():
            torch.testing.assert_close(b.base_optimizer.state[q][name].float(), value.float(), rtol=1e-3, atol=1e-4)


def test_schedules_groups_and_restore_on_the_way():
    theirs, ours = network(), network()

    def made(model):
        groups = [{"params": model[0].parameters(), "rho": 0.1}, {"params": model[2].parameters(), "lr": 0.01}]
        opt = SAM(groups, torch.optim.SGD, lr=0.05, momentum=0.9)
        return opt, torch.optim.lr_scheduler.StepLR(opt.base_optimizer, 5, 0.5)

    (a, sa), (b, sb) = made(theirs), made(ours)
    ff.accelerate_optimizer(b, strict=True)
    train(theirs, a, 12, schedule=sa)
    train(ours, b, 12, schedule=sb)
    close(theirs, ours)
    assert ff.restore(b) == 1
    assert type(b) is SAM
    assert ff.restore(b) == 0
    train(theirs, a, 12, closure=True)
    train(ours, b, 12, closure=True)
    close(theirs, ours)
    saved = copy.deepcopy(b.base_optimizer.state_dict())
    ff.accelerate_optimizer(b, strict=True)
    b.base_optimizer.load_state_dict(saved)
    b.param_groups = b.base_optimizer.param_groups
    train(theirs, a, 5)
    train(ours, b, 5)
    close(theirs, ours)


def test_weights_come_back_bit_for_bit():
    model = network()
    opt = SAM(model.parameters(), torch.optim.SGD, lr=0.0, rho=0.3)
    ff.accelerate_optimizer(opt, strict=True)
    before = [p.detach().clone() for p in model.parameters()]
    train(model, opt, 3)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_others_are_left_alone():
    class Doubled(SAM):
        def first_step(self, zero_grad=False):
            super().first_step()
            super().first_step(zero_grad)

    model = network()
    options = {"lr": 0.1}
    (left,) = ff.accelerate_optimizer(Doubled(model.parameters(), torch.optim.SGD, **options)).left
    assert left.why == "first_step of step 1 leads elsewhere"
    shifted = SAM(model.parameters(), torch.optim.SGD, adaptive=True, **options)
    shifted.eta = 0.5
    with pytest.raises(ValueError, match=r"strict=True, but SAM cannot be swapped: first_step of step 1 leads"):
        ff.accelerate_optimizer(shifted, strict=True)
    plain = torch.optim.SGD(model.parameters(), **options)
    assert ff.accelerate_optimizer(plain).left[0].why == "it has no base_optimizer"
    with pytest.raises(TypeError, match=r"^fastflat::accelerate_optimizer: optimizer must be a torch.optim.Optimizer"):
        ff.accelerate_optimizer(model)


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_pytorch_optimizer(base):
    others = pytest.importorskip("pytorch_optimizer")
    kind, options = BASES[base]
    theirs, ours = network(), network()
    a = others.SAM(theirs.parameters(), kind, rho=0.05, **options)
    b = others.SAM(ours.parameters(), kind, rho=0.05, **options)
    ff.accelerate_optimizer(b, strict=True)
    train(theirs, a, 25)
    train(ours, b, 25)
    train(theirs, a, 25, closure=True)
    train(ours, b, 25, closure=True)
    close(theirs, ours)
    centred = others.SAM(ours.parameters(), kind, use_gc=True, **options)
    assert "use_gc" in ff.accelerate_optimizer(centred).left[0].why

# SPDX-License-Identifier: Apache-2.0
"""Runs a module beside its accelerated twin and compares every bit."""

from __future__ import annotations

import contextlib
import copy

import torch
from torch import nn

import fastflat as ff
from fastflat.integrations import Adapter

SPECIAL = (0.0, -0.0, 1e-45, -1e-39, 2.0**-126, 1e30, -3e38, float("inf"), -float("inf"), float("nan"))


def accelerated(module):
    """A copy that fastflat computes; all its quantizers must have been swapped."""
    twin = copy.deepcopy(module)
    report = ff.accelerate(twin, strict=True)
    assert report.swapped, report
    return twin


@contextlib.contextmanager
def by_fastflat_alone(monkeypatch):
    """Inside, no adapter may leave a call to the module's own forward."""

    def refuse(self, module, *args, **kwargs):
        raise AssertionError(f"{type(module).__name__} computed by itself")

    with monkeypatch.context() as patch:
        patch.setattr(Adapter, "original", refuse)
        yield


def data(shape, seed=0, dtype=torch.float32, special=False, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * scale
    x = torch.where(torch.rand(shape, generator=generator) < 0.2, (x * 8).round() / 16, x)  # ties of 2**-k steps
    if special:
        at = torch.randperm(x.numel(), generator=generator)[: max(x.numel() // 8, 1)]
        x.view(-1)[at] = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), at.shape, generator=generator)]
    return x.to(dtype)


def layouts(shape, seed=0, **options):
    """The same kind of data contiguous, channels_last and strided."""
    x = data(shape, seed, **options)
    yield x
    if x.dim() == 4:
        yield data(shape, seed + 1, **options).contiguous(memory_format=torch.channels_last)
    yield data((*shape[:-1], 2 * shape[-1]), seed + 2, **options)[..., ::2]
    if x.dim() >= 2:
        yield data((*shape[:-2], shape[-1], shape[-2]), seed + 3, **options).transpose(-1, -2)


def same(a, b):
    assert (a is None) == (b is None)
    if a is not None:
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.nan_to_num(0.25), b.nan_to_num(0.25))


def step(module, x, seed):
    """y, dx and the gradients of the parameters, by name."""
    x = x.detach().requires_grad_()
    y = module(x)
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    if not y.requires_grad:
        return y, None, dict.fromkeys(trained)
    found = torch.autograd.grad(y, [x, *trained.values()], data(y.shape, seed).to(y.dtype), allow_unused=True)
    return y.detach(), found[0], dict(zip(trained, found[1:], strict=True))


def assert_alike(theirs, ours, batches):
    """Results, gradients and state, batch after batch; gradients of parameters are sums in another order."""
    for seed, x in enumerate(batches):
        y, dx, gradients = step(theirs, x, seed)
        actual, actual_dx, found = step(ours, x, seed)
        same(y, actual)
        same(dx, actual_dx)
        for name, g in gradients.items():
            if g is None:
                assert found[name] is None
                continue
            tolerance = 2.0**-17 * x.abs().nan_to_num(posinf=0, neginf=0).sum() + 2.0**-12 * g.abs().max()
            torch.testing.assert_close(found[name], g, rtol=0, atol=float(tolerance))
        before, after = theirs.state_dict(), ours.state_dict()
        assert list(before) == list(after)
        for name in before:
            same(before[name], after[name])


def train(model, batches, steps, lr=0.05):
    """The losses of some steps of SGD with momentum, and all tensors afterwards."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    losses = []
    for i in range(steps):
        x, t = batches[i % len(batches)]
        loss = nn.functional.cross_entropy(model(x).flatten(1), t)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), {n: t.clone() for n, t in model.state_dict().items()}


def train_on_one_batch(model, side, order=None, steps=50):
    """Losses on 16 images of one batch, whose rows are taken in an order of their own: other sums, the same numbers."""
    generator = torch.Generator().manual_seed(3)
    x, t = torch.randn(16, 3, side, side, generator=generator), torch.randint(0, 4, (16,), generator=generator)
    order = torch.arange(16) if order is None else order
    return train(model, [(x[order], t[order])], steps)[0]


def assert_same_training(model, batches, steps=50, lr=0.05):
    """Trajectories of the model and of its accelerated copy, bit for bit."""
    ours = accelerated(model)
    losses, state = train(model, batches, steps, lr)
    found, after = train(ours, batches, steps, lr)
    assert torch.equal(losses, found)
    assert list(state) == list(after)
    for name in state:
        same(state[name], after[name])
    assert losses[-5:].mean() < losses[:5].mean()  # it learns something


def distance(a, b):
    return float(sum((a[n].double() - b[n].double()).square().sum() for n in a if a[n].is_floating_point()) ** 0.5)


def assert_within_spread(model, batches, steps=50, lr=0.05):
    """Ours lies no further from the peer's run than peer's runs on the same batches in another order of examples,
    whose gradients are the same sums in another order."""
    ours = accelerated(model)
    orders = [torch.Generator().manual_seed(seed) for seed in range(4)]
    runs = [train(copy.deepcopy(model), batches, steps, lr)[1]]
    for order in orders:
        shuffled = [(x[p], t[p]) for x, t in batches for p in (torch.randperm(len(x), generator=order),)]
        runs.append(train(copy.deepcopy(model), shuffled, steps, lr)[1])
    spread = max(distance(runs[0], r) for r in runs[1:])
    found = distance(runs[0], train(ours, batches, steps, lr)[1])
    assert spread > 0
    assert found <= spread, (found, spread)

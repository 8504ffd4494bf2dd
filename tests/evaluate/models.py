# SPDX-License-Identifier: Apache-2.0
"""Small models whose answers are known, and what must not change about any model."""

from __future__ import annotations

import contextlib
import copy

import torch
from torch import nn

import fastflat as ff


def linear(classes=3, size=6, dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(size, classes)).to(dtype)


def convolutional():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(4 * 64, 3)
    )


def quantized():
    model = ff.prepare(
        convolutional(), weights=ff.QuantSpec.lsq(bits=4, axis=0), activations=ff.QuantSpec.lsq(bits=4, signed=False)
    )
    return ff.calibrate(model, [images(8)[0]])


def images(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(count, 1, 8, 8, generator=g), torch.randint(0, 3, (count,), generator=g)


@contextlib.contextmanager
def unchanged(model):
    """Modes, buffers (the tensors themselves, unwritten), parameters, their gradients and the random state."""
    for p in model.parameters():
        p.grad = torch.full_like(p, 2.0)
    modes = [m.training for m in model.modules()]
    buffers = {n: (b, b._version) for n, b in model.named_buffers()}
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    yield
    assert [m.training for m in model.modules()] == modes
    for n, b in model.named_buffers():
        assert b is buffers[n][0], n
        assert b._version == buffers[n][1], n
    for n, t in model.state_dict().items():
        assert torch.equal(t, state[n]), n
    assert all(bool((p.grad == 2).all()) for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), rng)

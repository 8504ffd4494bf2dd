# SPDX-License-Identifier: Apache-2.0
"""Single operations between two nonlinear maps, against double backward; those with a rule without a warning."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.nn import functional as F

from fastflat.curvature import hvp

INDEX = torch.tensor([2, 0, 2, 3])
ROWS = torch.tensor([[0, 3, 1], [2, 2, 0], [1, 0, 3], [3, 1, 2]])

#: Of a tensor [4, 6].
OPERATIONS = {
    "advanced index": lambda x: x[:, INDEX] * x[INDEX][:, :4],
    "index with mask": lambda x: torch.where(x > 0, x.square(), torch.sin(x)),
    "gather": lambda x: x.gather(1, ROWS),
    "scatter_add": lambda x: torch.zeros_like(x).scatter_add(1, ROWS, x[:, :3]),
    "index_add": lambda x: x.index_add(0, INDEX, x.cos()),
    "index_select": lambda x: x.index_select(1, INDEX),
    "index_put": lambda x: x.index_put((INDEX,), x.sin(), accumulate=True),
    "masked_fill": lambda x: x.masked_fill(x > 0.5, 0.3),
    "roll, flip": lambda x: x.roll(2, 1) * x.flip(0),
    "repeat, expand": lambda x: x.repeat(2, 1)[:4] * x[:1].expand(4, 6),
    "cumsum": lambda x: x.cumsum(1),
    "split, unbind, stack": lambda x: torch.stack([a * b for a, b in zip(x.split(3, 1), x.unbind(0)[0].split(3))]),
    "slices": lambda x: x[1:, ::2] * x[:-1, 1::2],
    "pad": lambda x: F.pad(x, (1, 2), value=0.5),
    "triangle": lambda x: x.tril() + x.triu(1).square(),
    "norm": lambda x: x / x.norm(dim=1, keepdim=True),
    "variance": lambda x: (x - x.mean(1, True)) / (x.var(1, keepdim=True) + 0.1).sqrt(),
    "logsumexp": lambda x: x.logsumexp(1, keepdim=True) * x,
    "largest": lambda x: x.amax(1, keepdim=True) * x,
    "max": lambda x: x.max(1).values.unsqueeze(1) * x,
    "powers": lambda x: (x.abs() + 1) ** 1.5 + 2**x + (x.abs() + 1) ** x,
    "quotients": lambda x: 1 / (x + 9) - x / (x.exp() + 1) + (3 - x) / 2,
    "clamps": lambda x: x.clamp(-0.5, 0.5) + torch.maximum(x, x.square()),
    "einsum": lambda x: torch.einsum("ij,kj->ik", x, x.sin()),
    "batched product": lambda x: torch.bmm(x.view(2, 2, 6), x.view(2, 6, 2)),
    "matrix times vector": lambda x: x @ x[0] + x.view(-1)[:6] @ x[1],
    "pools": lambda x: F.max_pool1d(x[None], 2) + F.avg_pool1d(x[None], 2),
    "pool, overlapping": lambda x: F.max_pool2d(x[None], 3, 1, padding=1),
    "resampled": lambda x: F.interpolate(x[None, None], scale_factor=2, mode="bilinear"),
    "pixel shuffle": lambda x: F.pixel_shuffle(x.view(1, 4, 2, 3), 2),
    "unfold": lambda x: F.unfold(x[None, None], 2) * 2,
    "dropout in eval": lambda x: F.dropout(x, 0.5, training=False),
    "embedding": lambda x: F.embedding(ROWS, x, padding_idx=2),
    "embedding by frequency": lambda x: F.embedding(ROWS, x, scale_grad_by_freq=False).sum(1),
    "glu": lambda x: F.glu(x, 1),
    "other loss": lambda x: F.smooth_l1_loss(x.sin(), x) + F.huber_loss(x, x.cos(), delta=0.3) + x,
    "squared errors": lambda x: F.mse_loss(x.sin(), x, reduction="none") + F.mse_loss(x, x.cos(), reduction="sum"),
    "classes": lambda x: F.cross_entropy(x.view(4, 3, 2), ROWS[:, :2] % 3, reduction="none"),
    "to another type": lambda x: x.float().double() * x,
}


#: What has no rule and is differentiated alone.
ALONE = {"norm", "variance", "largest", "max", "glu", "other loss", "squared errors"}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(name):
    generator = torch.Generator().manual_seed(4)
    w, v = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((4, 6), (3, 4, 6)))

    def loss(p):
        y = OPERATIONS[name](torch.sin(p) + p)
        return (torch.linspace(0.5, 2, y.numel(), dtype=y.dtype).view_as(y) * (0.3 * y).exp()).sum()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if name in ALONE:
            warnings.simplefilter("ignore")
        got = hvp(loss, w, v)
    want = torch.autograd.functional.hessian(loss, w).reshape(24, 24)
    tolerance = 1e-5 if name == "to another type" else 1e-10
    torch.testing.assert_close(got.reshape(3, 24), v.reshape(3, 24) @ want, rtol=tolerance, atol=tolerance)


def test_hardsigmoid_whose_backward_has_no_derivative_in_pytorch():
    w, v = torch.linspace(-5, 5, 12, dtype=torch.float64), torch.eye(12, dtype=torch.float64)
    got = hvp(lambda p: F.hardsigmoid(p).exp().sum(), w, v)
    torch.testing.assert_close(got, hvp(lambda p: (p / 6 + 0.5).clamp(0, 1).exp().sum(), w, v))
    assert 0 < int(got.count_nonzero()) < 12

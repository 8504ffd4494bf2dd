# SPDX-License-Identifier: Apache-2.0
"""Layers of every kind with a curved loss, a small classifier with its data, and their Hessians by double backward."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import fastflat as ff


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return torch.cat([x + self.b(torch.tanh(self.a(x))), self.a(x) * x], dim=1)


class SelfAttention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **options)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Scaled(nn.Module):
    """scaled_dot_product_attention, causal."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = nn.Linear(4, 4)
        self.again.weight = self.first.weight

    def forward(self, x):
        return self.again(torch.tanh(self.first(x)))


def image(channels=2, size=5, n=3):
    return (n, channels, size, size)


CASES = {
    "linear": (nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), (3, 4)),
    "no bias": (nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=False)), (3, 4)),
    "linear over tokens": (nn.Sequential(nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 2)), (2, 3, 4)),
    "conv1d": (nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv1d(3, 2, 2, stride=2)), (2, 2, 6)),
    "conv2d": (nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 3, bias=False)), image()),
    "stride": (nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 2)), image()),
    "dilation": (nn.Sequential(nn.Conv2d(2, 2, 2, dilation=2), nn.Tanh(), nn.Conv2d(2, 2, 2)), image()),
    "groups": (nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.Tanh(), nn.Conv2d(4, 2, 2, groups=2)), image(size=4)),
    "depthwise": (nn.Sequential(nn.Conv2d(2, 2, 3, groups=2), nn.Tanh(), nn.Conv2d(2, 3, 1)), image()),
    "padding modes": (nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), nn.Tanh()), image(size=4)),
    "conv3d": (nn.Sequential(nn.Conv3d(1, 2, 2), nn.Tanh(), nn.Conv3d(2, 1, 2)), (2, 1, 3, 3, 3)),
    "transposed": (
        nn.Sequential(nn.ConvTranspose2d(2, 3, 2, stride=2, output_padding=1), nn.Tanh(), nn.ConvTranspose2d(3, 1, 2)),
        image(size=3),
    ),
    "transposed groups": (
        nn.Sequential(nn.ConvTranspose1d(2, 4, 2, groups=2), nn.Tanh(), nn.ConvTranspose1d(4, 2, 2)),
        (2, 2, 4),
    ),
    "batch norm": (nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Tanh(), nn.Conv2d(3, 2, 2)), image(size=4)),
    "batch norm 1d": (nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2)), (5, 4)),
    "batch norm, no weight": (
        nn.Sequential(nn.Conv2d(2, 2, 2), nn.BatchNorm2d(2, affine=False), nn.Tanh(), nn.Conv2d(2, 2, 2)),
        image(size=4),
    ),
    "batch norm, no statistics": (
        nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False), nn.Tanh(), nn.Linear(3, 2)),
        (5, 4),
    ),
    "batch norm eval": (
        nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3).eval(), nn.Tanh(), nn.Conv2d(3, 2, 2)),
        image(size=4),
    ),
    "layer norm": (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)), (3, 4)),
    "layer norm, two axes": (nn.Sequential(nn.Linear(4, 3), nn.LayerNorm((2, 3)), nn.Tanh()), (3, 2, 4)),
    "layer norm, no weight": (
        nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4, elementwise_affine=False), nn.Tanh(), nn.Linear(4, 2)),
        (3, 4),
    ),
    "group norm": (nn.Sequential(nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4), nn.Tanh(), nn.Conv2d(4, 1, 2)), image(size=4)),
    "group norm, no weight": (
        nn.Sequential(nn.Conv1d(2, 4, 2), nn.GroupNorm(2, 4, affine=False), nn.Tanh(), nn.Conv1d(4, 1, 2)),
        (2, 2, 4),
    ),
    "instance norm": (nn.Sequential(nn.Conv2d(2, 2, 2), nn.InstanceNorm2d(2, affine=True), nn.Tanh()), image(size=4)),
    "rms norm": (nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4), nn.Tanh(), nn.Linear(4, 2)), (3, 4)),
    "max pool": (nn.Sequential(nn.Conv2d(2, 2, 2), nn.Tanh(), nn.MaxPool2d(2, 1), nn.Conv2d(2, 2, 2)), image()),
    "avg pool": (nn.Sequential(nn.Conv2d(2, 2, 2), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(2, 2, 1)), image()),
    "adaptive pool": (
        nn.Sequential(nn.Conv2d(2, 2, 2), nn.Tanh(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(18, 2)),
        image(size=6),
    ),
    "global pool": (nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), image()),
    "upsample": (
        nn.Sequential(nn.Conv2d(2, 2, 2), nn.Upsample(scale_factor=2), nn.Tanh(), nn.Conv2d(2, 1, 2)),
        image(),
    ),
    "residual": (nn.Sequential(Residual(), nn.Linear(8, 2)), (3, 4)),
    "tied": (Tied(), (3, 4)),
    "attention": (SelfAttention(), (2, 3, 4)),
    "scaled dot product": (Scaled(), (2, 3, 4)),
    "transformer layer": (
        nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, activation="gelu", batch_first=True),
        (2, 3, 4),
    ),
}
for activation in (
    *(nn.ReLU(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Softplus(), nn.ELU(), nn.LeakyReLU(), nn.Hardswish()),
    *(nn.Mish(), nn.Softmax(1), nn.LogSoftmax(1), nn.Hardtanh(), nn.Softsign()),
):
    CASES[repr(activation)] = (nn.Sequential(nn.Linear(4, 4), activation, nn.Linear(4, 2)), (3, 4))


def setting(model, shape, seed=0):
    """The model in float64 with parameters that are not those of initialisation, its input, and a loss of outputs."""
    torch.manual_seed(seed)
    model = model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return model, torch.randn(shape, dtype=torch.float64)


def squares(model, x):
    """A loss that is curved in the outputs, as a function of the parameters."""

    def loss(params):
        y = torch.func.functional_call(model, params, (x,))
        return (y.exp() * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)).mean()

    return loss


def dense(loss, params):
    """The Hessian [n, n] by reverse over reverse; torch.func.hessian is not symmetric for batch and layer norm."""
    names, sizes = list(params), [p.numel() for p in params.values()]

    def flat(vector):
        parts = vector.split(sizes)
        return loss({n: v.view_as(params[n]) for n, v in zip(names, parts)})

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return torch.autograd.functional.hessian(flat, torch.cat([p.flatten() for p in params.values()]))


def by_engine(loss, params):
    """The same from n identity tangents."""
    n = sum(p.numel() for p in params.values())
    columns = torch.eye(n, dtype=torch.float64).split([p.numel() for p in params.values()], 1)
    tangents = {k: c.reshape(n, *p.shape) for (k, p), c in zip(params.items(), columns)}
    products = ff.curvature.hvp(loss, params, tangents)
    return torch.cat([products[k].reshape(n, -1) for k in params], 1)


def classifier(norm=True, seed=0):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3) if norm else nn.Identity(), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Conv2d(3, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
        if norm:
            model[1].running_mean.normal_(std=0.1)
            model[1].running_var.uniform_(0.5, 1.5)
    return model.eval()


def examples(n, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, 6, 6, generator=g, dtype=torch.float64)
    return x, torch.randint(0, 3, (n,), generator=g)


def truth(model, x, y, loss_fn=F.cross_entropy, rows=None):
    """The dense Hessian of the loss of a batch, buffers out of the way."""
    params = {k: p.detach() for k, p in model.named_parameters()}
    buffers = {k: b.clone() for k, b in model.named_buffers()}

    def loss(values):
        return loss_fn(torch.func.functional_call(model, {**values, **buffers}, (x,)), y)

    return dense(loss, params)


def matrix(operator):
    return operator @ torch.eye(operator.shape[0], dtype=operator.dtype)


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))

# SPDX-License-Identifier: Apache-2.0
"""Plain LSQ, LSQ+, DoReFa, PACT and EWGS modules. Those here are written from the papers' formulas, under the names and
with the attributes that projects give them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastflat as ff
from fastflat import integrations

from . import alike


def through(value, gradient):
    """value, with the gradient of the other."""
    return (value - gradient).detach() + gradient


def scaled(s, factor):
    return through(s, s * factor)


class LsqQuan(nn.Module):
    def __init__(self, bits=4, positive=False, channels=None):
        super().__init__()
        self.thd_neg = 0 if positive else -(2 ** (bits - 1))
        self.thd_pos = 2**bits - 1 if positive else 2 ** (bits - 1) - 1
        self.s = nn.Parameter(torch.tensor([0.13]) if channels is None else torch.rand(channels, 1, 1, 1) * 0.1 + 0.05)

    def forward(self, x):
        s = scaled(self.s, 1.0 / (self.thd_pos * x.numel()) ** 0.5)
        u = (x / s).clamp(self.thd_neg, self.thd_pos)
        return through(u.round(), u) * s


class StepFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, s, factor, low, high):
        ctx.save_for_backward(x, s)
        ctx.rest = factor, low, high
        return (x / s).round().clamp(low, high) * s

    @staticmethod
    def backward(ctx, g):
        x, s = ctx.saved_tensors
        factor, low, high = ctx.rest
        u = x / s
        below, above = u < low, u > high
        inside = ~(below | above)
        share = torch.where(inside, u.round() - u, torch.where(below, float(low), float(high)))
        return g * inside, (share * g * factor).sum().reshape(s.shape), None, None, None


class ActLSQ(nn.Module):
    def __init__(self, nbits=4):
        super().__init__()
        self.nbits = nbits
        self.alpha = nn.Parameter(torch.ones(1))
        self.register_buffer("init_state", torch.zeros(1))
        self.register_buffer("signed", torch.zeros(1))

    def forward(self, x):
        if self.training and self.init_state == 0:
            self.signed.fill_(float(x.min() < -1e-5))
            high = 2 ** (self.nbits - 1) - 1 if self.signed == 1 else 2**self.nbits - 1
            self.alpha.data.copy_(2 * x.abs().mean() / high**0.5)
            self.init_state.fill_(1)
        low, high = (
            (-(2 ** (self.nbits - 1)), 2 ** (self.nbits - 1) - 1) if self.signed == 1 else (0, 2**self.nbits - 1)
        )
        s = scaled(self.alpha, 1.0 / (x.numel() * high) ** 0.5)
        u = (x / s).clamp(low, high)
        return through(u.round(), u) * s


class Conv2dLSQ(nn.Conv2d):
    def __init__(self, *args, nbits=4, function=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.nbits, self.function = nbits, function
        self.alpha = nn.Parameter(torch.tensor([0.05]))
        self.register_buffer("init_state", torch.ones(1))

    def forward(self, x):
        low, high = -(2 ** (self.nbits - 1)), 2 ** (self.nbits - 1) - 1
        factor = 1.0 / (self.weight.numel() * high) ** 0.5
        if self.function:
            weight = StepFunction.apply(self.weight, self.alpha, factor, low, high)
        else:
            s = scaled(self.alpha, factor)
            u = (self.weight / s).clamp(low, high)
            weight = through(u.round(), u) * s
        return nn.functional.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class LSQPlusActivationQuantizer(nn.Module):
    def __init__(self, bits=4):
        super().__init__()
        self.Qn, self.Qp = 0, 2**bits - 1
        self.s, self.beta = nn.Parameter(torch.tensor([0.11])), nn.Parameter(torch.tensor([-0.21]))
        self.init_state = 1

    def forward(self, x):
        s = scaled(self.s, 1.0 / (x.numel() * self.Qp) ** 0.5)
        u = ((x - self.beta) / s).clamp(self.Qn, self.Qp)
        return through(u.round(), u) * s + self.beta


class Rounding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, n):
        return torch.round(x * n) / n

    @staticmethod
    def backward(ctx, g):
        return g, None


class activation_quantize_fn(nn.Module):
    def __init__(self, a_bit):
        super().__init__()
        self.a_bit = a_bit

    def forward(self, x):
        return Rounding.apply(x.clamp(0, 1), float(2**self.a_bit - 1))


class weight_quantize_fn(nn.Module):
    def __init__(self, w_bit, scaled=True):
        super().__init__()
        self.w_bit, self.scaled = w_bit, scaled

    def forward(self, x):
        squashed = torch.tanh(x)
        largest = squashed.abs().max().detach()
        y = 2 * Rounding.apply(squashed / 2 / largest + 0.5, float(2**self.w_bit - 1)) - 1
        return largest * y if self.scaled else y


class Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, alpha, bits):
        ctx.save_for_backward(x, alpha)
        k = (2**bits - 1) / alpha
        return torch.round(x.clamp(0, alpha.item()) * k) / k

    @staticmethod
    def backward(ctx, g):
        x, alpha = ctx.saved_tensors
        outside = (x < 0) | (x > alpha)
        return g * ~outside, (g * (x >= alpha)).sum().reshape(alpha.shape), None


class PACT(nn.Module):
    def __init__(self, bits=4):
        super().__init__()
        self.bits, self.alpha = bits, nn.Parameter(torch.tensor(1.7))

    def forward(self, x):
        return Clip.apply(x, self.alpha, self.bits)


class Discretizer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, levels, factor):
        y = torch.round(x * (levels - 1)) / (levels - 1)
        ctx.save_for_backward(x - y)
        ctx.factor = factor
        return y

    @staticmethod
    def backward(ctx, g):
        (rest,) = ctx.saved_tensors
        return g * (1 + ctx.factor * torch.sign(g) * rest), None, None


class QConv(nn.Conv2d):
    def __init__(self, *args, levels=16, **kwargs):
        super().__init__(*args, **kwargs)
        self.levels, self.EWGS_discretizer = levels, Discretizer.apply
        self.lW, self.uW = nn.Parameter(torch.tensor(-0.3)), nn.Parameter(torch.tensor(0.3))
        self.register_buffer("factor", torch.tensor(0.2))

    def forward(self, x):
        u = ((self.weight - self.lW) / (self.uW - self.lW)).clamp(0, 1)
        weight = 2 * (self.EWGS_discretizer(u, self.levels, self.factor) - 0.5)
        return nn.functional.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def started(module, signed):
    module.init_state.fill_(1)
    module.signed.fill_(signed)
    return module


X = (2, 6, 5, 5)
CASES = {
    "lsq": (lambda: LsqQuan(), X),
    "lsq positive": (lambda: LsqQuan(3, positive=True), (7,)),
    "lsq channels": (lambda: LsqQuan(channels=5), (5, 3, 3, 3)),
    "lsq activations, not begun": (lambda: ActLSQ(), X),
    "lsq activations": (lambda: started(ActLSQ(3), 1), (4, 1025)),
    "lsq convolution": (lambda: Conv2dLSQ(6, 4, 3, stride=2, padding=1), X),
    "lsq convolution by a Function": (lambda: Conv2dLSQ(6, 4, 3, bias=False, function=True), X),
    "lsq+": (lambda: LSQPlusActivationQuantizer(), X),
    "dorefa activations": (lambda: activation_quantize_fn(4), X),
    "dorefa weights": (lambda: weight_quantize_fn(3), (5, 3, 3, 3)),
    "dorefa weights, unit": (lambda: weight_quantize_fn(2, scaled=False), (5, 3, 3, 3)),
    "pact": (lambda: PACT(), X),
    "ewgs": (lambda: QConv(6, 4, 3), X),
}


@pytest.mark.parametrize("case", CASES)
def test_bits_and_gradients(case):
    make, shape = CASES[case]
    torch.manual_seed(0)
    theirs = make()
    ours = copy.deepcopy(theirs)
    report = ff.accelerate(ours, strict=True)
    assert len(report.swapped) == 1
    for layout in ("dense", "strided", "last"):
        x = torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2] if layout == "strided" else torch.randn(shape)
        if layout == "last" and len(shape) == 4:
            x = x.to(memory_format=torch.channels_last)
        for mode in (True, False):
            theirs.train(mode), ours.train(mode)
            results = []
            for module in (theirs, ours):
                leaf = x.clone().requires_grad_()
                y = module(leaf)
                g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
                parameters = dict(module.named_parameters())
                grads = torch.autograd.grad(y, [leaf, *parameters.values()], g, allow_unused=True)
                results.append((y, dict(zip(["input", *parameters], grads, strict=True))))
            (y, expected), (z, found) = results
            assert torch.equal(y, z)
            assert y.stride() == z.stride() or layout == "strided"
            for name, grad in expected.items():
                exact = name in ("input", "weight", "bias", "lW", "uW")
                close = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 1e-4}
                torch.testing.assert_close(found[name], grad, **close)
    for a, b in zip(theirs.state_dict().values(), ours.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_sixteen_bits_fall_back_where_types_mix():
    theirs = LsqQuan()
    ours = copy.deepcopy(theirs)
    ff.accelerate(ours, strict=True)
    x = torch.randn(9, 7).bfloat16()
    assert torch.equal(theirs(x), ours(x))
    half = copy.deepcopy(theirs).bfloat16()
    twin = copy.deepcopy(half)
    ff.accelerate(twin)
    assert torch.equal(half(x), twin(x))


class Net(nn.Module):
    """Quantized weights and activations, as such projects build them."""

    def __init__(self, learned=True):
        super().__init__()
        self.learned = learned
        self.conv = nn.Conv2d(3, 8, 3)
        self.weight = LsqQuan(channels=8) if learned else weight_quantize_fn(4)
        self.act = LsqQuan(positive=True) if learned else activation_quantize_fn(4)
        self.out = nn.Linear(8, 4)

    def forward(self, x):
        y = nn.functional.conv2d(x, self.weight(self.conv.weight), self.conv.bias)
        return self.out(self.act(y).mean((2, 3)))


def train(model, order=None, steps=50):
    return alike.train_on_one_batch(model, 8, order, steps)


def test_fixed_scales_train_bit_for_bit():
    torch.manual_seed(1)
    theirs = Net(learned=False)
    ours = copy.deepcopy(theirs)
    assert len(ff.accelerate(ours, strict=True).swapped) == 2
    assert torch.equal(train(theirs), train(ours))
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True))


def test_learned_scales_train_within_the_spread_of_sums():
    torch.manual_seed(1)
    model = Net()
    ours = copy.deepcopy(model)
    ff.accelerate(ours, strict=True)
    plain = train(copy.deepcopy(model))
    orders = [torch.randperm(16, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    spread = max(float((train(copy.deepcopy(model), order) - plain).abs().max()) for order in orders)
    assert float((train(ours) - plain).abs().max()) <= 2 * spread + 1e-6
    assert plain[-1] < plain[0]


def test_an_adapter_of_ones_own_in_ten_lines():
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.step, self.low, self.high = nn.Parameter(torch.tensor(0.1)), -4, 3

        def forward(self, x):
            u = (x / self.step).clamp(self.low, self.high)
            return through(u.round(), u) * self.step

    adapter = integrations.Plain("Mine", [Mine], scale="step", grid=("low", "high"), factor=None)
    integrations.register(adapter)
    try:
        model = nn.Sequential(Mine())
        assert ff.accelerate(model, strict=True).swapped[0].why == "Mine"
        assert ff.restore(model) == 1
    finally:
        integrations.unregister(adapter)
    with pytest.raises(ValueError, match="factor must be 'value', 'gradient' or None, got 'half'"):
        integrations.Plain("Mine", [Mine], scale="step", grid=("low", "high"), factor="half")


def test_another_arithmetic_is_left_alone():
    class LsqQuan(nn.Module):
        def __init__(self):
            super().__init__()
            self.s, self.thd_neg, self.thd_pos = nn.Parameter(torch.tensor(0.1)), -8, 7

        def forward(self, x):
            return through((x / self.s).floor().clamp(-8, 7), x / self.s) * self.s

    (left,) = ff.accelerate(nn.Sequential(LsqQuan())).left
    assert "differs" in left.why

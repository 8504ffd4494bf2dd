# SPDX-License-Identifier: Apache-2.0
"""Attacks on weights: the optimum of a linear loss, the weights that they move, and exact restoring."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastflat as ff
from fastflat.evaluate import evaluate, weight_attack

from .models import convolutional, images, linear, quantized, unchanged


def bits(model):
    kinds = {4: torch.int32, 2: torch.int16, 8: torch.int64}
    return {n: p.detach().clone().view(kinds[p.element_size()]) for n, p in model.named_parameters()}


def same(a, b):
    return all(torch.equal(a[n], b[n]) for n in a)


def test_a_linear_loss_reaches_the_corner_of_the_cube():
    model = linear()
    x = torch.randn(4, 6, dtype=torch.float64)
    x[:, 0] = torch.tensor([2.0, -1, -1, -1])  # its mean and the mean of the batches' means differ in sign
    data = [(x[:1], None), (x[1:], None)]  # batches weigh as many as their rows
    weight = model[1].weight.detach().clone()
    mean = x.mean(0)

    def loss(z, _):
        return z.sum(1).mean()

    for steps in (1, 4):
        with weight_attack(model, loss, data, 0.1, steps) as done:
            torch.testing.assert_close(model[1].weight.detach(), weight + 0.1 * mean.sign(), rtol=0, atol=1e-15)
            assert len(done.losses) == steps + 1
            assert done.losses[-1] - done.losses[0] == pytest.approx(3 * 0.1 * float(mean.abs().sum()), rel=1e-12)
            assert done.parameters == ("1.weight",)
        assert torch.equal(model[1].weight, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [convolutional, quantized])
def test_weights_come_back_in_every_bit(make, dtype):
    model = make().train()
    if dtype == torch.bfloat16 and make is convolutional:
        model = model.to(dtype)
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = -0.0
    x, y = images(12)
    data = [(x.to(model[0].weight.dtype), y)]
    before = bits(model)
    with unchanged(model):
        with weight_attack(model, F.cross_entropy, data, 0.05, 3) as done:
            during = bits(model)
            assert done.losses[-1] > done.losses[0] * 1.05
            assert "->" in str(done)
        assert same(before, bits(model))
    moved = {n for n in before if not torch.equal(before[n], during[n])}
    assert moved == set(done.parameters)
    assert all(n.endswith(".weight") for n in moved)  # no bias, no scale of a quantizer
    assert not any("norm" in n or n == "1.weight" for n in moved)


def test_scales_of_quantizers_stay_whatever_their_axes():
    spec = ff.QuantSpec.lsq(bits=4).replace(group=3)
    model = ff.prepare(nn.Sequential(nn.Linear(6, 3)), weights=spec)
    assert any(p.dim() == 2 and n != "0.weight" for n, p in model.named_parameters())
    with weight_attack(model, F.cross_entropy, [(torch.randn(8, 6), torch.arange(8) % 3)], 0.1) as done:
        assert done.parameters == ("0.weight",)


def test_accuracy_falls_inside_and_returns_after():
    model, data = linear(dtype=torch.float32).eval(), [(torch.randn(100, 6), torch.arange(100) % 3)]
    data = [(data[0][0], model(data[0][0]).argmax(1))]
    with weight_attack(model, F.cross_entropy, data, 0.3):
        assert evaluate(model, data).accuracy < 0.8
    assert evaluate(model, data).accuracy == 1


@pytest.mark.parametrize("where", ["inside", "loss", "data"])
def test_exceptions_restore(where):
    model, (x, y) = quantized(), images(6)
    before = bits(model)
    calls = []

    def loss(z, y):
        calls.append(1)
        if where == "loss" and len(calls) > 1:
            raise KeyError("broken")
        return F.cross_entropy(z, y)

    class Data:
        def __iter__(self):
            yield x, y
            if where == "data" and len(calls) > 1:
                raise KeyError("broken")

    def attacked():
        with weight_attack(model, loss, Data(), 0.1, 2):
            assert not same(before, bits(model))
            raise KeyError("inside")

    with unchanged(model):
        with pytest.raises(KeyError):
            attacked()
        assert same(before, bits(model))


def test_parameters_by_pattern():
    model, data = convolutional().eval(), [images(6)]
    with weight_attack(model, F.cross_entropy, data, 0.1, params=["5.*", "0.bias"]) as done:
        assert done.parameters == ("0.bias", "5.weight", "5.bias")


DATA = [images(4)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": -1.0}, "eps must be finite and at least 0, got -1"),
        ({"eps": None}, "eps must be a number, got NoneType"),
        ({"step": math.inf}, "step must be finite"),
        ({"steps": 0}, "steps must be an integer of at least 1"),
        ({"data": []}, "data must hold at least one batch, got none"),
        ({"data": iter(DATA)}, r"data must be an iterable that can be gone through again.*pass list\(data\)"),
        ({"data": [(X := torch.rand(1, 1, 8, 8))]}, r"data must yield pairs \(inputs, targets\)"),
        ({"params": "conv.weights"}, "params must name parameters of the model, got 'conv.weights'"),
        ({"params": []}, "params must name at least one parameter"),
        ({"loss": lambda z, y: z}, r"loss must return a scalar, got \[4, 3\]"),
        ({"loss": lambda z, y: z.sum() * math.nan}, "loss must be finite, got nan"),
        ({"model": nn.ReLU()}, "model must have weights of two axes or more that require a gradient, got none"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(change, message):
    model = convolutional()
    before = bits(model)
    arguments = {"model": model, "loss": F.cross_entropy, "data": DATA, "eps": 0.1} | change
    with pytest.raises((ValueError, TypeError), match=message) as caught, weight_attack(**arguments):
        pass
    assert "\n" not in str(caught.value)
    assert same(before, bits(model))

# SPDX-License-Identifier: Apache-2.0
"""SymReg and SatNL on models: which weights count, what is restored, what is refused."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import fastflat as ff
from fastflat.methods import SatNL, SymReg, bake, saturate, symmetry


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))


def test_penalty_sums_layers_and_counts_shared_weights_once():
    model = net()
    want = symmetry(model[0].weight) + symmetry(model[4].weight)
    torch.testing.assert_close(SymReg(model, 2.0)(), 2 * want)
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    b.weight = a.weight
    torch.testing.assert_close(SymReg(nn.Sequential(a, b))(), symmetry(a.weight))
    up = nn.ConvTranspose2d(3, 5, 2)
    torch.testing.assert_close(SymReg(up)(), symmetry(up.weight.transpose(0, 1)))


def test_penalty_makes_rows_symmetric():
    model = nn.Linear(20, 4, bias=False)
    penalty = SymReg(model)
    first = float(penalty().detach())
    opt = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(100):
        opt.zero_grad()
        penalty().backward()
        opt.step()
    assert float(penalty().detach()) < 1e-3 * first
    assert float(model.weight.detach().abs().mean()) > 0.01  # not by shrinking


def test_moments_of_a_constant_row_have_a_gradient():
    w = torch.ones(2, 5, requires_grad=True)
    symmetry(w, "moments").backward()
    assert torch.isfinite(w.grad).all()
    assert float(symmetry(torch.zeros(0, 3))) == 0


def test_saturation_keeps_the_network_and_bounds_steps():
    model, x = net(), torch.randn(4, 1, 8, 8)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    want = model.eval()(x)
    saturate(model)
    torch.testing.assert_close(model(x), want)  # uniform weights end below 3 deviations
    alpha = 3 * float(before["4.weight"].std(correction=0))
    with torch.no_grad():
        model[4].parametrizations.weight.original.mul_(1000)
    assert float(model[4].weight.detach().abs().max()) <= alpha * (1 + 1e-6)
    bake(model)
    assert set(model.state_dict()) == set(before)
    assert isinstance(model[4].weight, nn.Parameter)
    torch.testing.assert_close(model[0].weight.detach(), before["0.weight"])


def test_quantized_layers_take_saturated_weights():
    model = ff.prepare(net(), weights=ff.QuantSpec.lsq(bits=4, axis=0))
    saturate(model, 1.5, learn=True)
    largest = float(model[4].weight.detach().abs().max())
    q = model[4].weight_quantizer
    want = q.evaluated(model[4].weight).detach()
    torch.testing.assert_close(model[4].quantized_weight().detach(), want)
    assert largest <= 1.5 * float(net()[4].weight.detach().std(correction=0)) * 1.0001
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(torch.randn(4, 1, 8, 8)).float(), torch.tensor([0, 1, 2, 0]))
    (loss + SymReg(model)()).backward()
    chain = model[4].parametrizations.weight
    assert float(chain[0].alpha.grad.abs()) > 0
    assert float(chain.original.grad.abs().sum()) > 0
    assert not parametrize.is_parametrized(bake(model)[4])


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: SymReg(nn.ReLU()), "model must hold linear or convolution layers, got none"),
        (lambda: SymReg(net(), -1.0), "gamma must be finite and at least 0, got -1.0"),
        (lambda: SymReg(net(), kind="mean"), "kind must be one of order, moments, got 'mean'"),
        (lambda: symmetry(torch.ones(3)), r"w must be a floating-point tensor of two axes or more, got \[3\]"),
        (lambda: symmetry(torch.ones(3, 3), axis=2), "axis must lie in -2 to 1, got 2"),
        (lambda: saturate(net(), 0.0), "deviations must be positive, got 0.0"),
        (lambda: saturate(saturate(net())), "model must have plain weights, got a parametrized one in"),
        (lambda: SatNL(-1.0), "alpha must be positive, got"),
        (lambda: SatNL(float("inf"), learn=True), "alpha must be positive and finite"),
    ],
)
def test_refused(call, line):
    with pytest.raises(ValueError, match=line):
        call()


def test_a_refused_model_is_as_before():
    model = net()
    nn.init.ones_(model[4].weight)
    with pytest.raises(ValueError, match="weights that vary and are finite, got a deviation of 0"):
        saturate(model)
    assert not parametrize.is_parametrized(model[0])

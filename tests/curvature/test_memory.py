# SPDX-License-Identifier: Apache-2.0
"""What products hold, in gradients, and what is said where K of them do not fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastflat as ff
from fastflat.benchmarks import measure
from fastflat.benchmarks.networks import ConvNet
from fastflat.benchmarks.peers import products
from fastflat.benchmarks.product_cases import ProductCase
from fastflat.curvature import _memory

CPU = torch.device("cpu")


def quantized(net):
    if net == "plain":
        model = ConvNet(3, (32, 64))
    else:
        spec = ff.QuantSpec.lsq(bits=4)
        model = ff.prepare(ConvNet(3, (32, 64)), weights=spec.replace(axis=0), activations=spec)
    model.eval()
    x, y = torch.randn(16, 3, 32, 32), torch.randint(10, (16,))
    if net != "plain":
        ff.calibrate(model, [x])
    return model, x, y


@pytest.mark.parametrize("net", ["plain", "quantized"])
@pytest.mark.parametrize("mode", ["hessian", "ggn"])
def test_eight_products_hold_no_more_than_nine_gradients(net, mode):
    # Besides the results: about what eight vectors' tangents and one gradient need.
    data = ProductCase("convnet", net == "quantized", 8, mode).data(CPU)
    gradient = measure.peak_memory(products.gradient(data), CPU)
    held = measure.peak_memory(products.fused(data), CPU)
    assert held - data.v.nbytes <= 9 * gradient, held / gradient


def test_quadratic_forms_hold_no_activations():
    # A chain: what products keep for the way back, forms do not.
    model = nn.Sequential(*(layer for _ in range(12) for layer in (nn.Linear(32, 32), nn.Tanh())))
    H = ff.curvature.Hessian(model, F.mse_loss, [(torch.randn(512, 32), torch.randn(512, 32))])
    V = torch.randn(8, H.shape[0])
    H.matmat(V[:2])
    H.mean_forms(V[:2], 2)
    whole = measure.peak_memory(lambda: H.matmat(V), CPU)
    forms = measure.peak_memory(lambda: H.mean_forms(V, 2), CPU)
    assert forms < 0.4 * whole


def test_k_that_does_not_fit_is_refused_with_one_that_does(monkeypatch):
    model, x, y = quantized("quantized")
    H = ff.curvature.Hessian(model, F.cross_entropy, [(x, y)])
    V = torch.randn(64, H.shape[0])
    each = max(p.peak for p in _plans(H, V[:1]))
    monkeypatch.setattr(_memory, "_SMALL", 0)
    monkeypatch.setattr("fastflat.memory.available", lambda device: 4 * each * 25)
    grads = [p.grad for p in model.parameters()]
    with pytest.raises(MemoryError, match=r"K = 64 vectors at once need about .* GiB, and .* are free on cpu; K = 20"):
        H.matmat(V)
    assert all(p.grad is g for p, g in zip(model.parameters(), grads))
    fits = ff.curvature.Hessian(model, F.cross_entropy, [(x, y)], chunk=20)
    torch.testing.assert_close(
        fits.matmat(V[:23]), torch.cat([H.matmat(V[:12]), H.matmat(V[12:23])]), rtol=1e-3, atol=1e-4
    )
    monkeypatch.setattr("fastflat.memory.available", lambda device: 1000)
    with pytest.raises(MemoryError, match="nor does one: take microbatch="):
        H.matmat(V[:1])
    monkeypatch.setattr("fastflat.memory.available", lambda device: None)
    H.matmat(V[:1])


def _plans(H, V):
    H.matmat(V)
    return H._problem._last[2].plans.values()


def test_the_estimate_is_what_tangents_hold():
    # The plan counts tangents; what is measured has the temporaries of single ops on top.
    model, x, y = quantized("plain")
    H = ff.curvature.Hessian(model, F.cross_entropy, [(x, y)])
    (plan,) = _plans(H, torch.randn(1, H.shape[0]))
    few, many = (
        measure.peak_memory(lambda: H.matmat(V), CPU) - V.nbytes for V in (torch.randn(k, H.shape[0]) for k in (8, 16))
    )
    each = (many - few) / 8
    assert 0.7 * each < 4 * plan.peak < 1.25 * each


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_an_allocator_that_gives_up_is_one_line_too(monkeypatch, error):
    model = nn.Linear(4, 2)
    H = ff.curvature.Hessian(model, F.mse_loss, [(torch.randn(3, 4), torch.randn(3, 2))])
    H.matmat(torch.randn(2, H.shape[0]))

    def fails(call):
        raise error

    monkeypatch.setattr("fastflat.curvature._rules.tangent", fails)
    with pytest.raises(MemoryError, match="K = 8 vectors at once"):
        H.matmat(torch.randn(8, H.shape[0]))
    monkeypatch.setattr("fastflat.curvature._rules.tangent", lambda call: (_ for _ in ()).throw(RuntimeError("other")))
    with pytest.raises(RuntimeError, match="other"):
        H.matmat(torch.randn(8, H.shape[0]))


def test_available_memory():
    free = ff.memory.available(CPU)
    assert free is None or 2**20 < free < 2**50
    assert ff.memory.available(torch.device("meta")) is None


def test_a_control_group_limits(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 500000\ninactive_file 100000\n")
    monkeypatch.setattr(ff.memory, "_GROUP", tmp_path)
    assert ff.memory.available(CPU) == 400000
    (tmp_path / "memory.max").write_text("max\n")
    assert ff.memory.available(CPU) != 400000

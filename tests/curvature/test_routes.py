# SPDX-License-Identifier: Apache-2.0
"""Estimates as methods of operators; traces of layers by their routes against exact blocks."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastflat as ff
from fastflat.curvature import GGN, Fisher, Hessian

from .estimators_fakes import generator


class Twice(nn.Module):
    """One weight, used at two depths."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.inner(self.inner(x).relu()).relu())


def convnet(activation=nn.ReLU):
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), activation(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 3)
    )


def setting(model=None, quantized=False, train=False, n=10):
    """What ``model()`` builds, in float64, with statistics that are not those of initialisation, and data in ragged
    batches."""
    torch.manual_seed(0)
    model = (convnet if model is None else model)().double()
    x = torch.randn(n, 6) if isinstance(model, Twice) else torch.randn(n, 1, 8, 8)
    x, y = x.double(), torch.randint(0, 3, (n,))
    model.train()(x)
    if quantized:
        lsq = ff.QuantSpec.lsq
        model = ff.prepare(model, weights=lsq(bits=3, axis=0), activations=lsq(bits=4))
        ff.calibrate(model, [x])
    return model.train(train), [(x[:4], y[:4]), (x[4:], y[4:])]


def blocks(op):
    full = op @ torch.eye(op.shape[0], dtype=op.dtype)
    return {name: float(full[b, b].trace()) for name, b in op.blocks.items()}


def check(op, exact, route, seeds=12):
    """Estimates lie within their error bars of the exact blocks."""
    z = []
    for seed in range(seeds):
        found = op.layer_traces(1e-9, 64, route=route, generator=generator(seed))
        assert found.route == route
        assert list(found) == list(exact)
        for name, estimate in found.items():
            # Small blocks by unit vectors; a bias before batch norm moves nothing.
            if estimate.stderr == 0 or abs(exact[name]) < 1e-12:
                assert estimate.value == pytest.approx(exact[name], rel=1e-9, abs=1e-12)
            else:
                z.append((estimate.value - exact[name]) / estimate.stderr)
    z = torch.tensor(z, dtype=torch.float64)
    # Squares of few draws are skewed, and errors of one draw are shared by the blocks: a wide bar.
    assert z.abs().max() < 6
    assert z.square().mean() < 2.5


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "quantized"])
@pytest.mark.parametrize("route", ["sampled", "own", "joint"])
def test_every_route_finds_the_blocks_of_a_piecewise_linear_network(quantized, route):
    model, data = setting(quantized=quantized)
    op = Hessian(model, F.cross_entropy, data)
    check(op, blocks(op), route)


def test_auto_takes_sampled_gradients_where_they_are_exact():
    for quantized in (False, True):
        model, data = setting(quantized=quantized)
        found = Hessian(model, F.cross_entropy, data).layer_traces()
        assert found.route == "sampled"
        assert "piecewise linear" in found.reason
        assert all(e.converged and e.stderr <= 0.1 * e.value for e in found.values() if e.value)


@pytest.mark.parametrize(
    ("model", "train", "reason"),
    [
        (lambda: convnet(nn.GELU), False, "not piecewise linear in 0.weight (gelu)"),
        (convnet, True, "not piecewise linear in 0.weight (batch norm in train mode)"),
        (Twice, False, "not piecewise linear in inner.weight"),
    ],
    ids=["gelu", "batch norm", "shared"],
)
def test_other_networks_take_their_own_blocks_and_say_why(model, train, reason):
    model, data = setting(model, train=train)
    op = Hessian(model, F.cross_entropy, data)
    found = op.layer_traces(rtol=1e-9, max_products=480, generator=generator(0))
    assert found.route == "own"
    assert reason in found.reason
    for name, exact in blocks(op).items():
        assert abs(found[name].value - exact) <= 5 * found[name].stderr + 1e-9 * abs(exact)
    with pytest.raises(ValueError, match="route must be one that is exact here, got 'sampled': outputs are not"):
        op.layer_traces(route="sampled")
    gauss = GGN(model, F.cross_entropy, data)
    assert gauss.layer_traces(max_products=16).route == "sampled"
    check(gauss, blocks(gauss), "sampled", 6)


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y: -z.log_softmax(1).gather(1, y[:, None]).mean(),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.CrossEntropyLoss(ignore_index=1),
        lambda z, y: F.mse_loss(z, F.one_hot(y, 3).double()),
        lambda z, y: F.binary_cross_entropy_with_logits(z, F.one_hot(y, 3).double()),
    ],
    ids=["written out", "weights", "smoothing", "ignored rows", "squares", "binary"],
)
def test_the_loss_is_known_by_what_it_does(loss):
    model, data = setting()
    op = Hessian(model, loss, data[:1])
    check(op, blocks(op), "sampled", 4)


def test_a_loss_of_another_form_takes_own_blocks():
    model, data = setting()
    found = Hessian(model, lambda z, y: z.exp().sum(1).square().mean(), data).layer_traces(max_products=16)
    assert found.route == "own"
    assert "neither a softmax cross-entropy nor a sum over the outputs" in found.reason


def test_rows_of_a_class_sums_microbatches_and_chosen_parameters():
    model, data = setting()
    op = Hessian(model, F.cross_entropy, data).of_class(1)
    check(op, blocks(op), "sampled", 4)
    summed = Hessian(model, nn.CrossEntropyLoss(reduction="sum"), data, reduction="sum", params=["5.*"], microbatch=3)
    assert list(summed.blocks) == ["5.weight", "5.bias"]
    check(summed, blocks(summed), "sampled", 4)


def test_a_fisher_matrix_takes_its_own_blocks():
    model, data = setting()
    found = Fisher(model, F.cross_entropy, data).layer_traces(max_products=16)
    assert (found.route, found.reason) == ("own", "the matrix is that of fixed gradients of single rows")


@pytest.mark.parametrize("route", ["auto", "own", "joint"])
def test_nothing_of_the_users_changes(route):
    model, data = setting(quantized=True, train=True)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    for kind in (Hessian, GGN):
        first, again = (kind(model, F.cross_entropy, data).layer_traces(max_products=16, route=route) for _ in range(2))
        assert {n: e.value for n, e in first.items()} == {n: e.value for n, e in again.items()}
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_bad_routes_and_products_that_are_not_finite():
    model, data = setting()
    op = Hessian(model, F.cross_entropy, data)
    with pytest.raises(ValueError, match="route must be 'auto', 'sampled', 'own' or 'joint', got 'fast'"):
        op.layer_traces(route="fast")
    with pytest.raises(ValueError, match="max_products must be a whole number of at least 1, got 0"):
        op.layer_traces(max_products=0)
    broken = [(data[0][0] * math.nan, data[0][1])]
    with pytest.raises(FloatingPointError, match="holds NaN"):
        Hessian(model, F.cross_entropy, broken).layer_traces()


def test_estimates_are_methods():
    model, data = setting()
    state = torch.get_rng_state()
    op = Hessian(model, F.cross_entropy, data)
    full = op @ torch.eye(op.shape[0], dtype=op.dtype)
    values = torch.linalg.eigvalsh(full)
    trace = op.trace(rtol=0.02)
    assert abs(trace.value - float(full.trace())) <= 5 * trace.stderr
    torch.testing.assert_close(op.eigenvalues(3).value, values.flip(0)[:3], rtol=1e-4, atol=0)
    smallest, vectors = op.eigenvalues(1, "smallest", vectors=True)
    assert float(smallest.value) == pytest.approx(float(values[0]), rel=1e-3)
    assert vectors.shape == (1, op.shape[0])
    diagonal = op.diagonal(max_products=200)
    assert (diagonal.value - full.diagonal()).norm() <= 5 * diagonal.stderr.norm()
    density = op.density(steps=20, probes=4)
    assert density.nodes.max() == pytest.approx(float(values[-1]), rel=1e-6)
    b = torch.randn(op.shape[0], dtype=torch.float64, generator=generator())
    x = op.solve(b, damping=1.0, tol=1e-8).value
    torch.testing.assert_close(op @ x + x, b, rtol=0, atol=1e-6)
    assert torch.equal(state, torch.get_rng_state())

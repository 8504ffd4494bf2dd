# SPDX-License-Identifier: Apache-2.0
"""Quadratic forms from the forward pass: those of the products, for every kind of layer and loss."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastflat as ff
from fastflat.curvature import _jets
from fastflat.curvature._program import Untraceable

from .problems import CASES, classifier, examples, image, setting


def curved(output, target):
    return (output.exp() * torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).view_as(output)).mean()


def agree(H, k=6, per=3, tolerance=1e-10, block=None):
    n = H.shape[0] if block is None else len(range(H.shape[0])[H.blocks[block]])
    V = torch.randn(k, n, dtype=H.dtype, generator=torch.Generator().manual_seed(2))
    products = H.matmat(V) if block is None else H.block_matmat(block, V)
    wanted = (V * products).sum(1).double().unflatten(0, (-1, per)).mean(1)
    found = H.mean_forms(V, per, block)
    assert found.shape == (k // per,)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


@pytest.mark.parametrize("name", CASES)
def test_layers(name):
    model, x = setting(*CASES[name])
    agree(ff.curvature.Hessian(model, curved, [(x, torch.zeros(len(x)))]))


LOSSES = {
    "cross entropy": (F.cross_entropy, lambda n: torch.arange(n) % 3),
    "smoothed": (lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1), lambda n: torch.arange(n) % 3),
    "class weights": (
        lambda z, y: F.cross_entropy(z, y, weight=torch.tensor([1.0, 2.0, 3.0], dtype=z.dtype)),
        lambda n: torch.arange(n) % 3,
    ),
    "probabilities": (F.cross_entropy, lambda n: torch.full((n, 3), 1 / 3, dtype=torch.float64)),
    "ignored": (lambda z, y: F.cross_entropy(z, y, ignore_index=1), lambda n: torch.arange(n) % 3),
    "mean squares": (F.mse_loss, lambda n: torch.ones(n, 3, dtype=torch.float64)),
    "sum of squares": (lambda z, y: F.mse_loss(z, y, reduction="sum"), lambda n: torch.ones(n, 3, dtype=torch.float64)),
    "logits": (F.binary_cross_entropy_with_logits, lambda n: torch.full((n, 3), 0.3, dtype=torch.float64)),
    "log-sum-exp": (lambda z, y: (z.logsumexp(1) - z[:, 0] / z.square().sum(1)).mean(), lambda n: torch.zeros(n)),
    "smooth l1": (F.smooth_l1_loss, lambda n: torch.ones(n, 3, dtype=torch.float64)),
    "power": (lambda z, y: (z.abs() + 1).pow(z.tanh()).mean(), lambda n: torch.zeros(n)),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.filterwarnings("ignore:fastflat.curvature.*no rule for K tangents")
def test_losses(name):
    loss_fn, targets = LOSSES[name]
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    agree(ff.curvature.Hessian(model, loss_fn, [(x, targets(7))]))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("weights", "activations"),
    [
        (ff.QuantSpec.lsq(bits=4, axis=0), ff.QuantSpec.lsq(bits=4, signed=False)),
        (ff.QuantSpec.lsq(bits=3), None),
        (ff.QuantSpec.lsq(bits=4, axis=0), ff.QuantSpec.lsq(bits=8).replace(noise="uniform")),
    ],
)
def test_quantized_networks(weights, activations, train):
    model = ff.prepare(classifier(), weights=weights, activations=activations).train(train)
    x, y = examples(6)
    ff.calibrate(model, [x]) if activations else None
    agree(ff.curvature.Hessian(model, F.cross_entropy, [(x, y)]))


def test_large_kernels_go_one_after_another(monkeypatch):
    monkeypatch.setattr("fastflat.curvature._rules.convolution._LARGEST", 0)
    model, x = setting(*CASES["stride"])
    agree(ff.curvature.Hessian(model, curved, [(x, torch.zeros(len(x)))]))


def test_ragged_batches_chunks_classes_and_chosen_parameters():
    x, y = examples(10)
    data = [(x[:7], y[:7]), (x[7:], y[7:])]
    for options in (
        {"chunk": 3},
        {"chunk": 1},
        {"microbatch": 2},
        {"params": ["0.*", "7.bias"]},
        {"reduction": "sum"},
        {"row_weight": lambda t: (t == 1).double()},
    ):
        loss_fn = F.cross_entropy
        if options.get("reduction"):
            loss_fn = lambda z, t: F.cross_entropy(z, t, reduction="sum")  # noqa: E731
        agree(ff.curvature.Hessian(classifier(), loss_fn, data, **options))


def test_trace_takes_them_and_agrees_with_the_dense_matrix(monkeypatch):
    x, y = examples(12)
    H = ff.curvature.Hessian(classifier(), F.cross_entropy, [(x, y)])
    exact = float((H @ torch.eye(H.shape[0], dtype=H.dtype)).trace())
    calls = []
    original = _jets.summed_forms
    monkeypatch.setattr(_jets, "summed_forms", lambda *a: calls.append(a) or original(*a))
    found = H.trace(rtol=0.05, max_products=4000)
    assert calls
    assert found.converged
    assert abs(found.value - exact) < 4 * found.stderr
    assert found.stderr <= 0.05 * abs(found.value)
    by_products = H.trace(rtol=0.05, max_products=4000, method="hutchinson")
    # Means of two scatter as single ones do, so that both need about as many probes.
    assert 0.5 < found.products / by_products.products < 2


def test_the_same_probes_give_the_same_trace():
    x, y = examples(12)
    H = ff.curvature.Hessian(classifier(), F.cross_entropy, [(x, y)])
    a = H.trace(rtol=1e-9, max_products=32, method="jets")
    b = H.trace(rtol=1e-9, max_products=32, method="hutchinson")
    assert a.products == b.products == 32
    assert not a.converged
    assert a.value == pytest.approx(b.value, rel=1e-10)
    assert H.trace(rtol=1e-9, max_products=33, method="jets").products == 32


def test_single_blocks():
    model, x = setting(*CASES["transformer layer"])
    H = ff.curvature.Hessian(model, curved, [(x, torch.zeros(len(x)))])
    for name in ("self_attn.in_proj_weight", "linear1.weight", "norm1.weight", "norm1.bias"):
        agree(H, block=name)


@pytest.mark.parametrize("kind", [ff.curvature.GGN, ff.curvature.Fisher])
def test_gauss_newton_forms(kind):
    x, y = examples(10)
    G = kind(classifier(), F.cross_entropy, [(x[:7], y[:7]), (x[7:], y[7:])])
    agree(G)
    agree(G, block="0.weight")
    assert G.trace(rtol=0.3).converged


def test_an_operator_of_ones_own_has_no_forms():
    class Identity:
        shape, dtype, device, blocks = (20, 20), torch.float64, torch.device("cpu"), {}

        def matmat(self, V):
            return V

    with pytest.raises(Untraceable, match="no mean_forms"):
        ff.curvature.trace(Identity(), method="jets")
    assert ff.curvature.trace(Identity()).value == 20


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x * x * g


class Cubed(nn.Module):
    def forward(self, x):
        return Cube.apply(x)


@pytest.mark.filterwarnings("ignore:fastflat.curvature.Hessian")
def test_what_cannot_be_had_is_said_and_products_take_over():
    x = torch.randn(5, 4, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    y = torch.zeros(5, 3, dtype=torch.float64)
    for H, reason in (
        (ff.curvature.Hessian(model, F.mse_loss, [(x, y)], method="double_backward"), "belong to the engine"),
        (ff.curvature.Hessian(model, F.mse_loss, [(x, y)], tangent_dtype=torch.bfloat16), "belong to the engine"),
        (ff.curvature.Hessian(nn.Sequential(model, Cubed()), F.mse_loss, [(x, y)]), "autograd.Function"),
    ):
        with pytest.raises(Untraceable, match=reason):
            H.trace(method="jets")
        exact = float((H @ torch.eye(H.shape[0], dtype=H.dtype)).trace())
        found = H.trace(rtol=0.1)
        assert found.converged
        assert found.value == pytest.approx(exact, abs=4 * found.stderr)


def test_a_zero_point_that_moves_with_its_scale_is_left_to_products():
    spec = ff.QuantSpec.lsq(bits=4, signed=False, symmetric=False)
    model = ff.prepare(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double(), activations=spec)
    x = torch.randn(9, 4, dtype=torch.float64)
    ff.calibrate(model, [x])
    H = ff.curvature.Hessian(model, F.mse_loss, [(x, torch.zeros(9, 3, dtype=torch.float64))])
    assert any("zero_point" in name for name in H.blocks)
    with pytest.raises(Untraceable, match="zero-point"):
        H.trace(method="jets")
    assert H.trace(rtol=0.5).products


def test_a_loss_that_no_parameter_reaches():
    model = nn.Linear(2, 2).double()
    H = ff.curvature.Hessian(
        model, lambda z, t: (z * 0).sum().detach() + t.sum(), [(torch.ones(1, 2).double(), torch.ones(1))]
    )
    assert H.mean_forms(torch.ones(4, 6, dtype=torch.float64), 2).tolist() == [0, 0]


def test_dropout_draws_one_mask_for_all():
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3)).double().train()
    x = torch.randn(*image()[:1], 4, dtype=torch.float64)
    H = ff.curvature.Hessian(model, F.mse_loss, [(x, torch.zeros(3, 3, dtype=torch.float64))])
    V = torch.randn(1, H.shape[0], dtype=torch.float64).expand(4, -1).contiguous()
    state = torch.random.get_rng_state()
    forms = H.mean_forms(V, 2)
    assert torch.equal(state, torch.random.get_rng_state())
    assert forms[0] == pytest.approx(float(forms[1]), rel=1e-12)

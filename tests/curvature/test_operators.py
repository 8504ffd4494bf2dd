# SPDX-License-Identifier: Apache-2.0
"""Operators of a model on data: against dense matrices, over ragged batches, for every loss and kind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastflat as ff
from fastflat.curvature import GGN, Fisher, Hessian

from .problems import classifier, close, examples, matrix, truth

LOSSES = {
    "cross-entropy": (F.cross_entropy, None),
    "smoothed": (lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1), None),
    "weighted": (lambda z, y: F.cross_entropy(z, y, weight=torch.tensor([0.5, 1.0, 2.0], dtype=z.dtype)), None),
    "one ignored": (lambda z, y: F.cross_entropy(z, y, ignore_index=1), None),
    "soft targets": (F.cross_entropy, lambda y: F.one_hot(y, 3) * 0.7 + 0.1),
    "squared error": (F.mse_loss, lambda y: F.one_hot(y, 3).double()),
    "binary cross-entropy": (F.binary_cross_entropy_with_logits, lambda y: F.one_hot(y, 3).double()),
    "huber": (F.huber_loss, lambda y: F.one_hot(y, 3).double()),
    "kl": (lambda z, y: F.kl_div(F.log_softmax(z, 1), y, reduction="batchmean"), lambda y: F.one_hot(y, 3) * 0.7 + 0.1),
    "negative likelihood": (lambda z, y: F.nll_loss(F.log_softmax(z, 1), y), None),
    "sum": (lambda z, y: F.cross_entropy(z, y, reduction="sum"), None),
}


@pytest.mark.filterwarnings("ignore:.*has no rule for K tangents")
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss(name):
    loss_fn, target = LOSSES[name]
    model, (x, y) = classifier(), examples(7)
    y = y if target is None else target(y)
    want = truth(model, x, y, loss_fn)
    got = matrix(Hessian(model, loss_fn, [(x, y)], reduction="sum" if name == "sum" else "mean"))
    close(got, want)


def test_ragged_batches_are_weighted_by_their_size():
    model, (x, y) = classifier(), examples(7)
    want = truth(model, x, y)
    parts = [(x[:3], y[:3]), (x[3:6], y[3:6]), (x[6:], y[6:])]
    for kind in (Hessian, GGN):
        whole = matrix(kind(model, F.cross_entropy, [(x, y)]))
        close(matrix(kind(model, F.cross_entropy, parts)), whole, 1e-12)
        close(matrix(kind(model, F.cross_entropy, [(x, y)], microbatch=2, chunk=5)), whole, 1e-12)
    close(matrix(Hessian(model, F.cross_entropy, parts)), want)


def test_one_vector_is_a_column_of_many():
    model, (x, y) = classifier(), examples(5)
    h = Hessian(model, F.cross_entropy, [(x, y)])
    v = torch.randn(h.shape[0], 32, dtype=torch.float64)
    many = h @ v
    close(h @ v[:, 17], many[:, 17], 1e-13)
    close(h.matmat(v.t()), many.t(), 1e-13)
    assert not (h @ torch.zeros(h.shape[0], dtype=torch.float64)).any()
    assert (h @ v[:, :0]).shape == (h.shape[0], 0)


def test_gauss_newton_is_the_hessian_where_outputs_are_linear_in_a_block():
    spec = ff.QuantSpec.lsq(bits=4)
    model = ff.prepare(classifier(), weights=spec, activations=spec)
    x, y = examples(6)
    ff.calibrate(model, [x])
    h, g = (kind(model, F.cross_entropy, [(x, y)]) for kind in (Hessian, GGN))
    full, gauss = matrix(h), matrix(g)
    scale = float(full.abs().max())
    assert float((full - gauss).abs().max()) > 1e-3 * scale
    for block in h.blocks.values():
        torch.testing.assert_close(full[block, block], gauss[block, block], rtol=0, atol=1e-12 * scale)
    torch.testing.assert_close(full, full.t(), rtol=0, atol=1e-12 * scale)
    assert torch.linalg.eigvalsh(gauss).min() > -1e-12 * scale


def test_own_blocks():
    model, (x, y) = classifier(), examples(5)
    for kind in (Hessian, GGN):
        operator = kind(model, F.cross_entropy, [(x, y)])
        full = matrix(operator)
        v = torch.randn(3, operator.shape[0], dtype=torch.float64)
        want = torch.cat([v[:, b] @ full[b, b] for b in operator.blocks.values()], 1)
        close(operator.block_diagonal_matmat(v), want, 1e-12)
        for name, b in operator.blocks.items():
            close(operator.block_matmat(name, v[:, b]), v[:, b] @ full[b, b], 1e-12)
        with pytest.raises(ValueError, match=r"name must be one of .*, got 'other'"):
            operator.block_matmat("other", v)


def test_gauss_newton_against_the_jacobian():
    model, (x, y) = classifier(norm=False), examples(4)
    params = {k: p.detach() for k, p in model.named_parameters()}
    jac = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (x,)))(params)
    j = torch.cat([jac[k].reshape(12, -1) for k in params], 1)
    inner = torch.autograd.functional.hessian(lambda z: F.cross_entropy(z.view(4, 3), y), model(x).detach().flatten())
    close(matrix(GGN(model, F.cross_entropy, [(x, y)])), j.t() @ inner @ j)


def test_fisher():
    model, (x, y) = classifier(norm=False), examples(4)
    rows = []
    for i in range(4):
        grads = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]))
    rows = torch.stack(rows)
    data = [(x[:3], y[:3]), (x[3:], y[3:])]
    close(matrix(Fisher(model, F.cross_entropy, data, kind="empirical")), rows.t() @ rows / 4)
    sampled = Fisher(model, F.cross_entropy, [(x, y)], samples=1500)
    once = matrix(sampled)
    assert torch.equal(once, matrix(sampled))
    gauss = matrix(GGN(model, F.cross_entropy, [(x, y)]))
    assert float((once - gauss).norm() / gauss.norm()) < 0.1  # 1500 draws of 4 rows: 0.02 to 0.04 over seeds
    z = F.one_hot(y, 3).double()
    sampled, gauss = Fisher(model, F.mse_loss, [(x, z)], samples=1500), GGN(model, F.mse_loss, [(x, z)])
    assert float((matrix(sampled) - matrix(gauss)).norm() / matrix(gauss).norm()) < 0.1


def test_rows_of_one_class():
    model, (x, y) = classifier(), examples(9)
    data = [(x[:4], y[:4]), (x[4:], y[4:])]
    of_all = Hessian(model, F.cross_entropy, data)
    total = 0
    for label in range(3):
        chosen = y == label
        got = matrix(of_all.of_class(label))
        close(got, truth(model, x[chosen], y[chosen]))
        total = total + got * float(chosen.sum()) / 9
    close(total, matrix(of_all), 1e-12)


def test_choice_of_parameters():
    model, (x, y) = classifier(), examples(5)
    everything = Hessian(model, F.cross_entropy, [(x, y)])
    full = matrix(everything)
    for choice in (["0.weight", "7.*"], [model[0].weight, "7.weight", "7.bias"]):
        h = Hessian(model, F.cross_entropy, [(x, y)], params=choice)
        assert list(h.blocks) == ["0.weight", "7.weight", "7.bias"]
        rows = torch.cat([torch.arange(full.shape[0])[everything.blocks[k]] for k in h.blocks])
        close(matrix(h), full[rows][:, rows], 1e-12)


def test_to_scipy():
    model, (x, y) = classifier(), examples(5)
    h = Hessian(model, F.cross_entropy, [(x, y)])
    s = h.to_scipy()
    v = np.random.default_rng(0).standard_normal((h.shape[0], 3))
    np.testing.assert_allclose(s @ v, matrix(h).numpy() @ v, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(s @ v[:, 0], (s @ v)[:, 0])


def test_inputs_of_every_form():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, a, b=None):
            return {"logits": self.fc(a * torch.tanh(b))}

    torch.manual_seed(0)
    model, a, b = Two().double(), torch.randn(5, 4).double(), torch.randn(5, 4).double()
    y = torch.tensor([0, 1, 2, 0, 1])

    def loss_fn(out, y):
        return F.cross_entropy(out["logits"], y)

    want = matrix(Hessian(model, loss_fn, [((a, b), y)]))
    close(matrix(Hessian(model, loss_fn, [({"a": a, "b": b}, y)])), want)
    close(matrix(GGN(model, loss_fn, [([a, b], y)])), want)


def test_methods_agree():
    model, (x, y) = classifier(), examples(5)
    want = matrix(Hessian(model, F.cross_entropy, [(x, y)]))
    close(matrix(Hessian(model, F.cross_entropy, [(x, y)], method="double_backward")), want)
    close(matrix(Hessian(model, F.cross_entropy, [(x, y)], method="finite_difference")), want, 1e-6)


def test_other_data_with_the_same_trace(monkeypatch):
    from fastflat.curvature import _problem

    traced = []
    monkeypatch.setattr(_problem, "trace", lambda *args, of=_problem.trace: traced.append(1) or of(*args))
    model, (x, y) = classifier(), examples(12)
    H = Hessian(model, F.cross_entropy, [(x[:6], y[:6])])
    first = matrix(H)
    other = H.on([(x[6:], y[6:])])
    close(matrix(other), truth(model, x[6:], y[6:], F.cross_entropy))
    with torch.no_grad():
        next(model.parameters()).mul_(1.1)
    close(matrix(other), truth(model, x[6:], y[6:], F.cross_entropy))
    assert len(traced) == 1
    assert not torch.equal(matrix(H), first)
    with pytest.raises((TypeError, ValueError), match=r"curvature\.Hessian: data must"):
        H.on(3)

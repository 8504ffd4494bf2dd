# SPDX-License-Identifier: Apache-2.0
"""Operators of a model on data: against dense matrices, over ragged batches, and without a trace left on the model."""

from __future__ import annotations

import copy
import gc

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastflat as ff
from fastflat.curvature import GGN, Fisher, Hessian

from .problems import dense


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


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_model_is_as_before(mode):
    model, (x, y) = classifier(), examples(6)
    model.insert(3, nn.Dropout(0.3)).train(mode == "train")
    model[8].weight.requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    operators = [kind(model, F.cross_entropy, [(x, y)]) for kind in (Hessian, GGN, Fisher)]
    operators.append(Hessian(model, F.cross_entropy, [(x, y)], method="double_backward"))

    def broken(z, y):
        torch.rand(3)
        raise KeyError("broken")

    operators.append(Hessian(model, broken, [(x, y)]))
    for operator in operators:
        try:
            operator @ torch.randn(operator.shape[0], 2, dtype=torch.float64, generator=torch.Generator())
        except KeyError:
            assert operator is operators[-1]
        assert torch.equal(rng, torch.get_rng_state())
        for k, v in model.state_dict().items():
            assert torch.equal(v, state[k]), k
        assert all(m.training == (mode == "train") for m in model.modules())
        assert not model[8].weight.requires_grad
        for p in model.parameters():
            assert (p.grad is None) == (not p.requires_grad)
            assert p.grad is None or bool((p.grad == 1).all())


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
        close(operator.block_matmat(v), want, 1e-12)


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


def test_weights_that_moved_and_modes_that_changed_are_seen():
    model, (x, y) = classifier(), examples(5)
    h = Hessian(model, F.cross_entropy, [(x, y)])
    before = matrix(h)
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    moved = matrix(h)
    close(moved, truth(model, x, y))
    assert not torch.allclose(before, moved)
    model.train()
    close(matrix(h), truth(model, x, y))


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


def test_memory_is_flat_over_repeated_calls():
    model, (x, y) = classifier(), examples(5)
    h = Hessian(model, F.cross_entropy, [(x, y), (x[:3], y[:3])])
    v = torch.randn(h.shape[0], 4, dtype=torch.float64)

    def tensors():
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    h @ v
    before = tensors()
    for _ in range(20):
        h @ v
    assert tensors() <= before


def test_low_precision_tangents():
    model, (x, y) = classifier(), examples(8)
    model, x = model.float(), x.float()
    h, low = (Hessian(model, F.cross_entropy, [(x, y)], tangent_dtype=t) for t in (None, torch.bfloat16))
    v = torch.randn(h.shape[0], 4)
    want, got = h @ v, low @ v
    assert got.dtype == torch.float32
    error = float((got - want).norm() / want.norm())
    assert 1e-5 < error < 3e-2  # bfloat16 has 8 bits


class Twice(nn.Module):
    def forward(self, x):
        return x * 2


def test_functions_that_no_trace_holds_fall_back_with_a_warning():
    class Sign(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sign()

        @staticmethod
        def backward(ctx, g):
            return g

    class Branching(nn.Module):
        def __init__(self, how):
            super().__init__()
            self.fc, self.how = nn.Linear(4, 3), how

        def forward(self, x):
            z = torch.tanh(self.fc(x))
            if self.how == "branch":
                return z * 2 if float(z.sum()) > -1e9 else z
            return Sign.apply(z) + z**3

    for how, message in (("branch", "double backward takes its place"), ("function", "Sign is an autograd.Function")):
        torch.manual_seed(0)
        model, x, y = Branching(how).double(), torch.randn(5, 4).double(), torch.tensor([0, 1, 2, 0, 1])
        with pytest.warns(UserWarning, match=message):
            got = matrix(Hessian(model, F.cross_entropy, [(x, y)]))
        close(got, matrix(Hessian(model, F.cross_entropy, [(x, y)], method="double_backward")))
        with pytest.raises(RuntimeError):
            matrix(Hessian(model, F.cross_entropy, [(x, y)], method="engine"))
        if how == "branch":
            straight = nn.Sequential(model.fc, nn.Tanh(), Twice())
            for kind in (GGN, Fisher):
                with pytest.warns(UserWarning, match=message):
                    got = matrix(kind(model, F.cross_entropy, [(x, y)]))
                close(got, matrix(kind(straight, F.cross_entropy, [(x, y)])))


def test_methods_agree():
    model, (x, y) = classifier(), examples(5)
    want = matrix(Hessian(model, F.cross_entropy, [(x, y)]))
    close(matrix(Hessian(model, F.cross_entropy, [(x, y)], method="double_backward")), want)
    close(matrix(Hessian(model, F.cross_entropy, [(x, y)], method="finite_difference")), want, 1e-6)


def test_what_is_refused():
    model, (x, y) = classifier(), examples(4)
    data = [(x, y)]
    h = Hessian(model, F.cross_entropy, data)
    n = h.shape[0]
    cases = [
        (lambda: h @ torch.zeros(n + 1, dtype=torch.float64), rf"V must have shape \[n={n}\] or \[n={n}, K\], got "),
        (lambda: h.matmat(torch.zeros(2, 3, dtype=torch.float64)), r"V must have shape \[K, n="),
        (lambda: h @ torch.zeros(n), "V must be torch.float64"),
        (lambda: h @ [1.0], "V must be a tensor"),
        (lambda: Hessian(model, F.cross_entropy, (p for p in data)), "gone through again"),
        (lambda: Hessian(model, F.cross_entropy, x), "data must be an iterable"),
        (lambda: matrix(Hessian(model, F.cross_entropy, [])), "at least one batch"),
        (lambda: matrix(Hessian(model, F.cross_entropy, [x])), "pairs"),
        (lambda: Hessian(model, F.cross_entropy, data, params=["0.wieght"]), "close to it: 0.weight"),
        (lambda: Hessian(model, F.cross_entropy, data, params=[torch.zeros(3)]), "params must name parameters"),
        (lambda: Hessian(model, F.cross_entropy, data, params=[]), "at least one"),
        (lambda: Hessian(model, F.cross_entropy, data, chunk=0), "chunk must be a positive int"),
        (lambda: Hessian(model, F.cross_entropy, data, method="magic"), "method must be one of"),
        (lambda: Hessian(model, F.cross_entropy, data, reduction="none"), "reduction must be"),
        (lambda: Fisher(model, F.cross_entropy, data, kind="exact"), "kind must be"),
        (lambda: matrix(Fisher(model, lambda z, y: z.mean(), [(x, y.double())])), "sample must be given"),
        (lambda: matrix(Hessian(model, lambda z, y: z, data)), "loss_fn must return a scalar"),
        (lambda: matrix(Hessian(model.train(), F.cross_entropy, data, microbatch=2)), "microbatch must be None"),
    ]
    for call, message in cases:
        with pytest.raises((ValueError, TypeError), match=message) as caught:
            call()
        assert str(caught.value).startswith("fastflat::curvature.")
        assert "\n" not in str(caught.value)


def test_what_does_not_reach_the_loss_has_zeros_and_nan_passes():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.idle = nn.Linear(4, 3), nn.Linear(2, 2)

        def forward(self, x):
            return self.fc(x)

    torch.manual_seed(0)
    model, x, y = Unused().double(), torch.randn(5, 4).double(), torch.tensor([0, 1, 2, 0, 1])
    for kind in (Hessian, GGN, Fisher):
        h = kind(model, F.cross_entropy, [(x, y)])
        full = matrix(h)
        assert not full[h.blocks["idle.weight"]].any()
        assert full[h.blocks["fc.weight"]].any()
        assert (h @ torch.full((h.shape[0],), torch.nan, dtype=torch.float64)).isnan().any()
    assert not matrix(Hessian(model, lambda z, y: z.sum() * 0 + 1, [(x, y)])).any()
    assert not matrix(Hessian(model, lambda z, y: torch.ones((), dtype=torch.float64), [(x, y)])).any()

# SPDX-License-Identifier: Apache-2.0
"""How operators behave: no trace left on the model, memory flat, what they fall back to, what they refuse."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastflat.curvature import GGN, Fisher, Hessian

from .problems import classifier, close, examples, matrix, truth


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


def test_memory_is_flat_over_repeated_calls():
    model, (x, y) = classifier(), examples(5)
    h = Hessian(model, F.cross_entropy, [(x, y), (x[:3], y[:3])])
    v = torch.randn(h.shape[0], 4, dtype=torch.float64)

    def tensors():
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    h @ v
    before = tensors()
    for _ in range(100):
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
        (lambda: Hessian(model, F.cross_entropy, data, params=["0.weights"]), "close to it: 0.weight"),
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

# SPDX-License-Identifier: Apache-2.0
"""Rebalanced losses: gradients, the schedule's state, refused input; spectra of classes leave the model as it was."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastflat import methods

COUNTS = [50, 10, 2]


@pytest.mark.parametrize("kind", ["ce", "ldam", "logit_adjustment", "vs"])
def test_gradients(kind):
    torch.manual_seed(0)
    loss = methods.RebalancedLoss(COUNTS, kind, scale=3.0, beta=0.99)
    loss.reweight()
    z = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: loss(z, torch.arange(6) % 3), (z,))


def test_losses_by_hand():
    z, y = torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]]), torch.tensor([2, 0])
    n = torch.tensor(COUNTS, dtype=torch.float32)
    scores = z / (50 / n) ** 0.3 + (n / 62).log()
    assert torch.allclose(methods.RebalancedLoss(COUNTS, "vs")(z, y), F.cross_entropy(scores, y))
    m = 0.5 * (2 / n) ** 0.25
    moved = z.clone()
    moved[0, 2] -= m[2]
    moved[1, 0] -= m[0]
    assert torch.allclose(methods.RebalancedLoss(COUNTS, "ldam")(z, y), F.cross_entropy(30 * moved, y))


def test_scores_of_autocast():
    z, y = torch.randn(6, 3).bfloat16().requires_grad_(), torch.arange(6) % 3
    loss = methods.RebalancedLoss(COUNTS, "vs")
    found = loss(z, y)
    assert found.dtype == torch.float32
    assert torch.allclose(found, loss(z.float(), y))
    found.backward()
    assert z.grad.dtype == torch.bfloat16


def test_scores_are_cosines():
    layer = methods.CosineLinear(4, 3)
    x = torch.randn(5, 4)
    want = F.cosine_similarity(x[:, None], layer.weight[None], dim=-1)
    assert torch.allclose(layer(x), want, atol=1e-6)
    assert torch.allclose(layer(7 * x), want, atol=1e-6)


def test_weights_start_when_told_and_are_in_the_state():
    z, y = torch.randn(9, 3), torch.arange(9) % 3
    loss, other = (methods.RebalancedLoss(COUNTS, "ce", beta=0.9) for _ in range(2))
    assert torch.allclose(loss(z, y), F.cross_entropy(z, y))
    loss.reweight()
    want = torch.tensor([0.1 / (1 - 0.9**n) for n in COUNTS])
    assert torch.allclose(loss.weight, want / want.mean())
    other.load_state_dict(loss.state_dict())
    assert other(z, y) == loss(z, y) != F.cross_entropy(z, y)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"counts": [3, 0]}, "counts must be at least 1"),
        ({"counts": None}, "counts must be a number for each class"),
        ({"kind": "focal"}, "kind must be one of"),
        ({"tau": -1.0}, "tau must be at least 0"),
        ({"scale": 0.0}, "scale must be above 0"),
        ({"beta": 1.0}, "beta must lie in"),
    ],
)
def test_refused(options, line):
    with pytest.raises(ValueError, match=line):
        methods.RebalancedLoss(**{"counts": COUNTS, **options})


def test_refused_calls():
    loss = methods.RebalancedLoss(COUNTS)
    with pytest.raises(ValueError, match="beta must be given"):
        loss.reweight()
    with pytest.raises(ValueError, match="logits must be"):
        loss(torch.randn(4, 5), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="classes must have examples"):
        methods.classwise_spectra(nn.Linear(3, 3), torch.randn(2, 3), torch.tensor([0, 1]), classes=[2])


def test_spectra_agree_with_the_matrix_and_leave_the_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2)).double()
    x, y = torch.randn(12, 2, dtype=torch.float64), torch.tensor([0] * 9 + [1] * 3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = methods.classwise_spectra(model, x, y, tol=1e-6)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.eval()
    shapes = {k: p.shape for k, p in model.named_parameters()}
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])

    def loss(w, mine):
        parts = w.split([s.numel() for s in shapes.values()])
        params = {k: p.view(s) for (k, s), p in zip(shapes.items(), parts, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, params, (x[mine],)), y[mine])

    for c, spectrum in found.items():
        H = torch.autograd.functional.hessian(lambda w, c=c: loss(w, y == c), flat)
        ends = torch.linalg.eigvalsh(H)
        assert spectrum.largest == pytest.approx(float(ends[-1]), rel=1e-4)
        assert spectrum.smallest == pytest.approx(float(ends[0]), rel=1e-4)
        assert spectrum.converged
        assert abs(spectrum.trace - float(H.trace())) < 4 * spectrum.trace_error
        assert spectrum.examples == int((y == c).sum())

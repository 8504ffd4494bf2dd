# SPDX-License-Identifier: Apache-2.0
"""Second-order attacks: Krylov least squares of each sample, and that the model stays as it was."""

import copy

import pytest
import torch
from torch import nn

import fastflat as ff
from fastflat.curvature import InputHessian
from fastflat.methods import KrylovAdversarialLoss, krylov_solve, second_order_attack

FREE = {"lo": None, "hi": None}


class Matrices:
    """One symmetric matrix for each row, with its products counted."""

    def __init__(self, H):
        self.H, self.count = H, 0

    def matmat(self, V):
        self.count += 1
        return torch.einsum("bij,bj->bi", self.H, V)


class Steps(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :3].detach().round()


def some(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(activation=nn.ReLU):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), activation(), nn.Flatten(), nn.Linear(144, 3)).eval()


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("m", [1, 2, 4])
def test_solution_is_the_minimum_over_the_krylov_space(m, damping):
    H = some(5, 7, 7).double()
    H, b = H + H.mT, some(5, 7, seed=1).double()
    found = krylov_solve(Matrices(H), b, m, damping)
    vectors = [b]
    for _ in range(m - 1):
        vectors.append(torch.einsum("bij,bj->bi", H, vectors[-1]))
    K = torch.stack([v / v.norm(dim=1, keepdim=True) for v in vectors], 2)
    A = (H + damping * torch.eye(7).double()) @ K
    left = (A @ torch.linalg.lstsq(A, b[..., None]).solution)[..., 0] - b
    torch.testing.assert_close(found.residual, left.norm(dim=1), rtol=1e-9, atol=1e-12)
    inside = (H + damping * torch.eye(7).double()) @ found.x[..., None]
    torch.testing.assert_close((inside[..., 0] - b).norm(dim=1), found.residual, rtol=1e-9, atol=1e-12)


def test_complete_spaces_and_rows_of_zeros():
    """A row that is an eigenvector, a row of zeros and a row of full rank, side by side."""
    H = torch.diag(torch.tensor([1.0, 2.0, 4.0])).double().expand(3, 3, 3)
    b = torch.tensor([[0, 1, 0], [0, 0, 0], [1, 1, 1]]).double()
    op = Matrices(H)
    found = krylov_solve(op, b, 3)
    torch.testing.assert_close(found.x, b / torch.tensor([1, 2, 4]), rtol=0, atol=1e-13)
    assert found.products == op.count == 3
    zero = krylov_solve(Matrices(torch.zeros(2, 3, 3)), some(2, 3), 2)
    assert torch.equal(zero.x, torch.zeros(2, 3))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_without_numbers_leaves_the_others_alone(value):
    H, b = torch.diag(torch.tensor([1.0, 2.0, 4.0])).double().repeat(3, 1, 1), torch.ones(3, 3).double()
    alone = krylov_solve(Matrices(H), b, 2)
    H[1, 0, 0], b[2, 1] = value, value
    found = krylov_solve(Matrices(H), b, 2)
    assert torch.equal(found.x[0], alone.x[0])
    assert bool(found.x[1:].isnan().all())
    model = network()
    model[4].weight.data[0, 0] = value
    with pytest.raises(ValueError, match="logits must be numbers, got NaN"):
        second_order_attack(model, some(6, 1, 8, 8).sigmoid(), torch.arange(6) % 3, 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("confident", [1, 100])
def test_products_behind_a_piecewise_linear_network(monkeypatch, dtype, confident):
    """Never more than C - 1 in a step, whatever is asked for; with smooth activations as many as are. Where more than
    C - 1 are asked for, the attack takes one product of the logits beside."""
    taken = []
    matmat = InputHessian.matmat
    monkeypatch.setattr(InputHessian, "matmat", lambda op, V: taken.append(1) or matmat(op, V))
    x, y = some(6, 1, 8, 8).to(dtype), torch.arange(6) % 3
    for activation, asked, most, probes in (
        (nn.ReLU, 9, 2, 1),
        (nn.ReLU, 2, 2, 0),
        (nn.ReLU, None, 2, 0),
        (nn.ReLU, 1, 0, 0),
        (nn.Softplus, 5, 5, 1),
    ):
        taken.clear()
        model = network(activation).to(dtype)
        model[-1].weight.data *= confident
        second_order_attack(model, x, y, 0.1, steps=2, m=asked, **FREE)
        assert len(taken) == 2 * most + probes


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_stays_in_ball_and_range_and_leaves_the_model_alone(norm):
    model = network()
    before = copy.deepcopy(model.state_dict())
    x, y = some(6, 1, 8, 8).sigmoid(), torch.arange(6) % 3
    active = torch.tensor([True, False] * 3)
    state = torch.get_rng_state()
    options = {"norm": norm, "active": active, "generator": torch.Generator().manual_seed(0)}
    found = second_order_attack(model, x, y, 0.2, steps=3, **options)
    size = (found - x).flatten(1)
    assert torch.equal(found[~active], x[~active])
    assert (size.abs().amax(1) if norm == "linf" else size.norm(dim=1)).max() <= 0.2 + 1e-6
    assert found.min() >= 0
    assert found.max() <= 1
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    loss = nn.functional.cross_entropy
    assert loss(model(found), y) > loss(model(x), y)


def test_training_on_a_quantized_network_with_batch_norm():
    model = ff.prepare(network(), weights=ff.QuantSpec.lsq(bits=4, axis=0)).train()
    x, y = some(12, 1, 8, 8), torch.arange(12) % 3
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    objective, losses = KrylovAdversarialLoss(0.05, **FREE), []
    for step in range(8):
        opt.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=step == 0):
            loss, scores = objective(model, x, y)
        assert scores.shape == (12, 3)
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    assert all(module.training for module in model.modules())
    assert losses[-1] < losses[0]
    counts = [b for name, b in model.named_buffers() if name.endswith("num_batches_tracked")]
    assert counts[0] == 8
    assert not torch.equal(*(objective(model.eval(), x, y)[1] for _ in range(2)))  # each from its own random start


def test_refused():
    model, x, y = network(), some(6, 1, 8, 8).sigmoid(), torch.arange(6) % 3
    with pytest.raises(ValueError, match="m must be an integer of at least 1, got 0"):
        second_order_attack(model, x, y, 0.1, m=0)
    with pytest.raises(ValueError, match="damping must be a finite number of at least 0, got -1"):
        second_order_attack(model, x, y, 0.1, damping=-1)
    with pytest.raises(ValueError, match=r"model must return logits \[B=6, C\]"):
        second_order_attack(nn.Conv2d(1, 2, 3), x, y, 0.1)
    with pytest.raises(ValueError, match="model must be differentiable in its inputs"):
        second_order_attack(Steps(), x, y, 0.1)
    with pytest.raises(ValueError, match="model must keep samples apart"):
        second_order_attack(network().train(), x, y, 0.1)
    with pytest.raises(ValueError, match="y must lie in 0 to 2"):
        second_order_attack(model, x, y + 1, 0.1)
    with pytest.raises(ValueError, match=r"B must be a floating tensor \[B, d\], got torch.float32 \[3\]"):
        krylov_solve(Matrices(torch.eye(3)), torch.ones(3), 1)

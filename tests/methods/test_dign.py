# SPDX-License-Identifier: Apache-2.0
"""DiGN: the loss by hand, which pass moves the buffers, gradients to both sides, refused input."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastflat import methods, noise_batch


def _net(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def _batch(dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    return torch.randn(10, 6, generator=g).to(dtype), torch.arange(10) % 3


@pytest.mark.parametrize("confident", [False, True])
@pytest.mark.parametrize("joint", [False, True])
def test_by_hand(joint, confident):
    net, (x, y) = _net(), _batch()
    views = [x + 0.1, 2 * x]
    dign = methods.DiGN(
        net, 2, 0.7, smax=0.5, keep_prob=0.5, confident=confident, views_weight=3.0, joint=joint,
        generator=torch.Generator().manual_seed(5),
    )  # fmt: skip
    loss, scores = dign(x, y, views)
    got = torch.autograd.grad(loss, list(net.parameters()))

    own = _net()
    noisy = noise_batch(x, 2, smax=0.5, keep_prob=0.5, generator=torch.Generator().manual_seed(5))
    others = torch.cat([*noisy, *views])
    both = own(torch.cat([x, others])) if joint else torch.cat([own(x), own(others)])
    log_p, log_1, log_2, log_a, log_b = both.log_softmax(1).view(5, 10, 3)
    p = log_p.exp()
    kl = ((p * (log_p - log_1)).sum(1) + (p * (log_p - log_2)).sum(1)) / 2
    if confident:
        kl = kl * p[torch.arange(10), y].detach()
    middle = ((p + log_a.exp() + log_b.exp()) / 3).log()
    js = sum((q.exp() * (q - middle)).sum(1) for q in (log_p, log_a, log_b)) / 3
    want = F.nll_loss(log_p, y) + 0.7 * kl.mean() + 3.0 * js.mean()
    assert torch.allclose(scores, both[:10])
    assert torch.allclose(loss, want, rtol=1e-12)
    for a, b in zip(got, torch.autograd.grad(want, list(own.parameters())), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_statistics_are_those_of_the_clean_pass():
    net, other, joint, (x, y) = _net(), _net(), _net(), _batch()
    methods.DiGN(net)(x, y)[0].backward()
    other(x)
    methods.DiGN(joint, joint=True)(x, y)
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in net.state_dict().items())
    assert int(net[1].num_batches_tracked) == 1
    assert not torch.equal(joint[1].running_mean, other[1].running_mean)


def test_evaluation_mode_has_gradients():
    net, (x, y) = _net().eval(), _batch()
    methods.DiGN(net)(x, y)[0].backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
    assert not net.training


def test_the_noise_is_the_generators():
    net, (x, y) = _net(), _batch()
    losses = [methods.DiGN(net, generator=torch.Generator().manual_seed(s))(x, y)[0].item() for s in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_autocast():
    net, (x, y) = _net(torch.float32), _batch(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, scores = methods.DiGN(net, confident=True)(x, y, [x])
    loss.backward()
    assert scores.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_training_makes_noisy_answers_agree():
    """Against cross-entropy alone from the same start."""
    x, y = _batch()
    ends = []
    for lam in (0.0, 2.0):
        net = _net()
        dign = methods.DiGN(net, 4, lam, smax=1.0, keep_prob=1.0, generator=torch.Generator().manual_seed(2))
        opt = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9)
        for _ in range(40):
            opt.zero_grad()
            dign(x, y)[0].backward()
            opt.step()
        net.eval()
        noisy = noise_batch(x, 200, law="const", smax=0.5, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            p, q = net(x).softmax(-1), net(noisy.flatten(0, 1)).view(200, 10, 3).softmax(-1)
        ends.append(float((q - p).abs().mean()))
    assert ends[1] < 0.8 * ends[0]


@pytest.mark.parametrize(
    ("options", "error", "line"),
    [
        ({"model": abs}, TypeError, "model must be a torch.nn.Module"),
        ({"K": 0}, ValueError, "K must be 1 or more"),
        ({"lam": -0.1}, ValueError, "lam must be at least 0"),
        ({"views_weight": float("inf")}, ValueError, "views_weight must be at least 0 and finite"),
        ({"smax": -1.0}, ValueError, "smax must lie in"),
        ({"law": "normal"}, ValueError, "law must be one of"),
        ({"keep_prob": 1.5}, ValueError, "keep_prob must lie in"),
    ],
)
def test_refused(options, error, line):
    with pytest.raises(error, match=line):
        methods.DiGN(**{"model": nn.Identity(), **options})


def test_refused_calls():
    x, y = _batch()
    with pytest.raises(ValueError, match="views must be like x"):
        methods.DiGN(_net())(x, y, [x[:3]])
    with pytest.raises(ValueError, match=r"model must return logits \[B=10, C\]"):
        methods.DiGN(nn.Flatten(0))(x, y)
    with pytest.raises(TypeError, match=r"model must return logits \[B=40, C\], got tuple"):
        methods.DiGN(nn.LSTM(6, 3).double(), joint=True)(x, y)

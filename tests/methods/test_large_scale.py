# SPDX-License-Identifier: Apache-2.0
"""Recipes of large-scale training beyond the checks of their method."""

import copy

import pytest
import torch
from torch import nn

import fastflat as ff
from fastflat.methods import large_scale


def block():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2))


@pytest.mark.parametrize("autocast", [False, True])
def test_checkpointing_changes_nothing_but_what_is_kept(autocast):
    torch.manual_seed(0)
    plain = nn.Sequential(block(), nn.Sequential(nn.Flatten(), nn.Linear(4 * 36, 5)))
    model = ff.methods.checkpoint_activations(copy.deepcopy(plain), ["0"])
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    x, ends, kept = torch.randn(8, 3, 8, 8), [], []
    for m in (plain, model):
        torch.manual_seed(1)
        sizes = []
        saved = torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: (s.append(t.numel()), t)[1], lambda t: t)
        with saved, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = m(x).square().mean()
        loss.backward()
        kept.append(sum(sizes))
        ends.append([loss.detach(), *(p.grad for p in m.parameters()), *m.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert kept[1] < kept[0] / 2
    assert model[0][1].num_batches_tracked == 1
    plain.eval(), model.eval()
    assert torch.equal(plain(x), model(x))


class Counting(nn.Module):
    """A layer with state of its own, of no kind that torch knows."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x * self.calls


def test_checkpointing_leaves_any_buffer_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), Counting())
    plain = copy.deepcopy(model)
    ff.methods.checkpoint_activations(model, ["1"])
    x = torch.randn(4, 3)
    for _ in range(2):
        for m in (plain, model):
            loss = m(x).sum()
            loss.backward(retain_graph=True)
            loss.backward()
    assert model[1].calls == plain[1].calls == 2
    assert torch.equal(model[0].weight.grad, plain[0].weight.grad)


def test_warmup_starts_at_the_small_rate_and_ends_at_none():
    factor = ff.methods.warmup_cosine(100, 10, 1 / 16)
    assert factor(0) == 1 / 16
    assert factor(10) == 1.0
    assert factor(5) == pytest.approx((1 + 1 / 16) / 2)
    assert factor(55) == pytest.approx(0.5)
    assert factor(100) == pytest.approx(0.0)
    assert ff.methods.scaled_rate(0.1, 1024, 64) == pytest.approx(1.6)
    assert ff.methods.scaled_rate(0.1, 1024, 64, "sqrt") == pytest.approx(0.4)


def test_workers_in_one_process_give_the_mean_of_what_they_sent():
    torch.manual_seed(0)
    model, how = nn.Linear(6, 3), ff.distributed.Compression("topk", share=0.2)
    hook, (x, y) = large_scale._Workers(how), (torch.randn(16, 6), torch.randint(3, (16,)))
    loss, _ = hook.loss(model, x, y)
    loss.backward()
    assert loss.item() == pytest.approx(nn.functional.cross_entropy(model(x), y).item(), abs=1e-5)
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    left = sum(hook.errors) / 4
    whole_loss = nn.functional.cross_entropy(model(x), y)
    whole = torch.cat([g.flatten() for g in torch.autograd.grad(whole_loss, [*model.parameters()])])
    torch.testing.assert_close(found + left, whole)
    assert hook.bytes == 4 * 4 * (4 + 4)


MODEL = nn.Sequential(nn.Linear(2, 2))
BAD = (
    (lambda: ff.methods.scaled_rate(0.1, 128, 64, "cubic"), "rule must be one of linear, sqrt, none, got 'cubic'"),
    (lambda: ff.methods.scaled_rate(0.1, 0, 64), "batch and base_batch must be 1 or more, got 0 and 64"),
    (lambda: ff.methods.warmup_cosine(10, 10), r"rise must lie in \[0, steps=10\)"),
    (lambda: ff.methods.checkpoint_activations(MODEL, ["0", "7"]), "names must be of submodules, got '7'"),
    (lambda: ff.methods.checkpoint_activations(MODEL, ["0", "0"]), "'0' must not have a forward of its own already"),
)


@pytest.mark.parametrize(("call", "message"), BAD, ids=[text for _, text in BAD])
def test_bad_input_gets_one_line_and_changes_nothing(call, message):
    with pytest.raises(ValueError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)
    assert "forward" not in vars(MODEL[0])

# SPDX-License-Identifier: Apache-2.0
"""``prepare(fuse_weights=True)``: the same bits as without it, in every mode in which a model is called."""

from __future__ import annotations

import copy
import pickle
from unittest import mock

import pytest
import torch
from torch import nn

import fastflat as ff
from fastflat.quant import _ahead
from tests.ranks import leave

WEIGHTS = ff.QuantSpec.lsq(bits=4, axis=0)
AFFINE = ff.QuantSpec(bits=3, symmetric=False)


class Model(nn.Module):
    """Every kind of layer with a quantized weight; ``twice`` is called two times."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.twice = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lstm = nn.LSTM(8, 6, batch_first=True)
        self.head = nn.Linear(6, 3)
        self.unused = nn.Linear(4, 4)

    def forward(self, i):
        x = self.embed(i)
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = self.twice(torch.relu(self.twice(x)))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.lstm(x)[0])


def pair(weights=WEIGHTS, **arguments):
    """The same model without and with fused weights."""
    torch.manual_seed(0)
    plain = Model()
    fused = copy.deepcopy(plain)
    ff.prepare(plain, weights=weights, **arguments)
    return plain, ff.prepare(fused, weights=weights, fuse_weights=True, **arguments)


@pytest.fixture
def i():
    return torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(1))


def lists():
    """Counts the calls of fake_quantize_list."""
    return mock.patch.object(_ahead, "fake_quantize_list", wraps=_ahead.fake_quantize_list)


def singles():
    return mock.patch("fastflat.quant.quantizer.fake_quantize", wraps=ff.fake_quantize)


def results(model, *inputs):
    y = model(*inputs)
    model.zero_grad(set_to_none=True)
    y.float().square().sum().backward()
    return y.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_same(a, b):
    assert torch.equal(a[0], b[0])
    assert a[1].keys() == b[1].keys()
    for name, gradient in a[1].items():
        assert (gradient is None) == (b[1][name] is None), name
        assert gradient is None or torch.equal(gradient, b[1][name]), name


@pytest.mark.parametrize("weights", [WEIGHTS, AFFINE, ff.QuantSpec.lsq(3, scale_is="log2")])
def test_same_bits_of_outputs_and_gradients(weights, i):
    plain, fused = pair(weights)
    with lists() as calls, singles() as each:
        assert_same(results(plain, i), results(fused, i))
        assert calls.call_count == 1
        # The plain model calls each of its nine used weights, one of them twice; the fused one the second time alone.
        assert each.call_count == 9 + 1
    with torch.no_grad():
        for model in (plain, fused):
            for p in model.parameters():
                p.mul_(0.9)
    assert_same(results(plain, i), results(fused, i))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(i, context):
    plain, fused = pair()
    with context(), singles() as each:
        assert torch.equal(plain.eval()(i), fused.eval()(i))
        before = each.call_count
        fused(i)
        assert each.call_count == before  # the second call of a layer, too, finds its weight ready


def test_a_part_alone_and_weights_that_change(i):
    plain, fused = pair()
    x = torch.randn(2, 8)
    assert torch.equal(plain.twice(x), fused.twice(x))
    fused(i)
    with torch.no_grad():
        plain.twice.weight.add_(0.3)
        fused.twice.weight.add_(0.3)
    assert torch.equal(plain.twice(x), fused.twice(x))
    assert torch.equal(plain(i), fused(i))


@torch.no_grad()
def test_a_weight_that_changes_during_forward(i):
    models = pair()
    for model in models:

        def change(*_, model=model):
            model.head.weight.mul_(2)
            model.head.weight_quantizer.scale.mul_(1.5)

        model.lstm.register_forward_hook(change)
    assert torch.equal(*(model(i) for model in models))


def test_quantizers_that_are_off_or_different(i):
    plain, fused = pair()
    for model in (plain, fused):
        model.conv.weight_quantizer.enabled = False
        model.head.weight_quantizer.spec = WEIGHTS.replace(noise="uniform")
        model.head.weight_quantizer.nu = torch.tensor(1.0)
    outputs = []
    for model in (plain, fused):
        torch.manual_seed(5)
        outputs.append(results(model, i))
    assert_same(*outputs)
    assert_same(results(plain.eval(), i), results(fused.eval(), i))
    seen = []
    for model in (plain, fused):
        model.twice.weight_quantizer.register_forward_hook(lambda *_: seen.append(1))
        results(model, i)
    assert len(seen) == 4


def test_autocast(i):
    plain, fused = pair()
    with torch.autocast("cpu", torch.bfloat16), lists() as calls, singles() as each:
        assert_same(results(plain, i), results(fused, i))
        assert calls.call_count == 2  # bf16 for products, fp32 for the rest
        assert each.call_count == 9 + 1


def test_copies_pickles_and_state(i):
    plain, fused = pair()
    expected = results(plain, i)
    assert plain.state_dict().keys() == fused.state_dict().keys()
    for model in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        with lists() as calls:
            assert_same(results(model, i), expected)
            assert calls.call_count == 1
    fused(i)
    other, _ = pair()
    with torch.no_grad():
        other.head.weight.mul_(1.5)
    fused.load_state_dict(other.state_dict())
    assert torch.equal(fused(i), other(i))


def test_an_error_in_forward_leaves_nothing_behind(i):
    _, fused = pair()
    with pytest.raises(IndexError):
        fused(i + 100)
    assert _ahead._store.get() is None
    fused(i)
    assert _ahead._store.get() is None


def test_roots_within_roots(i):
    plain, fused = pair()
    inner, outer = nn.Sequential(plain), nn.Sequential(fused)
    _ahead.install(outer)
    with lists() as calls:
        assert_same(results(inner, i), results(outer, i))
        assert calls.call_count == 1
    assert _ahead._store.get() is None


def test_gradient_modes_inside_the_model(i):
    class Frozen(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, i):
            with torch.enable_grad():
                return self.model(i)

    plain, fused = (Frozen(model) for model in pair())
    fused.model._forward_pre_hooks.clear()
    fused.model._forward_hooks.clear()
    _ahead.install(fused)
    with torch.no_grad():
        y, expected = fused(i), plain(i)
    assert y.requires_grad
    assert torch.equal(y, expected)


def test_compile(i):
    plain, fused = pair(skip=("lstm",))
    torch._dynamo.reset()
    y = torch.compile(fused, backend="aot_eager")(i)
    torch.testing.assert_close(y, plain(i))


def test_distributed_data_parallel(i, tmp_path):
    distributed = torch.distributed
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain, fused = pair()
        expected = results(plain, i)
        wrapped = nn.parallel.DistributedDataParallel(fused, find_unused_parameters=True)
        wrapped(i).square().sum().backward()
        for name, p in fused.named_parameters():
            assert p.grad is None or expected[1][name] is None or torch.equal(p.grad, expected[1][name]), name
        assert sum(p.grad is not None for p in fused.parameters()) >= sum(g is not None for g in expected[1].values())
    finally:
        leave()

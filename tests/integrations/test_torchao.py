# SPDX-License-Identifier: Apache-2.0
"""torchao's fake quantizers, accelerated: bits of results, gradients and scales, and trajectories."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastflat as ff

from . import alike

qat = pytest.importorskip("torchao.quantization.qat")
ao = pytest.importorskip("torchao.quantization")

FLOAT_ZERO = {"zero_point_precision": torch.float32}
STATIC = {"is_dynamic": False}
LEARNED = {"is_dynamic": False, "range_learning": True, **FLOAT_ZERO}
FORMS = {
    "token": {"dtype": torch.int8, "granularity": "per_token", "is_symmetric": False},
    "token bf16 scale": {
        "dtype": torch.int8, "granularity": "per_token", "is_symmetric": False, "scale_precision": None
    },
    "token static": {"dtype": torch.int8, "granularity": "per_token", "is_symmetric": False, **STATIC},
    "token learned": {"dtype": torch.int8, "granularity": "per_token", "is_symmetric": False, **LEARNED},
    "axis": {"dtype": torch.int8, "granularity": "per_channel"},
    "axis affine": {"dtype": torch.int4, "granularity": "per_channel", "is_symmetric": False},
    "axis learned": {"dtype": torch.int4, "granularity": "per_channel", **LEARNED},
    "group": {"dtype": torch.int4, "group_size": 8},
    "group eps": {"dtype": torch.int2, "group_size": 8, "eps": 1e-3},
    "group affine": {"dtype": torch.int4, "group_size": 8, "is_symmetric": False},
    "group affine eps": {"dtype": torch.uint4, "group_size": 8, "is_symmetric": False, "eps": 1e-3},
    "group static": {"dtype": torch.int4, "group_size": 8, **STATIC},
    "group learned": {"dtype": torch.int4, "group_size": 8, **LEARNED},
    "group affine learned": {"dtype": torch.int4, "group_size": 8, "is_symmetric": False, **LEARNED},
}  # fmt: skip


def quantizer(form, first):
    """As its users have it: initialised by a first batch where it keeps its scale."""
    made = qat.IntxFakeQuantizer(qat.IntxFakeQuantizeConfig(**FORMS[form]))
    made._initialized = True
    if not made.config.is_dynamic:
        made(first)
    return made


def assert_same_scales(theirs, ours):
    for name in ("scale", "zero_point"):
        a, b = getattr(theirs, name).detach(), getattr(ours, name).detach()
        alike.same(a, b)


def shapes(form):
    return [(5, 7, 33), (4, 16)] if form.startswith("token") else [(5, 24)]


@pytest.mark.parametrize("form", FORMS)
def test_bits_over_calls(form, monkeypatch):
    for shape in shapes(form):
        theirs = quantizer(form, alike.data(shape, 9))
        ours = alike.accelerated(theirs)
        with alike.by_fastflat_alone(monkeypatch):
            for x in alike.layouts(shape, 1, scale=2.0):
                alike.assert_alike(theirs, ours, [x, torch.zeros(shape), x + 3.0])
                assert_same_scales(theirs, ours)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", [f for f in FORMS if "learned" not in f])
def test_sixteen_bits(form, dtype):
    shape = shapes(form)[0]
    theirs = quantizer(form, alike.data(shape, 9, dtype=dtype))
    ours = alike.accelerated(theirs)
    for seed in range(3):
        alike.assert_alike(theirs, ours, alike.layouts(shape, 4 * seed, dtype=dtype, scale=seed + 0.3))
        assert_same_scales(theirs, ours)


@pytest.mark.parametrize("form", ["token static", "axis", "group static", "group affine"])
def test_nan_and_infinities(form):
    """In y everywhere; in dx where they do not make the scale."""
    shape = shapes(form)[0]
    theirs = quantizer(form, alike.data(shape, 9))
    ours = alike.accelerated(theirs)
    x = alike.data(shape, 3, special=True)
    alike.same(theirs(x), ours(x))
    if theirs.config.is_dynamic:
        assert_same_scales(theirs, ours)
    else:
        alike.assert_alike(theirs, ours, [x])


@pytest.mark.parametrize("form", ["token", "group"])
def test_what_the_module_refuses_it_still_refuses(form):
    theirs = quantizer(form, None)
    ours = alike.accelerated(theirs)
    for x in (torch.randn(3, 2, 4), torch.randn(3, 5), torch.randn(3, 8).double(), torch.randn(8)):
        results = []
        for twin in (theirs, ours):
            try:
                results.append(twin(x))
            except Exception as error:
                results.append((type(error), str(error)))
        if isinstance(results[0], tuple):
            assert results[0] == results[1]
        else:
            alike.same(*results)


def test_switched_off_and_on():
    theirs = quantizer("token", None)
    ours = alike.accelerated(theirs)
    x = alike.data((3, 8))
    ours.enabled = False
    assert ours(x) is x
    ours.enabled = True
    alike.same(theirs(x), ours(x))


def test_left_alone():
    """Forms without a spec, each with its reason."""
    config = qat.IntxFakeQuantizeConfig
    floats = getattr(qat, "Float8FakeQuantizeConfig", None)
    domain = pytest.importorskip("torchao.quantization.quant_primitives").ZeroPointDomain.FLOAT
    model = nn.ModuleList(
        [
            qat.IntxFakeQuantizer(config(torch.int8, "per_token", is_symmetric=True)),
            qat.IntxFakeQuantizer(config(torch.int4, group_size=8, is_symmetric=False, zero_point_domain=domain)),
            quantizer("token", None),
        ]
    )
    if floats is not None:
        model.append(qat.FakeQuantizerBase.from_config(floats()))
    report = ff.accelerate(model)
    assert [e.names for e in report.swapped] == [("2",)]
    whys = ["torchao has no symmetric quantization per token", "its zero-points are in the domain FLOAT"]
    assert [e.why for e in report.left] == whys + ["no adapter knows it"] * (floats is not None)


class Transformer(nn.Module):
    """One block of attention and a feed-forward net, over an embedding."""

    def __init__(self, dim=16, heads=2):
        super().__init__()
        self.heads = heads
        self.embedding = nn.Embedding(11, dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.norms = nn.ModuleList([nn.LayerNorm(dim), nn.LayerNorm(dim)])
        self.head = nn.Linear(dim, 4)

    def forward(self, tokens):
        x = self.embedding(tokens)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norms[0](x)).chunk(3, -1))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))
        return self.head(x.mean(1))


def batches(count=4, size=6):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(11, (count, size, 7), generator=generator)
    return [(t, t.sum(1) % 4) for t in tokens]


def prepared(kind="configs"):
    torch.manual_seed(0)
    model = Transformer()
    if kind == "base":
        base = ao.Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4, weight_granularity=ao.PerGroup(8), weight_mapping_type=ao.MappingType.SYMMETRIC
        )
        ao.quantize_(model, qat.QATConfig(base, step="prepare"))
        return model
    weight = qat.IntxFakeQuantizeConfig(torch.int4, group_size=8, **(LEARNED if kind == "learned" else {}))
    activation = None if kind == "learned" else qat.IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    ao.quantize_(model, qat.QATConfig(activation_config=activation, weight_config=weight, step="prepare"))
    if kind == "configs":
        filters = {"filter_fn": lambda module, name: isinstance(module, nn.Embedding)}
        ao.quantize_(model, qat.QATConfig(weight_config=weight, step="prepare"), **filters)
    if kind == "learned":
        qat.initialize_fake_quantizers(model, (batches()[0][0],))
    return model


@pytest.mark.parametrize("kind", ["configs", "base"])
def test_training(kind):
    model = prepared(kind)
    report = ff.accelerate(copy.deepcopy(model))
    assert len(report.swapped) == (11 if kind == "configs" else 10)
    alike.assert_same_training(model, batches())


def test_training_with_learned_scales():
    alike.assert_within_spread(prepared("learned"), batches(), lr=0.005)


def test_conversion_and_restore():
    model = prepared()
    ours = alike.accelerated(model)
    assert ff.restore(copy.deepcopy(ours)) == 11
    for twin in (model, ours):
        ao.quantize_(twin, qat.QATConfig(step="convert"))
    tokens = batches()[0][0]
    assert torch.equal(model(tokens), ours(tokens))


def test_compiled():
    linear = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4))
    activation = qat.IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weight = qat.IntxFakeQuantizeConfig(torch.int4, group_size=8)
    ao.quantize_(linear, qat.QATConfig(activation_config=activation, weight_config=weight, step="prepare"))
    ours = alike.accelerated(linear)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    x = alike.data((5, 16))
    for twin in (linear, compiled):
        for _ in range(2):
            twin(x).square().sum().backward()
    for p, q in zip(linear.parameters(), ours.parameters(), strict=True):
        alike.same(p.grad, q.grad)

# SPDX-License-Identifier: Apache-2.0
"""QuantLinear and QuantConv2d: the formula, types, compilation, and what they share with the layer they replace."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastflat as ff
from fastflat.quant import (
    QuantConv1d,
    QuantConv2d,
    QuantConvTranspose1d,
    QuantConvTranspose2d,
    QuantEmbedding,
    QuantLinear,
    summary,
)

from .conftest import ACTIVATIONS, WEIGHTS


def linear(**settings):
    torch.manual_seed(2)
    layer = QuantLinear.from_float(nn.Linear(6, 5), WEIGHTS, ACTIVATIONS, **settings)
    layer.input_quantizer.set_scale(torch.tensor(0.1))
    return layer


def test_linear_is_its_formula():
    layer, x = linear(), torch.rand(3, 6)
    w = ff.fake_quantize(layer.weight, layer.weight_quantizer.scale, spec=WEIGHTS)
    q = ff.fake_quantize(x, layer.input_quantizer.scale, spec=ACTIVATIONS)
    assert torch.equal(layer(x), F.linear(q, w, layer.bias))


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_convolution_is_its_formula(mode):
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, dilation=1, padding_mode=mode)
    layer = QuantConv2d.from_float(conv, WEIGHTS, ff.QuantSpec.lsq(bits=3, axis=1, signed=False))
    layer.input_quantizer.set_scale(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    x = torch.rand(2, 4, 7, 7)
    with torch.no_grad():
        plain = copy.deepcopy(conv)
        plain.weight.copy_(ff.fake_quantize(conv.weight, layer.weight_quantizer.scale, spec=WEIGHTS))
        q = ff.fake_quantize(x, layer.input_quantizer.scale, spec=layer.input_quantizer.spec)
        assert torch.equal(layer(x), plain(q))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("kind", "form", "size"),
    [
        (nn.Conv1d, QuantConv1d, (9,)),
        (nn.ConvTranspose1d, QuantConvTranspose1d, (5,)),
        (nn.ConvTranspose2d, QuantConvTranspose2d, (5, 4)),
    ],
)
def test_other_convolutions_are_their_formula(kind, form, size, groups):
    torch.manual_seed(0)
    conv = kind(4, 6, 3, stride=2, padding=1, groups=groups)
    layer = form.from_float(conv, WEIGHTS, ff.QuantSpec.lsq(bits=3, axis=1, signed=False))
    layer.input_quantizer.set_scale(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    transposed = "Transpose" in kind.__name__
    # The scale runs along the output channels: axis 1 of a transposed weight, where every group shares it.
    assert layer.weight_quantizer.spec.axis == int(transposed)
    assert layer.weight_quantizer.scale.shape == (6 // groups if transposed else 6,)
    x = torch.rand(2, 4, *size, requires_grad=True)
    plain = copy.deepcopy(conv)
    with torch.no_grad():
        w = ff.fake_quantize(conv.weight, layer.weight_quantizer.scale, spec=layer.weight_quantizer.spec)
        plain.weight.copy_(w)
        q = ff.fake_quantize(x, layer.input_quantizer.scale, spec=layer.input_quantizer.spec)
        assert torch.equal(layer(x), plain(q))
        if transposed:
            larger = [2 * n for n in size]
            assert torch.equal(layer(x, larger), plain(q, larger))
            assert list(layer(x, larger).shape[2:]) == larger
    layer(x).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in [x, *layer.parameters()])
    for quantizer in (layer.weight_quantizer, layer.input_quantizer):
        quantizer.enabled = False
    assert torch.equal(layer(x), conv(x))


def test_a_transposed_convolution_takes_its_axis_as_1_too():
    conv = nn.ConvTranspose2d(4, 6, 3)
    either = [QuantConvTranspose2d.from_float(conv, WEIGHTS.replace(axis=axis)) for axis in (0, 1, -3)]
    assert all(torch.equal(either[0].quantized_weight(), layer.quantized_weight()) for layer in either[1:])


@pytest.mark.parametrize("spec", [WEIGHTS, ff.QuantSpec.lsq(bits=4), ff.QuantSpec(bits=3, group=4)])
def test_an_embedding_looks_up_its_quantized_table(spec):
    torch.manual_seed(0)
    source = nn.Embedding(7, 8, padding_idx=2, scale_grad_by_freq=True)
    layer = QuantEmbedding.from_float(source, spec)
    indices = torch.tensor([[0, 2, 5], [5, 5, 1]])
    y = layer(indices)
    assert torch.equal(y, ff.fake_quantize(source.weight, layer.weight_quantizer.scale, spec=spec)[indices])
    assert torch.equal(y[0, 1], torch.zeros(8))
    y.sum().backward()
    layer.weight_quantizer.enabled = False
    want = torch.autograd.grad(source(indices).sum(), source.weight)[0]
    assert torch.equal(layer(indices), source(indices))
    assert bool((layer.weight.grad[[2, 3, 4, 6]] == 0).all())
    assert bool((layer.weight.grad[5][layer.weight.grad[5] != 0] == want[5, 0]).all())


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"max_norm": 1.0}, "max_norm must be None in a quantized"), ({"sparse": True}, "sparse must be False in a")],
)
def test_embeddings_that_a_quantizer_cannot_serve_are_refused_and_can_be_skipped(settings, message):
    model = nn.ModuleDict({"table": nn.Embedding(7, 8, **settings), "fc": nn.Linear(8, 2)})
    with pytest.raises(ValueError, match=f"fastflat::table: {message}"):
        ff.prepare(model, weights=WEIGHTS)
    ff.prepare(model, weights=WEIGHTS, skip=("table",))
    assert type(model["table"]) is nn.Embedding


def test_an_embedding_has_no_input_to_quantize():
    with pytest.raises(ValueError, match="activations must be None: the inputs are indices"):
        QuantEmbedding.from_float(nn.Embedding(7, 8), WEIGHTS, ACTIVATIONS)
    model = nn.ModuleDict({"table": nn.Embedding(7, 8), "fc": nn.Linear(8, 2)})
    ff.prepare(model, activations=ACTIVATIONS)
    assert type(model["table"]) is nn.Embedding
    with pytest.raises(ValueError, match="all 1 layers skipped"):
        ff.prepare(nn.ModuleDict({"table": nn.Embedding(7, 8)}), activations=ACTIVATIONS)


def test_gradients_reach_weights_scales_and_input():
    layer = linear()
    x = torch.rand(3, 6, requires_grad=True)
    layer(x).square().sum().backward()
    for t in (x, layer.weight, layer.bias, layer.weight_quantizer.scale, layer.input_quantizer.scale):
        assert t.grad is not None
        assert t.grad.abs().sum() > 0


def test_one_side_alone_leaves_the_other_in_floats():
    source = nn.Linear(6, 5)
    x = torch.randn(3, 6)
    only = QuantLinear.from_float(source, weights=WEIGHTS)
    assert only.input_quantizer is None
    assert torch.equal(only(x), F.linear(x, only.quantized_weight(), source.bias))
    other = QuantLinear.from_float(source, activations=ff.QuantSpec.lsq(bits=4))
    other.input_quantizer.initialise_from(x)
    assert torch.equal(other(x), F.linear(other.input_quantizer(x), source.weight, source.bias))


def test_the_original_layer_is_untouched_and_shared():
    source = nn.Linear(6, 5)
    seen = []
    source.register_forward_hook(lambda *_: seen.append(1))
    layer = QuantLinear.from_float(source, WEIGHTS)
    assert layer.weight is source.weight
    assert "weight_quantizer" not in source._modules
    layer(torch.randn(2, 6))
    assert seen == [1]  # hooks move along


def test_autocast_casts_weight_and_input_once():
    layer, x = linear(), torch.rand(3, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        w = layer.quantized_weight(torch.bfloat16)
        q = layer.input_quantizer(x, torch.bfloat16)
        assert torch.equal(y, F.linear(q, w, layer.bias))
    assert y.dtype == torch.bfloat16
    exact = ff.fake_quantize(layer.weight, layer.weight_quantizer.scale, spec=WEIGHTS)
    assert torch.equal(w, exact.bfloat16())
    y.sum().backward()
    assert layer.weight.grad.dtype == torch.float32


def test_double_precision_stays_double():
    layer = QuantLinear.from_float(nn.Linear(6, 5).double(), WEIGHTS, ACTIVATIONS)
    layer.input_quantizer.initialise_from(torch.rand(4, 6, dtype=torch.float64))
    assert layer.weight_quantizer.scale.dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.quantized_weight().dtype == torch.float64
    assert layer(torch.rand(3, 6, dtype=torch.float64)).dtype == torch.float64


def test_compiles_into_one_graph(prepared, x):
    torch._dynamo.reset()
    compiled = torch.compile(prepared, fullgraph=True, backend="aot_eager")
    prepared.eval()
    want = prepared(x)
    got = compiled(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    got.sum().backward()
    assert prepared.fc.weight_quantizer.scale.grad is not None


def test_data_parallel_replicas_work():
    layer = linear()
    replica = layer._replicate_for_data_parallel()
    assert replica.weight_quantizer.calibrated


@pytest.mark.parametrize(
    ("weights", "activations", "message"),
    [
        ("int4", None, "fc: weights must be a QuantSpec or None, got str"),
        (None, ff.QuantSpec.lsq(group=3), "fc.input_quantizer: spec.group must be None for activations, got 3"),
        (None, ff.QuantSpec.lsq(axis=0), "spec.axis must be None or -1, the channels of the input, got 0"),
        (ff.QuantSpec.lsq(group=4), None, r"spec.group must divide the last axis of x \(6\), got 4"),
        (ff.QuantSpec.lsq(axis=2), None, r"spec.axis must lie in \[-2, 1\]"),
    ],
)
def test_specs_that_do_not_fit_are_refused(weights, activations, message):
    with pytest.raises((TypeError, ValueError), match=message):
        QuantLinear.from_float(nn.Linear(6, 5), weights, activations, name="fc")


@torch.no_grad()
def test_summary_counts_codes_and_measures_the_error(prepared):
    rows = {row.name: row for row in summary(prepared)}
    assert list(rows) == ["conv1", "layer1.0", "layer2.0", "fc"]
    assert rows["conv1"].weight_bits is None
    layer, row = prepared.fc, rows["fc"]
    codes = torch.round(layer.weight / layer.weight_quantizer.scale.view(-1, 1))
    assert sum(row.codes) == layer.weight.numel()
    assert row.lowest == -8
    assert row.codes[8] == int((codes == 0).sum())
    assert row.clipped == float(((codes < -8) | (codes > 7)).float().mean())
    noise = (layer.quantized_weight() - layer.weight).double().square().sum()
    want = 10 * torch.log10(layer.weight.double().square().sum() / noise)
    assert row.snr == pytest.approx(float(want))


def test_no_warning_on_the_hot_path(prepared, x):
    prepared(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared(x).sum().backward()

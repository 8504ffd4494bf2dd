# SPDX-License-Identifier: Apache-2.0
"""QuantMultiheadAttention: nn.MultiheadAttention with the quantizers off, its formula with them on."""

import contextlib
import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastflat as ff
from fastflat.quant import QuantLinear, QuantMultiheadAttention, quantizers, summary

from .conftest import WEIGHTS

SIGNED = ff.QuantSpec.lsq(bits=4)


@contextlib.contextmanager
def slow_path():
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def pair(weights=WEIGHTS, activations=SIGNED, **settings):
    """Attention and its quantized form."""
    torch.manual_seed(0)
    source = nn.MultiheadAttention(12, 3, **settings)
    with torch.no_grad():
        for p in source.parameters():
            p.normal_(0, 0.4)
    return source, QuantMultiheadAttention.from_float(source, weights, activations)


def off(layer):
    for _, quantizer in quantizers(layer):
        quantizer.enabled = False
    return layer


def inputs(kind, source):
    """query, key, value of lengths 5 and 7, batch 2."""
    first = source.batch_first
    shape = {True: lambda n: (2, n), False: lambda n: (n, 2)}[first]
    query = torch.randn(*shape(5), 12)
    if kind == "self":
        return query, query, query
    key = torch.randn(*shape(7), source.kdim)
    return query, key, key if kind == "encoder-decoder" else torch.randn(*shape(7), source.vdim)


def same(got, want):
    assert torch.equal(got[0], want[0])
    assert (got[1] is None) == (want[1] is None)
    assert want[1] is None or torch.equal(got[1], want[1])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["self", "encoder-decoder", "three"])
@pytest.mark.parametrize("settings", [{}, {"batch_first": True}, {"bias": False}])
@pytest.mark.parametrize("call", [{}, {"need_weights": False}, {"average_attn_weights": False}])
def test_off_it_is_the_layer_that_it_replaces(training, kind, settings, call):
    source, layer = pair(**settings)
    arguments = inputs(kind, source)
    with slow_path():
        same(off(layer).train(training)(*arguments, **call), source.train(training)(*arguments, **call))


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("padding", [None, "bool", "float"])
@pytest.mark.parametrize("mask", [None, "bool", "float", "heads"])
def test_off_masks_mean_the_same(need_weights, padding, mask):
    source, layer = pair(batch_first=True)
    query, key, value = inputs("three", source)
    call = {"need_weights": need_weights}
    if padding:
        barred = torch.zeros(2, 7, dtype=torch.bool)
        barred[0, 5:] = barred[1, 6:] = True
        call["key_padding_mask"] = barred if padding == "bool" else torch.zeros(2, 7).masked_fill(barred, -math.inf)
    if mask:
        barred = torch.ones(5, 7, dtype=torch.bool).triu(3)
        if mask == "heads":
            barred = barred.expand(6, 5, 7).clone()
            barred[3, 0, 1] = True
        call["attn_mask"] = torch.zeros(5, 7).masked_fill(barred, -2.5) if mask == "float" else barred
        if padding == "float" and mask != "float":
            call["attn_mask"] = torch.zeros(barred.shape).masked_fill(barred, -math.inf)
        elif padding == "bool" and mask == "float":
            call["attn_mask"] = barred
    same(off(layer)(query, key, value, **call), source(query, key, value, **call))


@pytest.mark.parametrize("need_weights", [True, False])
def test_off_causal_unbatched_and_other_sizes_are_the_same(need_weights):
    source, layer = pair()
    x = torch.randn(5, 2, 12)
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    call = {"attn_mask": causal, "is_causal": True, "need_weights": need_weights}
    same(off(layer)(x, x, x, **call), source(x, x, x, **call))
    x = torch.randn(5, 12)
    call = {"key_padding_mask": torch.arange(5) > 3, "need_weights": need_weights}
    same(layer(x, x, x, **call), source(x, x, x, **call))
    source, layer = pair(kdim=6, vdim=10)
    assert layer.weight_names(layer) == ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    arguments = inputs("three", source)
    same(off(layer)(*arguments, need_weights=need_weights), source(*arguments, need_weights=need_weights))


def test_off_dropout_draws_the_same_numbers_and_gradients_agree():
    source, layer = pair(dropout=0.5)
    layer = off(copy.deepcopy(layer))
    x = torch.randn(5, 2, 12)
    results = []
    for m in (source, layer):
        torch.manual_seed(3)
        y, _ = m(x, x, x)
        y.square().sum().backward()
        results.append((y, m.in_proj_weight.grad, m.out_proj.weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_it_is_its_formula():
    _, layer = pair(batch_first=True)
    query, key, value = inputs("three", layer)
    for which, step in (("query", 0.3), ("key", 0.4), ("value", 0.5)):
        getattr(layer, f"{which}_quantizer").set_scale(torch.tensor(step))
    layer.out_proj.input_quantizer.set_scale(torch.tensor(0.2))
    w_q, w_k, w_v = ff.fake_quantize(layer.in_proj_weight, layer.in_proj_weight_quantizer.scale, spec=WEIGHTS).chunk(3)
    b_q, b_k, b_v = layer.in_proj_bias.chunk(3)

    def heads(x, step, weight, bias):
        x = ff.fake_quantize(x, torch.tensor(step), spec=SIGNED.replace(estimator="ste", grad_scale="none"))
        return F.linear(x, weight, bias).unflatten(-1, (3, 4)).transpose(1, 2)

    q, k, v = heads(query, 0.3, w_q, b_q), heads(key, 0.4, w_k, b_k), heads(value, 0.5, w_v, b_v)
    weights = (q @ k.transpose(-2, -1) / 2).softmax(-1)
    inner = (weights @ v).transpose(1, 2).flatten(2)
    for need_weights in (True, False):
        seen = []
        handle = layer.out_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        y, got = layer(query, key, value, need_weights=need_weights)
        handle.remove()
        torch.testing.assert_close(seen[0].view(5, 2, 12).transpose(0, 1), inner, rtol=1e-4, atol=1e-5)
        assert torch.equal(y, layer.out_proj(seen[0]).view(5, 2, 12).transpose(0, 1))
        if need_weights:
            torch.testing.assert_close(got, weights.mean(1), rtol=1e-4, atol=1e-5)


def test_keys_of_the_state_are_the_layers_and_the_quantizers():
    source, layer = pair()
    own = {key for key in layer.state_dict() if "_quantizer." not in key}
    assert own == set(source.state_dict())
    assert layer.in_proj_weight is source.in_proj_weight
    assert layer.out_proj.weight is source.out_proj.weight
    assert type(source.out_proj) is not QuantLinear
    names = {name for name, _ in quantizers(layer)}
    want = {"query_quantizer", "key_quantizer", "value_quantizer", "in_proj_weight_quantizer"}
    assert names == want | {"out_proj.weight_quantizer", "out_proj.input_quantizer"}


def encoder(layers=2):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 2, 16, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, layers)


def test_prepare_calibrates_trains_saves_and_compiles_an_encoder():
    model, x = encoder(), torch.randn(3, 5, 12)
    ff.prepare(model, weights=WEIGHTS, activations=SIGNED, bits={"layers.1.*": 3, "layers.1.self_attn": 2})
    assert model.layers[1].self_attn.out_proj.weight_quantizer.spec.bits == 2
    assert model.layers[1].linear1.weight_quantizer.spec.bits == 3
    ff.calibrate(model, [x])
    model(x).square().sum().backward()
    scales = {g["name"]: g["params"] for g in ff.param_groups(model)}["scales"]
    assert len(scales) == 2 * (6 + 4)
    assert all(s.grad is not None for s in scales)
    twin = ff.prepare(encoder(), weights=WEIGHTS, activations=SIGNED, bits={"layers.1.*": 3, "layers.1.self_attn": 2})
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin.eval()(x), model.eval()(x))
    torch._dynamo.reset()
    compiled = torch.compile(model.layers[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model.layers[0](x), rtol=1e-5, atol=1e-6)
    rows = {row.name: row for row in summary(model)}
    assert rows["layers.1.self_attn.in_proj_weight"].weight_bits == 2
    assert rows["layers.0.self_attn.in_proj_weight"].activation_scale > 0
    assert rows["layers.0.self_attn.out_proj"].snr > 0
    ff.calibrate(model, [10 * x], again=True, method="absmax")


@pytest.mark.parametrize("skip", [(), ("*.self_attn",), ("*.linear*",)])
def test_the_inference_fast_path_does_not_pass_the_quantizers_by(skip):
    model, x = encoder(), torch.randn(3, 5, 12)
    ff.prepare(model, weights=ff.QuantSpec.lsq(bits=2), skip=skip)
    model.eval()
    padding = torch.arange(5).expand(3, 5) > torch.tensor([[4], [3], [2]])
    slow = model(x, src_key_padding_mask=padding)
    with torch.no_grad():
        torch.testing.assert_close(model(x, src_key_padding_mask=padding), slow, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(x), model.train()(x), rtol=1e-5, atol=1e-5)
        for _, quantizer in quantizers(model):
            quantizer.enabled = False
        assert not torch.allclose(model(x), slow, rtol=1e-2, atol=1e-2)


def test_autocast_quantizes_and_casts_weights_in_one_pass():
    _, layer = pair()
    x = torch.randn(5, 2, 12)
    model = ff.calibrate(layer, [(x, None)], forward=lambda m, b: m(b[0], b[0], b[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = model(x, x, x)
        quiet, _ = model(x, x, x, need_weights=False)
    assert y.dtype == quiet.dtype == torch.bfloat16
    exact, _ = model(x, x, x)
    # Rounding to 16 bits moves some values of out_proj's input by a whole step.
    assert (y.float() - exact).abs().mean() < 0.05 * exact.abs().mean()
    assert (quiet.float() - exact).abs().mean() < 0.05 * exact.abs().mean()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"add_bias_kv": True}, "add_bias_kv must be False in quantized attention, got True; skip the layer"),
        ({"add_zero_attn": True}, "add_zero_attn must be False in quantized attention, got True; skip the layer"),
    ],
)
def test_options_it_lacks_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        pair(**settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.randn(5, 2, 11)}, r"query must have 12 features, got shape \[5, 2, 11\]"),
        ({"query": torch.randn(5, 12)}, "key must have 3 axes, or 2 without a batch, all alike"),
        ({"value": torch.randn(6, 2, 12)}, r"value must have the length and batch of key, \[7, 2\]"),
        ({"attn_mask": torch.zeros(5, 5)}, r"attn_mask must have shape \[5, 7\] or \[6, 5, 7\], got \[5, 5\]"),
        ({"attn_mask": torch.zeros(5, 7).int()}, "mask must be of booleans or floating, got torch.int32"),
        ({"key_padding_mask": torch.zeros(7, 2)}, r"key_padding_mask must have shape \[2, 7\], got \[7, 2\]"),
        ({"is_causal": True}, "attn_mask must be the causal mask with is_causal=True, got None"),
    ],
)
def test_calls_that_do_not_fit_are_named(change, message):
    _, layer = pair()
    call = {"query": torch.randn(5, 2, 12), "key": torch.randn(7, 2, 12), "value": torch.randn(7, 2, 12), **change}
    with pytest.raises(ValueError, match=message):
        off(layer)(**call)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused():
    _, layer = pair()
    x = torch.nested.nested_tensor([torch.randn(2, 12)])
    with pytest.raises(ValueError, match="query must be a dense tensor, got a nested one; pad it"):
        off(layer)(x, x, x)

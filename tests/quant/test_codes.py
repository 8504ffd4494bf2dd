# SPDX-License-Identifier: Apache-2.0
"""export_codes() and load_codes(): codes that are the quantized weights, through a file and back."""

import dataclasses
import io
import json
import math

import pytest
import torch
from torch import nn

import fastflat as ff
from fastflat.quant import codes_from_tensors, codes_to_tensors, export_codes, load_codes, quantizers
from fastflat.quant.eager import EagerQuantizer

from .conftest import ACTIVATIONS, WEIGHTS, Net

SPECS = [
    WEIGHTS,
    ff.QuantSpec.lsq(bits=4),
    ff.QuantSpec(bits=8, axis=-1),
    ff.QuantSpec(bits=1),
    ff.QuantSpec(bits=3, narrow=True, arithmetic="reciprocal"),
    ff.QuantSpec(bits=5, signed=False, axis=1),
    ff.QuantSpec(bits=16),
    ff.QuantSpec(bits=16, signed=False, symmetric=False, axis=0),
    ff.QuantSpec.torch(bits=8, signed=False, axis=0),
    ff.QuantSpec.torch(bits=12),
    ff.QuantSpec.lsq(bits=4, symmetric=False, zero="float", axis=0),
    ff.QuantSpec(bits=4, symmetric=False, zero="inside", eps=0.05),
]


def made(spec, activations=None, seed=0):
    torch.manual_seed(seed)
    return ff.prepare(Net(), weights=spec, activations=activations)


def in_a_file(codes):
    """The codes after a file that holds tensors and strings alone."""
    file = io.BytesIO()
    torch.save(codes_to_tensors(codes), file)
    file.seek(0)
    return codes_from_tensors(*torch.load(file, weights_only=True))


@pytest.mark.parametrize("spec", SPECS)
def test_codes_reproduce_the_quantized_weights_and_come_back(spec, x):
    model = made(spec, ff.QuantSpec.lsq(bits=6))
    ff.calibrate(model, [x])
    codes = in_a_file(export_codes(model))
    assert list(codes) == ["conv1.weight", "layer1.0.weight", "layer2.0.weight", "fc.weight"]
    for name, c in codes.items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(c.dequantize(), layer.quantized_weight())
        assert torch.equal(c.dequantize(torch.bfloat16), layer.quantized_weight(torch.bfloat16))
        assert spec.qmin <= c.codes.int().min() <= c.codes.int().max() <= spec.qmax
        assert not c.codes.is_floating_point()
    fresh = made(spec.replace(estimator="ste", grad_scale="none"), ff.QuantSpec.lsq(bits=6), seed=1)
    rest = {k: v for k, v in model.state_dict().items() if k not in codes and "weight_quantizer" not in k}
    fresh.load_state_dict(rest, strict=False)
    assert not torch.equal(fresh.eval()(x), model.eval()(x))
    assert load_codes(fresh, codes) is fresh
    assert torch.equal(fresh(x), model(x))
    again = export_codes(fresh)
    assert all(torch.equal(c.codes, again[name].codes) for name, c in codes.items())


def test_codes_in_groups():
    spec = ff.QuantSpec(bits=4, group=3, symmetric=False, signed=False)
    model = ff.prepare(nn.Sequential(nn.Linear(9, 5), nn.Linear(6, 2)), weights=spec)
    codes = export_codes(model)
    assert codes["0.weight"].scale.shape == (5, 3)
    assert codes["0.weight"].spec["group"] == 3
    assert all(torch.equal(codes[f"{i}.weight"].dequantize(), model[i].quantized_weight()) for i in range(2))


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        (ff.QuantSpec(bits=1), torch.int8),
        (ff.QuantSpec(bits=8), torch.int8),
        (ff.QuantSpec(bits=7, signed=False), torch.int8),
        (ff.QuantSpec(bits=8, signed=False), torch.uint8),
        (ff.QuantSpec(bits=9), torch.int16),
        (ff.QuantSpec(bits=15, signed=False), torch.int16),
        (ff.QuantSpec(bits=16, signed=False), torch.uint16),
    ],
)
def test_the_smallest_integers_hold_them_and_the_bytes_are_told(spec, dtype):
    c = export_codes(ff.prepare(nn.Sequential(nn.Linear(9, 5)), weights=spec.replace(axis=0)))["0.weight"]
    assert c.codes.dtype == dtype
    assert c.nbytes == 45 * dtype.itemsize + 5 * 4
    assert c.packed_nbytes == math.ceil(45 * spec.bits / 8) + 5 * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_other_types(dtype, x):
    model = made(WEIGHTS).to(dtype)
    codes = in_a_file(export_codes(model))
    c = codes["fc.weight"]
    assert c.dtype == str(dtype).removeprefix("torch.")
    assert c.scale.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(c.dequantize(), model.fc.quantized_weight())
    assert c.dequantize().dtype == dtype
    fresh = made(WEIGHTS, seed=1).to(dtype)
    rest = {k: v for k, v in model.state_dict().items() if k not in codes and "weight_quantizer" not in k}
    fresh.load_state_dict(rest, strict=False)
    load_codes(fresh, codes)
    assert torch.equal(fresh.eval()(x.to(dtype)), model.eval()(x.to(dtype)))


def test_the_weights_of_autocast():
    model = made(WEIGHTS)
    c = export_codes(model, dtype=torch.bfloat16)["fc.weight"]
    assert c.dtype == "bfloat16"
    assert torch.equal(c.dequantize(), model.fc.quantized_weight(torch.bfloat16))
    assert torch.equal(c.dequantize(torch.float32), model.fc.quantized_weight())


def test_layers_with_several_weights():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(9, 8)
            self.rnn = nn.GRU(8, 8)
            self.attention = nn.MultiheadAttention(8, 2)
            self.up = nn.ConvTranspose1d(8, 6, 3, groups=2)

        def forward(self, x):
            x = self.rnn(self.table(x))[0]
            return self.up(self.attention(x, x, x)[0].movedim(0, 2))

    model, x = ff.prepare(Model(), weights=WEIGHTS), torch.randint(0, 9, (5, 2))
    codes = export_codes(model)
    assert set(codes) == {
        "table.weight",
        "rnn.weight_ih_l0",
        "rnn.weight_hh_l0",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "up.weight",
    }
    assert codes["up.weight"].spec["axis"] == 1
    torch.manual_seed(9)
    fresh = ff.prepare(Model(), weights=WEIGHTS)
    rest = {k: v for k, v in model.state_dict().items() if k not in codes and "_quantizer" not in k}
    fresh.load_state_dict(rest, strict=False)
    assert torch.equal(load_codes(fresh, codes)(x), model(x))


def test_another_implementation_of_the_rule_gives_the_same_codes():
    torch.manual_seed(0)
    eager = ff.prepare(Net(), weights=WEIGHTS, quantizer=EagerQuantizer)
    codes, ours = export_codes(eager), export_codes(made(WEIGHTS))
    assert all(torch.equal(codes[name].codes, ours[name].codes) for name in ours)


def test_metadata_are_json_and_files_without_a_part_are_refused():
    tensors, metadata = codes_to_tensors(export_codes(made(WEIGHTS)))
    assert all(isinstance(key, str) and isinstance(json.loads(text), dict) for key, text in metadata.items())
    assert all(t.is_contiguous() for t in tensors.values())
    del tensors["fc.weight.scale"]
    with pytest.raises(ValueError, match=r"codes_from_tensors: tensors must hold fc\.weight\.scale, got none"):
        codes_from_tensors(tensors, metadata)


def turned_off(model):
    model.fc.weight_quantizer.enabled = False


def without_a_scale(model):
    model.fc.weight_quantizer.load_state_dict(
        {**model.fc.weight_quantizer.state_dict(), "initialised": torch.tensor(False)}
    )


@torch.no_grad()
def with_nan(model):
    model.fc.weight[0, 0] = math.nan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (turned_off, r"export_codes\(fc.weight\): quantizer must be on, got one that is off; set enabled"),
        (
            without_a_scale,
            r"export_codes\(fc.weight\): quantizer must have a scale, got none; call fastflat\.calibrate",
        ),
        (with_nan, r"export_codes\(fc.weight\): weight must be finite and quantized by the integer rule"),
    ],
)
def test_weights_without_codes_are_refused(change, message):
    model = made(WEIGHTS)
    change(model)
    with pytest.raises(ValueError, match=message) as error:
        export_codes(model)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="model must have a quantized weight, got none"):
        export_codes(ff.prepare(Net(), activations=ACTIVATIONS))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (ff.QuantSpec(format="e4m3"), "spec.format must be 'int' for integer codes, got 'e4m3'"),
        (ff.QuantSpec(format="binary"), "spec.format must be 'int' for integer codes, got 'binary'"),
        (ff.QuantSpec(bits=4, scale_is="log2"), "spec.scale_is must be 's' for integer codes, got 'log2'"),
        (ff.QuantSpec(bits=4, rounding="stochastic"), "spec.rounding must be deterministic: a draw has no code"),
    ],
)
def test_rules_without_codes_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        export_codes(made(spec))


def test_noise_of_training_leaves_the_codes_as_they_are():
    noisy, plain = (export_codes(made(ff.QuantSpec(bits=4, axis=0, noise=noise))) for noise in ("uniform", "none"))
    assert all(torch.equal(noisy[name].codes, plain[name].codes) for name in plain)


def other(exported, **changes):
    return {**exported, "fc.weight": dataclasses.replace(exported["fc.weight"], **changes)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {k: v for k, v in c.items() if k != "fc.weight"}, r"names must be in codes, got fc\.weight"),
        (lambda c: {**c, "gc.weight": c["fc.weight"]}, r"names must be quantized weights of the model, got gc\.weight"),
        (lambda c: other(c, spec={**c["fc.weight"].spec, "bits": 3}), "spec.bits must be 4, the model's, got 3"),
        (lambda c: other(c, codes=c["fc.weight"].codes[:2]), r"codes must have shape \[4, 11\], got \[2, 11\]"),
        (lambda c: other(c, scale=torch.ones(3)), r"scale must have shape \[4\], got \[3\]"),
        (lambda c: other(c, scale=torch.zeros(4)), "scale must be finite and positive, got 0.0"),
        (lambda c: other(c, zero_point=torch.zeros(4)), r"zero_point must be None, got \[4\]"),
        (lambda c: other(c, codes=c["fc.weight"].codes + 20), r"codes must lie on \[-8, 7\], got 1\d to 2\d"),
    ],
)
def test_codes_that_do_not_fit_change_nothing(change, message):
    codes, model = export_codes(made(WEIGHTS)), made(WEIGHTS, seed=1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_codes(model, change(codes))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_type_that_rounds_the_grid_is_refused():
    spec = ff.QuantSpec(bits=12, axis=0)
    codes = export_codes(made(spec))
    with pytest.raises(ValueError, match=r"weight must hold the values of its grid, got torch\.bfloat16, which rounds"):
        load_codes(made(spec).bfloat16(), codes)


def test_training_goes_on_from_loaded_codes(x):
    codes = export_codes(made(WEIGHTS))
    model = load_codes(made(WEIGHTS, seed=1), codes)
    model(x).square().sum().backward()
    assert all(q.scale.grad is not None for _, q in quantizers(model))

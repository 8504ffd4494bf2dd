# SPDX-License-Identifier: Apache-2.0
"""prepare(): which layers, which bits; shared layers; loading; parameter groups."""

import copy
import io
import math

import pytest
import torch
from torch import nn

import fastflat as ff
from fastflat.quant import QuantConv2d, QuantLinear, quantizers

from .conftest import ACTIVATIONS, WEIGHTS, Net


def bits_of(model):
    return {
        name: (m.weight_quantizer.spec.bits, m.input_quantizer.spec.bits)
        for name, m in model.named_modules()
        if isinstance(m, (QuantLinear, QuantConv2d))
    }


def test_every_linear_and_convolution_is_replaced_in_place(net):
    parameters = dict(net.named_parameters())
    assert ff.prepare(net, weights=WEIGHTS, activations=ACTIVATIONS) is net
    assert bits_of(net) == dict.fromkeys(["conv1", "layer1.0", "layer2.0", "fc"], (4, 4))
    assert all(dict(net.named_parameters())[name] is p for name, p in parameters.items())
    assert net.fc.weight_quantizer.name == "fc.weight_quantizer"


def test_bits_and_skip_by_pattern_the_last_match_wins(net):
    bits = {"layer*": 2, "layer2.*": {"weights": 3}, "fc": {"weights": 8, "activations": 5}}
    ff.prepare(net, weights=WEIGHTS, activations=ACTIVATIONS, bits=bits, skip=("conv1",))
    assert bits_of(net) == {"layer1.0": (2, 2), "layer2.0": (3, 4), "fc": (8, 5)}
    assert type(net.conv1) is nn.Conv2d


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"skip": ("fc2",)}, "skip must match the name of a layer that can be quantized, got 'fc2'; close names: fc"),
        ({"skip": "fc"}, r"skip must be a sequence of patterns, got 'fc'; write skip=\('fc',\)"),
        ({"bits": {"layer1": 2}}, r"got 'layer1'; for the layers inside write 'layer1\.\*'"),
        ({"bits": {"fc": 0}}, r"bits\['fc'\] for weights: QuantSpec: bits must be an integer from 1 to 16, got 0"),
        ({"bits": {"fc": {"weight": 2}}}, r"bits\['fc'\] must have the keys weights and activations, got 'weight'"),
        ({"activations": None, "bits": {"fc": {"activations": 2}}}, "must leave out activations, which have no spec"),
        ({"weights": None, "activations": None}, "weights or activations must be a QuantSpec, got None for both"),
        ({"weights": 4}, "weights must be a QuantSpec or None, got int"),
        ({"skip": ("*",)}, "skip must leave a layer to quantize, got all 4 layers skipped"),
        ({"activations": ff.QuantSpec.lsq(group=2)}, "spec.group must be None for activations"),
    ],
)
def test_bad_arguments_change_nothing(net, arguments, message):
    before = {name: type(m) for name, m in net.named_modules()}
    with pytest.raises((TypeError, ValueError), match=message):
        ff.prepare(net, **{"weights": WEIGHTS, "activations": ACTIVATIONS, **arguments})
    assert {name: type(m) for name, m in net.named_modules()} == before


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_weights_without_a_scale_are_refused_by_name_and_nothing_is_replaced(net, bad):
    with torch.no_grad():
        net.fc.weight.fill_(bad)
    with pytest.raises(ValueError, match=r"fc\.weight_quantizer: scale must be finite and positive"):
        ff.prepare(net, weights=WEIGHTS)
    assert type(net.conv1) is nn.Conv2d


def test_a_model_without_such_layers_and_one_prepared_already_are_refused(net):
    with pytest.raises(ValueError, match="model must hold a layer that is not yet quantized, of Linear"):
        ff.prepare(nn.ReLU(), weights=WEIGHTS)
    ff.prepare(net, weights=WEIGHTS)
    with pytest.raises(ValueError, match="not yet quantized"):
        ff.prepare(net, weights=WEIGHTS)
    with pytest.raises(ValueError, match="lazy layers"):
        ff.prepare(nn.Sequential(nn.LazyLinear(3)), weights=WEIGHTS)


def test_subclasses_that_use_their_weight_themselves_stay():
    model = nn.TransformerEncoderLayer(8, 2, 16)
    ff.prepare(model, weights=WEIGHTS, skip=("self_attn",))
    assert isinstance(model.linear1, QuantLinear)
    assert not isinstance(model.self_attn.out_proj, QuantLinear)
    model(torch.randn(3, 2, 8))


def test_a_model_that_is_a_layer_itself_is_returned_anew():
    made = ff.prepare(nn.Linear(4, 3), weights=WEIGHTS)
    assert isinstance(made, QuantLinear)
    made.load_state_dict(made.state_dict())


def test_shared_layers_and_tied_weights_stay_so():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(4, 4)})
    model["c"].weight = shared.weight
    with pytest.raises(ValueError, match="agree for a and b, one shared layer"):
        ff.prepare(model, weights=WEIGHTS, bits={"b": 2})
    ff.prepare(model, weights=WEIGHTS)
    assert model["a"] is model["b"]
    assert model["c"].weight is model["a"].weight
    assert len(list(quantizers(model))) == 2


def test_state_round_trip_through_a_weights_only_file(prepared, net, x):
    file = io.BytesIO()
    torch.save(prepared.state_dict(), file)
    file.seek(0)
    fresh = ff.prepare(Net(), weights=WEIGHTS, activations=ACTIVATIONS, skip=("conv1",))
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh.eval()(x), prepared.eval()(x))


def test_deepcopy_is_independent_and_keeps_its_own_load_check(prepared, x):
    twin = copy.deepcopy(prepared)
    assert torch.equal(twin.eval()(x), prepared.eval()(x))
    state = {**twin.state_dict(), "fc.weight_quantizer.scale": torch.zeros(4)}
    with pytest.raises(ValueError, match=r"fc\.weight_quantizer: scale must be finite and positive"):
        twin.load_state_dict(state)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("fc.weight_quantizer.scale", torch.tensor([1.0, -1.0, 1.0, 1.0]), "finite and positive, got -1.0"),
        ("fc.input_quantizer.scale", torch.tensor(math.nan), r"fc\.input_quantizer: scale must be finite"),
        ("fc.weight_quantizer.scale", torch.ones(5), r"scale must have shape \[4\], got \[5\]"),
    ],
)
def test_a_bad_state_is_refused_before_anything_is_loaded(prepared, key, value, message):
    before = {k: v.clone() for k, v in prepared.state_dict().items()}
    state = {k: v + 1 if v.is_floating_point() else v for k, v in before.items()} | {key: value}
    with pytest.raises(ValueError, match=message):
        prepared.load_state_dict(state)
    assert all(torch.equal(v, before[k]) for k, v in prepared.state_dict().items())


def test_an_fp32_state_loads_and_the_weight_scales_follow_it(prepared):
    torch.manual_seed(5)
    other = Net()
    scales = prepared.fc.weight_quantizer.scale.clone()
    with pytest.raises(RuntimeError, match=r"Missing key.*fc\.weight_quantizer\.scale"):
        copy.deepcopy(prepared).load_state_dict(other.state_dict())
    missing = prepared.load_state_dict(other.state_dict(), strict=False)
    assert all("_quantizer." in key for key in missing.missing_keys)
    fresh = ff.prepare(other, weights=WEIGHTS, skip=("conv1",))
    assert torch.equal(prepared.fc.weight_quantizer.scale, fresh.fc.weight_quantizer.scale)
    assert not torch.equal(prepared.fc.weight_quantizer.scale, scales)
    broken = {**Net().state_dict(), "fc.weight": torch.full((4, 11), math.nan)}
    before = prepared.conv1.weight.clone()
    with pytest.raises(ValueError, match=r"fc\.weight_quantizer: scale must be finite and positive, got NaN"):
        prepared.load_state_dict({k: v + 1 for k, v in broken.items()}, strict=False)
    assert torch.equal(prepared.conv1.weight, before)


def test_a_model_on_the_meta_device_gets_its_scales_from_a_state(prepared, x):
    with torch.device("meta"):
        model = ff.prepare(Net(), weights=WEIGHTS, activations=ACTIVATIONS, skip=("conv1",))
    model = model.to_empty(device="cpu")
    model.load_state_dict(prepared.state_dict())
    assert torch.equal(model.eval()(x), prepared.eval()(x))


def test_groups_cover_every_parameter_once_and_scales_do_not_decay(prepared):
    groups = {g["name"]: g for g in ff.param_groups(prepared, lr=0.1, scale_lr=0.01, weight_decay=0.05)}
    everything = [id(p) for g in groups.values() for p in g["params"]]
    assert sorted(everything) == sorted(id(p) for p in prepared.parameters())
    assert len(groups["scales"]["params"]) == 6
    assert (groups["scales"]["lr"], groups["scales"]["weight_decay"]) == (0.01, 0.0)
    assert (groups["weights"]["lr"], groups["weights"]["weight_decay"]) == (0.1, 0.05)


def test_groups_leave_out_what_is_frozen_and_exempt_norms_when_asked(prepared):
    prepared.fc.bias.requires_grad_(False)
    groups = {g["name"]: g for g in ff.param_groups(prepared, weight_decay=0.05, decay_norm_and_bias=False)}
    assert {id(p) for p in groups["norm_and_bias"]["params"]} == {
        id(p) for p in (prepared.norm.weight, prepared.norm.bias, prepared.layer1[0].bias, prepared.layer2[0].bias)
    }
    assert groups["norm_and_bias"]["weight_decay"] == 0
    assert all("lr" not in g for g in groups.values())
    torch.optim.SGD(list(groups.values()), lr=0.1).step()
    with pytest.raises(ValueError, match="scale_lr must be a finite number of at least 0, got -1"):
        ff.param_groups(prepared, scale_lr=-1)

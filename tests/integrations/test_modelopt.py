# SPDX-License-Identifier: Apache-2.0
"""Model-Optimizer's TensorQuantizer, accelerated: bits of results and gradients, refusals, and trajectories."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastflat as ff

from . import alike

mtq = pytest.importorskip("modelopt.torch.quantization")
quantizers = pytest.importorskip("modelopt.torch.quantization.nn")
config = pytest.importorskip("modelopt.torch.quantization.config")

SHAPE = (6, 5, 32)
FORMS = {
    "tensor": ({"num_bits": 8}, torch.tensor(1.1)),
    "tensor dynamic": ({"num_bits": 8}, None),
    "tensor narrow": ({"num_bits": 4, "narrow_range": True}, torch.tensor(0.7)),
    "tensor of zeros": ({"num_bits": 8}, torch.tensor(0.0)),
    "unsigned": ({"num_bits": 8, "unsigned": True}, torch.tensor(1.1)),
    "axis": ({"num_bits": 4, "axis": 0}, torch.tensor([0.5, 1, 2, 0, 2.0**-24, 3]).view(6, 1, 1)),
    "axis last": ({"num_bits": 4, "axis": -1}, (torch.arange(32) / 10.0).view(1, 1, 32)),
    "axis dynamic": ({"num_bits": 8, "axis": 1}, None),
    "axes dynamic": ({"num_bits": 8, "axis": (0, 1)}, None),
    "blocks": ({"num_bits": 4, "block_sizes": {-1: 16}}, torch.rand(60, 1)),
    "blocks dynamic": ({"num_bits": 4, "block_sizes": {-1: 16}}, None),
    "blocks padded": ({"num_bits": 4, "block_sizes": {-1: 12}}, None),
    "channels by blocks": ({"num_bits": 4, "block_sizes": {-1: None, -2: None}}, None),
}


def quantizer(**options):
    return quantizers.TensorQuantizer(config.QuantizerAttributeConfig(**options))


def made(form, **changes):
    options, amax = FORMS[form]
    module = quantizer(**options, **changes)
    if amax is not None:
        module.amax = amax
    return module


def given(form, seed, **options):
    for x in alike.layouts(SHAPE, seed, **options):
        yield x.abs() if form == "unsigned" else x


@pytest.mark.parametrize("passes", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_bits(form, passes, monkeypatch):
    theirs = made(form, pass_through_bwd=passes)
    ours = alike.accelerated(theirs)
    with alike.by_fastflat_alone(monkeypatch):
        for seed in (0, 10):
            alike.assert_alike(theirs, ours, (x for x in given(form, seed, scale=seed + 0.5) if x.shape == SHAPE))
    if FORMS[form][1] is not None and form != "unsigned":
        alike.assert_alike(theirs, ours, given(form, 20, special=True))
    assert ours(torch.empty(0, 5)).shape == (0, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("passes", [True, False])
@pytest.mark.parametrize("form", ["tensor", "tensor dynamic", "axis", "blocks"])
def test_other_types(form, passes, dtype):
    theirs = made(form, pass_through_bwd=passes)
    ours = alike.accelerated(theirs)
    alike.assert_alike(theirs, ours, given(form, 3, dtype=dtype))


def test_what_the_module_refuses_it_still_refuses():
    theirs = made("unsigned")
    ours = alike.accelerated(theirs)
    for twin in (theirs, ours):
        with pytest.raises(TypeError, match="Negative values encountered"):
            twin(torch.tensor([-1.0, 1.0]))
        twin._amax.fill_(-1.0)
        with pytest.raises(ValueError, match="Negative values in amax"):
            twin(torch.tensor([1.0]))


def test_switches_calibration_and_scales_for_smoothing():
    theirs = made("tensor")
    ours = alike.accelerated(theirs)
    x = alike.data(SHAPE)
    for twin in (theirs, ours):
        twin.disable()
    assert ours(x) is x
    for twin in (theirs, ours):
        twin.enable()
        twin.reset_amax()
        twin.enable_calib()
        twin(x)
        twin(2 * x)
        twin.disable_calib()
        twin.load_calib_amax()
    alike.same(theirs.amax, ours.amax)
    alike.assert_alike(theirs, ours, [x])
    for twin in (theirs, ours):
        twin.pre_quant_scale = torch.linspace(0.5, 2, 32)
    alike.assert_alike(theirs, ours, [x])


def test_left_alone():
    blocks = {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}
    model = nn.ModuleList(
        [
            quantizer(num_bits=(4, 3)),
            quantizer(num_bits=4, block_sizes={-1: 16, "type": "dynamic"}),
            quantizer(num_bits=(2, 1), block_sizes=blocks),
            made("tensor"),
        ]
    )
    report = ff.accelerate(model)
    assert [e.names for e in report.swapped] == [("3",)]
    assert [e.why for e in report.left] == [
        "its format (4, 3) is no integer grid",
        "its blocks have dynamic scales",
        "its format (2, 1) is no integer grid",
    ]


@pytest.mark.parametrize("recipe", ["INT8_DEFAULT_CFG", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG"])
def test_training(recipe):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 4))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 6, 3, 6, 6, generator=generator)
    batches = [(b, (b.mean((1, 2, 3)) * 40).long().remainder(4)) for b in x]
    model = mtq.quantize(model, copy.deepcopy(getattr(mtq, recipe)), lambda m: [m(b) for b, _ in batches])
    alike.assert_same_training(model, batches)

# SPDX-License-Identifier: Apache-2.0
"""What is refused, in one line and before anything is written."""

import copy
import importlib.util
import io
import json
import pickle
import zipfile

import pytest
import torch
from torch import nn

import fastflat as ff
from fastflat import export
from fastflat.quant import export_codes

from .conftest import needing


def linear(weights=None, activations=None, calibrated=True):
    torch.manual_seed(0)
    model = ff.prepare(nn.Sequential(nn.Linear(6, 4)), weights=weights, activations=activations)
    if activations is not None and calibrated:
        ff.calibrate(model, [torch.randn(8, 6)])
    return model.eval()


W, X = ff.QuantSpec(bits=4, axis=0), torch.randn(3, 6)


def off():
    model = linear(W)
    model[0].weight_quantizer.enabled = False
    return model


def between():
    model = linear(None, ff.QuantSpec(bits=4, symmetric=False, zero="float"))
    model[0].input_quantizer.set_scale(torch.tensor(0.1), torch.tensor(0.5))
    return model


class Planes(nn.Module):
    """Calls an operator of fastflat that is no quantizer."""

    def __init__(self):
        super().__init__()
        self.fc = linear(W)

    def forward(self, x):
        y, _ = ff.fake_quantize_dynamic(self.fc(x), spec=ff.QuantSpec.mx("e2m1", group=4))
        return y


class Branches(nn.Module):
    """Looks at its data."""

    def __init__(self):
        super().__init__()
        self.fc = linear(W)

    def forward(self, x):
        return self.fc(x) if x.sum() > 0 else x


MODELS = {
    "none": (lambda: nn.Sequential(nn.Linear(6, 4)), "model must have a quantizer"),
    "no module": (lambda: 3, "model must be a prepared torch.nn.Module, got int"),
    "ternary": (
        lambda: linear(ff.QuantSpec(format="ternary")),
        r"export\(0.weight_quantizer\): spec.format must be 'int'",
    ),
    "binary": (
        lambda: linear(ff.QuantSpec(format="binary")),
        r"export\(0.weight_quantizer\): spec.format must be 'int'",
    ),
    "minifloat": (lambda: linear(W, ff.QuantSpec(format="e4m3")), r"export\(0.input_quantizer\): spec.format"),
    "no scale": (lambda: linear(W, ff.QuantSpec(), False), r"export\(0.input_quantizer\): quantizer must have a scale"),
    "off": (off, r"export\(0.weight_quantizer\): quantizer must be on"),
    "away": (lambda: linear(W, ff.QuantSpec(rounding="away")), r"export\(0.input_quantizer\): spec.rounding"),
    "inverse": (lambda: linear(W, ff.QuantSpec.modelopt()), r"export\(0.input_quantizer\): spec.arithmetic"),
    "between": (between, r"export\(0.input_quantizer\): zero_point must be integers in \[-8, 7\]"),
    "16 bit": (lambda: linear(W).bfloat16(), "export: 0.weight must be float32 in a graph, got torch.bfloat16"),
    "operator": (Planes, "must have a form in integer codes, got fastflat."),
    "branches": (Branches, "model must be traced by torch.export"),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name, tmp_path):
    make, text = MODELS[name]
    model = make()
    (tmp_path / "m.pt2").write_text("before")
    with pytest.raises((TypeError, ValueError), match=text) as error:
        export.save(model, tmp_path / "m.pt2", X)
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt2"]
    assert (tmp_path / "m.pt2").read_text() == "before"


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("m.tflite", {}, r"path must end in one of .onnx \(onnx\), .pt2 \(torch\)"),
        ("m", {}, "path must end in one of"),
        ("no/m.onnx", {}, "path must name a file in an existing folder"),
        ("m.onnx", {"inputs": None}, "inputs must be an example input of the model for .onnx, got None"),
        ("m.pt2", {"inputs": "x"}, "inputs must be an example input"),
        ("m.onnx", {"opset": 18}, r"opset must be an integer from 21 \(4-bit types\)"),
    ],
)
def test_arguments(name, options, text, tmp_path):
    with pytest.raises((TypeError, ValueError), match=text):
        export.save(linear(W), tmp_path / name, **{"inputs": X, **options})
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name))
    with pytest.raises(ImportError, match=r"export: .onnx needs onnxscript; pip install 'fastflat\[export\]'"):
        export.save(linear(W), tmp_path / "m.onnx", X)
    assert not list(tmp_path.iterdir())


def test_layers_that_torchao_has_no_tensor_for(tmp_path):
    pytest.importorskip("torchao", reason="torchao is not installed: make peers")
    model = ff.prepare(nn.Sequential(nn.Linear(6, 6), nn.Conv1d(6, 6, 1)), weights=W)
    with pytest.raises(ValueError, match=r"export\(1.weight\): layer must be linear or a 2-d convolution for torchao"):
        export.save(model, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=r"export\(0.weight\): spec.bits must be at most 8 for torchao, got 9"):
        export.save(linear(W.replace(bits=9)), tmp_path / "m.pt")
    assert not list(tmp_path.iterdir())


def test_a_recurrent_layer_is_no_onnx(tmp_path):
    model = ff.prepare(nn.Sequential(nn.LSTM(5, 6)), weights=W)
    with pytest.raises(ValueError, match=r"export\(0\): layer must be no recurrent one in ONNX, got QuantLSTM"):
        export.save(model, tmp_path / "m.onnx", torch.randn(7, 3, 5))


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    import os

    path = tmp_path / "m.safetensors"
    export.save(linear(W), path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        export.save(linear(W.replace(bits=2)), path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a file was unpickled",))


def rewritten(path, change):
    """A zip with entries changed or added: {end of a name: bytes}."""
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    for end, content in change.items():
        name = next((n for n in entries if n.endswith(end)), next(iter(entries)).split("/")[0] + "/" + end)
        entries[name] = content(entries.get(name)) if callable(content) else content
    with zipfile.ZipFile(path, "w") as new:
        for name, content in entries.items():
            new.writestr(name, content)


def with_pickle(config):
    parts = json.loads(config)
    next(iter(parts["config"].values()))["use_pickle"] = True
    return json.dumps(parts).encode()


def pickled():
    file = io.BytesIO()
    torch.save(Bomb(), file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model_weights_config.json": with_pickle}, "a pickle in .*model_weights_config.json"),
        ({"data/sample_inputs/model.pt": pickled()}, "a pickle in .*sample_inputs"),
        ({"data/constants/opaque_obj_0": pickle.dumps(Bomb())}, "opaque_obj_0"),
        ({"data/weights/model.pt": pickled()}, "weights/model.pt"),
        ({"models/model.json": lambda j: j.replace(b"Symbol('", b"exit('")}, "the expression"),
    ],
)
def test_programs_with_code_in_them(change, text, tmp_path):
    path = tmp_path / "m.pt2"
    export.save(linear(W), path, X)
    rewritten(path, change)
    with pytest.raises(ValueError, match=text):
        export.load(path)


@pytest.mark.parametrize("ending", needing(".onnx", ".pt2", ".pt", ".safetensors"))
def test_other_files(ending, tmp_path):
    path = tmp_path / f"m{ending}"
    with pytest.raises(FileNotFoundError, match="path must be a file"):
        export.load(path)
    path.write_bytes(b"no such file format")
    with pytest.raises(ValueError, match="must be"):
        export.load(path)
    export.save(linear(W), path, X)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="must be") as error:
        export.load(path)
    assert "\n" not in str(error.value)
    if ending == ".pt":
        torch.save({"fastflat": Bomb(), "state_dict": {}}, path)
        with pytest.raises(ValueError, match="be a whole file of tensors"):
            export.load(path)


@pytest.mark.parametrize("ending", needing(".pt", ".safetensors"))
def test_models_that_a_file_does_not_fit(ending, tmp_path):
    path = tmp_path / f"m{ending}"
    export.save(linear(W, ff.QuantSpec(bits=8)), path)
    with pytest.raises(ValueError, match="must have a model to run, got tensors alone"):
        export.load(path)(X)
    others = {
        "tensors must belong to the model, got 0.input_quantizer": linear(W),
        "spec.bits must be 3, the model's": linear(W.replace(bits=3), ff.QuantSpec(bits=8)),
        "spec.bits must be 4, the model's, got 8": linear(W, ff.QuantSpec(bits=4)),
        "spec.scale_is must be 'absmax', the model's, got s": linear(W, ff.QuantSpec(bits=8, scale_is="absmax")),
        "0.bias must have shape": ff.prepare(
            nn.Sequential(nn.Linear(6, 5)), weights=W, activations=ff.QuantSpec(bits=8)
        ),
    }
    for text, model in others.items():
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=text):
            export.load(path, model)
        assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    model = linear(W, ff.QuantSpec(bits=8))
    export.save(model, tmp_path / "m.pt2", X)
    with pytest.raises(ValueError, match=r"model must be None for \.pt2"):
        export.load(tmp_path / "m.pt2", model)


def test_files_do_not_tell_where_they_were_made(tmp_path):
    model = linear(W, ff.QuantSpec(bits=8))
    for ending in (".onnx", ".pt2", ".safetensors"):
        export.save(model, tmp_path / f"m{ending}", X)
        content = (tmp_path / f"m{ending}").read_bytes()
        assert b"site-packages" not in content
        assert str(tmp_path.parent.parent).encode() not in content
        assert b"layers.py" not in content
    assert json.loads((tmp_path / "m.bits.json").read_text()) == {"0": {"weights": 4, "activations": 8}}
    assert len(export_codes(model)) == 1

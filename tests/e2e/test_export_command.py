# SPDX-License-Identifier: Apache-2.0
"""``fastflat export`` on checkpoints that ``fastflat train`` wrote."""

from __future__ import annotations

import json

import pytest
import torch

from fastflat import export
from fastflat.cli import _subject


@pytest.fixture
def quantized(train, tmp_path):
    code, _, err = train("--epochs", 1, "--weight-bits", 4, "--activation-bits", 4, "--out", tmp_path / "run")
    assert code == 0, err
    return tmp_path / "run"


@pytest.fixture
def floats(train, tmp_path):
    code, _, err = train("--epochs", 1, "--quantizer", "none", "--out", tmp_path / "float")
    assert code == 0, err
    return tmp_path / "float"


def test_a_quantized_run(quantized, command, tmp_path):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'fastflat[export]'")
    out = tmp_path / "net.onnx"
    code, text, err = command("export", quantized, "--to", "onnx", "--out", out, "--check")
    assert code == 0, err
    assert f"{out} ({out.stat().st_size} bytes)" in text
    assert "codes of weights equal" in text
    subject = _subject.load("export", quantized, None)
    x = subject.batches(1, 40)[0][0]
    found = export.compare(subject.model, export.load(out), x)
    assert found.codes_equal
    assert found.code_steps <= 1
    code, _, err = command("export", quantized, "--weight-bits", 8, "--to", "onnx", "--out", tmp_path / "no.onnx")
    assert code == 2
    assert err == "fastflat: export: bits must be left to a network that was trained with them, got --weight-bits\n"
    assert not (tmp_path / "no.onnx").exists()


def test_a_float_run_by_the_bits_of_a_file(floats, command, tmp_path):
    bits, out = tmp_path / "bits.json", tmp_path / "net.safetensors"
    bits.write_text(json.dumps({"blocks.1.0": 3, "fc": {"weights": 8, "activations": 4}}))
    code, text, err = command("export", floats, "--bits", bits, "--to", "safetensors", "--out", out, "--check")
    assert code == 0, err
    assert "codes of weights equal; largest difference of outputs 0" in text
    loaded = export.load(out)
    assert loaded.bits == {"blocks.1.0": {"weights": 3, "activations": 8}, "fc": {"weights": 8, "activations": 4}}
    assert json.loads((tmp_path / "net.bits.json").read_text()) == loaded.bits
    assert torch.is_floating_point(loaded.tensors["blocks.0.0.weight"])

    for content, text in (("[1]", 'must hold {"layer": bits}, got list'), ("{", "must hold JSON"), ('{"x": 3}', "'x'")):
        bits.write_text(content)
        code, _, err = command("export", floats, "--bits", bits, "--to", "torch", "--out", tmp_path / "no.pt2")
        assert code == 2
        assert text in err
        assert err.count("\n") == 1
    assert not (tmp_path / "no.pt2").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--to", "tflite", "--out", "m.tflite"), "'tflite' is not one of 'onnx', 'torch', 'torchao', 'safetensors'"),
        (("--to", "onnx", "--out", "m.pt2"), "--out must end in .onnx for --to onnx, got m.pt2"),
        (("--to", "onnx", "--out", "no/m.onnx"), "--out must name a file in an existing folder, got no/m.onnx"),
        (("--to", "onnx", "--out", "m.onnx", "--bits", "no.json"), "--bits must be a file that can be read"),
        (("--to", "onnx"), "Missing option '--out'"),
    ],
)
def test_bad_arguments(arguments, text, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = command("export", "--model", "crepe-tiny", *arguments)
    assert code == 2
    assert text in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())
    code, _, err = command("export", "--to", "onnx", "--out", "m.onnx")
    assert (code, err.count("\n")) == (2, 1)
    assert "the network must be RUN" in err

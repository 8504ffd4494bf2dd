# SPDX-License-Identifier: Apache-2.0
"""The command line itself: help, one-line errors, exit status, doctor."""

import json
import re
import subprocess
import sys

import pytest

import fastflat
from fastflat import _ops
from fastflat.cli import COMMANDS, main


def test_help_names_every_command_and_shows_examples(command):
    code, out, _ = command("--help")
    assert code == 0
    assert "Examples:" in out
    assert all(re.search(rf"^  {name} ", out, flags=re.MULTILINE) for name in COMMANDS)
    assert command()[1] == out


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_of_a_command_shows_an_example_and_json(command, name):
    code, out, _ = command(name, "--help")
    assert code == 0
    assert f"fastflat {name}" in out.split("Examples:" if "Examples:" in out else "Example:")[1]


def test_version(command):
    assert command("--version")[1] == f"fastflat {fastflat.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["train", "--frob"], "No such option"),
        (["train", "--lr", "fast"], "Invalid value for '--lr'"),
        (["train", "--epochs", "0"], "train: epochs must be at least 1, got 0"),
        (["train", "--batch", "-3"], "train: batch must be at least 1, got -3"),
        (["train", "--lr", "nan"], "train: lr must be a finite number"),
        (["train", "--threads", "0"], "--threads must be at least 1, got 0"),
        (["train", "--weight-bits", "40"], "QuantSpec: bits must be an integer from 1 to 16, got 40"),
        (["train", "--bits", "fc"], "bits must be PATTERN=BITS or PATTERN=WEIGHTS/ACTIVATIONS, got 'fc'"),
        (["train", "--device", "tpu"], "device must be cpu or cuda, got 'tpu'"),
        (["train", "--device", "cuda:64"], "device must be one that PyTorch sees, got 'cuda:64'"),
        (["train", "--data", "no/such/path"], "data: path must exist, got 'no/such/path'"),
        (["train", "--json", "no/such/file"], "--json must name a file in an existing folder"),
        (["train", "--resume", "no/such/run"], "resume must name the folder of a run"),
        (["train", "--demo", "--quantizer", "none"], "--demo must come without --quantizer"),
        (["doctor", "--json", "no/such/file"], "--json must name a file in an existing folder"),
    ],
)
def test_bad_input_is_one_line_and_status_2(command, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(*arguments)
    assert code == 2
    assert re.fullmatch(r"fastflat: [^\n]+\n", err)
    assert message in err
    assert not out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", "blocks.7.0=2"], "got 'blocks.7.0'; close names: blocks."),
        (["--skip", "fcc"], "skip must match the name of a layer that can be quantized, got 'fcc'; close names: fc"),
        (["--init", "no/such/run"], "must be a checkpoint, got no file"),
    ],
)
def test_input_that_only_the_model_can_refuse_leaves_no_folder(train, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = train(*arguments)
    assert code == 2
    assert message in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("way", ["option", "environment"])
def test_tracebacks_on_request(monkeypatch, way):
    arguments = ["train", "--epochs", "0"]
    if way == "option":
        arguments.append("--traceback")
    else:
        monkeypatch.setenv("FASTFLAT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="epochs must be at least 1"):
        main(arguments)


def test_python_dash_m_is_the_same():
    done = subprocess.run(
        [sys.executable, "-m", "fastflat", "train", "--epochs", "0"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "fastflat: train: epochs must be at least 1, got 0\n"


def test_doctor_tells_who_computes_every_operator_and_why(command, tmp_path):
    code, out, _ = command("doctor", "--json", tmp_path / "facts.json")
    assert code == 0
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["versions"]["fastflat"] == fastflat.__version__
    assert facts["operators"]["cpu"].keys() == _ops.OPS.keys()
    for op, entry in facts["operators"]["cpu"].items():
        assert entry["reason"]
        assert op in out
    assert facts["libraries"].keys() == {"cpu", "cuda"}
    assert facts["backends"] == fastflat.backends()
    for name, library in facts["libraries"].items():
        assert library["loaded"] == (facts["backends"][name] == "available") or name == "cuda"

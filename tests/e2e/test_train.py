# SPDX-License-Identifier: Apache-2.0
"""``fastflat train`` from end to end: it learns, resumes bit for bit, and leaves whole files behind."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch

from fastflat import methods
from fastflat.cli import _runs
from fastflat.cli._config import Config


def state(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)


def without_times(history):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


@pytest.mark.parametrize("quantizer", ["fastflat", "python", "torch", "none"])
def test_a_network_learns(train, tmp_path, quantizer):
    run, results = tmp_path / "run", tmp_path / "results.json"
    code, out, _ = train("--epochs", 3, "--quantizer", quantizer, "--out", run, "--json", results)
    assert code == 0
    assert "test accuracy" in out
    assert {p.name for p in run.iterdir()} == {"config.json", "metrics.jsonl", "checkpoint.pt", "report.html"}
    found = json.loads(results.read_text())["runs"][0]
    assert found["test_accuracy"] > 0.9  # chance is 0.25
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows == found["history"]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    bits = {row["name"]: row["weight_bits"] for row in found["layers"]}
    if quantizer != "none":
        assert bits == {"blocks.0.0": None, "blocks.1.0": 4, "blocks.2.0": 4, "blocks.3.0": 4, "fc": None}


@pytest.mark.parametrize("model", ["mlp", "resnet20"])
def test_other_networks_and_mixed_bits(train, tmp_path, model):
    pattern = {"mlp": "fc2", "resnet20": "layer3.*"}[model]
    results = tmp_path / "results.json"
    arguments = ("--model", model, "--epochs", 1, "--train-images", 64, "--bits", f"{pattern}=2/3", "--amp")
    code, _, err = train(*arguments, "--out", tmp_path / "run", "--json", results)
    assert code == 0, err
    widths = {r["weight_bits"] for r in json.loads(results.read_text())["runs"][0]["layers"]}
    assert widths == ({None, 2} if model == "mlp" else {None, 2, 4})


def test_a_stopped_run_goes_on_bit_for_bit(train, command, tmp_path):
    options = ("--epochs", 3, "--shift", 1, "--model", "mlp")
    assert train(*options, "--out", tmp_path / "whole")[0] == 0
    code, out, _ = train(*options, "--out", tmp_path / "parts", "--stop-after", 1)
    assert code == 0
    assert "--resume" in out
    assert not (tmp_path / "parts" / "report.html").exists()
    torch.manual_seed(123)  # nothing outside a run decides its numbers
    assert command("train", "--resume", tmp_path / "parts", "--stop-after", 1)[0] == 0
    assert command("train", "--resume", tmp_path / "parts")[0] == 0
    whole, parts = state(tmp_path / "whole"), state(tmp_path / "parts")
    assert whole["model"].keys() == parts["model"].keys()
    assert all(torch.equal(whole["model"][k], parts["model"][k]) for k in whole["model"])
    for k, entry in whole["optimizer"]["state"].items():
        assert torch.equal(entry["momentum_buffer"], parts["optimizer"]["state"][k]["momentum_buffer"])
    assert torch.equal(whole["random"][0], parts["random"][0])
    assert without_times(whole["history"]) == without_times(parts["history"])


def test_the_same_seed_gives_the_same_numbers_and_another_does_not(train, tmp_path):
    states = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train("--epochs", 1, "--model", "mlp", "--seed", seed, "--out", tmp_path / name)
        states.append(state(tmp_path / name)["model"]["fc2.weight"])
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_weights_of_another_run_start_a_quantized_one(train, tmp_path):
    train("--epochs", 2, "--quantizer", "none", "--out", tmp_path / "fp32")
    results = tmp_path / "results.json"
    init = ("--init", tmp_path / "fp32", "--epochs", 1, "--lr", 0)
    code, _, err = train(*init, "--out", tmp_path / "tuned", "--json", results)
    assert code == 0, err
    assert json.loads(results.read_text())["runs"][0]["test_accuracy"] > 0.9
    before, after = state(tmp_path / "fp32")["model"], state(tmp_path / "tuned")["model"]
    assert torch.equal(before["blocks.1.0.weight"], after["blocks.1.0.weight"])


@pytest.fixture
def stopped(train, tmp_path):
    run = tmp_path / "run"
    assert train("--epochs", 2, "--model", "mlp", "--out", run, "--stop-after", 1)[0] == 0
    return run


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda run: (run / "checkpoint.pt").write_bytes((run / "checkpoint.pt").read_bytes()[:-5000]),
            "whole checkpoint",
        ),
        (lambda run: (run / "checkpoint.pt").write_bytes(b"garbage"), "must be a whole checkpoint"),
        (lambda run: (run / "checkpoint.pt").write_bytes(b""), "must be a whole checkpoint"),
        (lambda run: (run / "checkpoint.pt").unlink(), "no epoch was finished"),
        (lambda run: torch.save({"model": {}}, run / "checkpoint.pt"), "must be a checkpoint of fastflat train"),
        (lambda run: (run / "config.json").unlink(), "must name the folder of a run"),
        (lambda run: (run / "config.json").write_text("{"), "must hold JSON"),
        (lambda run: (run / "config.json").write_text('{"lr": 1}'), "must hold the options of a run"),
    ],
)
def test_a_damaged_run_is_refused_in_one_line_and_left_as_it_is(stopped, command, damage, message):
    damage(stopped)
    before = {p.name: p.read_bytes() for p in stopped.iterdir()}
    code, out, err = command("train", "--resume", stopped)
    assert code == 2
    assert re.fullmatch(r"fastflat: [^\n]+\n", err)
    assert message in err
    assert not out
    assert {p.name: p.read_bytes() for p in stopped.iterdir()} == before


def test_options_that_contradict_the_run_are_refused(stopped, command):
    code, _, err = command("train", "--resume", stopped, "--lr", 1)
    assert (code, err) == (2, f"fastflat: train: --lr must stay {Config().lr} to resume this run, got 1.0\n")
    code, _, err = command("train", "--resume", stopped, "--out", "elsewhere")
    assert code == 2


def test_a_checkpoint_with_a_bad_scale_or_of_other_data_is_refused(stopped, command, bars, tmp_path):
    whole = state(stopped)
    bad = {**whole, "model": {**whole["model"], "fc2.weight_quantizer.scale": torch.zeros(256)}}
    torch.save(bad, stopped / "checkpoint.pt")
    code, _, err = command("train", "--resume", stopped)
    assert code == 2
    assert "fc2.weight_quantizer: scale must be finite and positive, got 0.0" in err
    torch.save({**whole, "checksum": "0" * 16}, stopped / "checkpoint.pt")
    code, _, err = command("train", "--resume", stopped)
    assert code == 2
    assert "data must be those of the run" in err


def test_a_folder_in_use_is_not_written_to(stopped, train):
    before = (stopped / "checkpoint.pt").read_bytes()
    code, _, err = train("--out", stopped)
    assert code == 2
    assert f"--resume {stopped} continues it" in err
    assert (stopped / "checkpoint.pt").read_bytes() == before


def test_a_loss_that_is_not_finite_ends_the_run_with_a_hint(train, tmp_path):
    code, _, err = train(
        "--lr", 1e30, "--epochs", 2, "--quantizer", "none", "--model", "mlp", "--out", tmp_path / "run"
    )
    assert code == 2
    assert re.fullmatch(r"fastflat: train: the loss is (nan|inf) in epoch 1; try a smaller --lr\n", err)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_files_are_whole_or_as_before(tmp_path, monkeypatch):
    target = tmp_path / "file"
    _runs.write(target, "old")

    def full(_):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space left"):
        _runs.write(target, "new")
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_config_survives_its_file(tmp_path):
    config = Config(bits=("a=2", "b=3/4"), skip=("first",), lr=0.25)
    path = tmp_path / "config.json"
    path.write_text(config.to_json())
    assert Config.from_dict(json.loads(path.read_text()), path) == config
    assert config.layer_bits() == {"a": 2, "b": {"weights": 3, "activations": 4}}


def test_the_report_stands_alone_and_escapes_names(command, tmp_path):
    PIL_Image = pytest.importorskip("PIL.Image")
    evil = "<script>alert(1)<"
    rng = np.random.default_rng(0)
    for name in (evil, "plain & simple"):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for k in range(10):
            PIL_Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).save(folder / f"{k}.png")
    run = tmp_path / "run"
    code, _, err = command(
        "train", "--data", tmp_path / "images", "--model", "mlp", "--epochs", 1, "--batch", 4, "--out", run
    )
    assert code == 0, err
    page = (run / "report.html").read_text()
    assert "&lt;script&gt;alert(1)&lt;" in page
    assert "plain &amp; simple" in page
    assert "<script" not in page
    assert not re.search(r'(?:src|href)="(?!#)', page)
    assert not re.search(r"@import|url\((?!#)", page)
    assert page.count("<svg") == 3


def test_the_demo_compares_its_forms(train, tmp_path):
    out_folder, results = tmp_path / "demo", tmp_path / "demo.json"
    code, out, err = train("--demo", "--epochs", 2, "--out", out_folder, "--json", results)
    assert code == 0, err
    runs = json.loads(results.read_text())["runs"]
    kinds = [(r["config"]["quantizer"], r["config"]["optimizer"]) for r in runs]
    assert kinds == [("none", "sgd"), ("fastflat", "sgd"), ("python", "sgd"), ("fastflat", "sam")]
    assert len({json.dumps({**r["config"], "quantizer": "", "optimizer": ""}) for r in runs}) == 1
    for r in runs:
        assert re.search(
            rf"{re.escape(r['label'])} +{100 * r['test_accuracy']:.2f} % +{r['sharpness']:.4f} +"
            rf"{r['seconds_per_epoch']:.2f} ",
            out,
        )
        assert list(r["post_training_accuracy"]) == ["8", "6", "4", "3", "2"]
        afterwards = " +".join(f"{100 * a:.2f} %" for a in r["post_training_accuracy"].values())
        assert re.search(rf"{re.escape(r['label'])} +{afterwards}", out)
        assert abs(r["post_training_accuracy"]["8"] - r["test_accuracy"]) < 0.1
    assert (out_folder / "report.html").read_text().count("<svg") == 8
    # Taking turns does not change what a run computes.
    alone = tmp_path / "alone"
    train("--epochs", 2, "--out", alone, "--train-images", 10_000, "--test-images", 2_000)
    mixed = state(out_folder / "w4a4-fastflat")["model"]
    assert all(torch.equal(value, mixed[key]) for key, value in state(alone)["model"].items())


class Counting(methods.Hook):
    """Scales the loss by 1 + the number of steps so far, and says when it was called."""

    def __init__(self):
        self.done, self.called = 0, []

    def prepare(self, model):
        self.called.append("prepare")

    def start(self, model, optimizer, steps):
        self.called.append(f"start {steps}")

    def loss(self, model, x, y):
        loss, scores = super().loss(model, x, y)
        return loss * (1 + self.done), scores

    def after(self, step):
        assert step == self.done
        self.done += 1

    def finish(self):
        self.called.append("finish")

    def state_dict(self):
        return {"done": self.done}

    def load_state_dict(self, state):
        self.done = state["done"]


def test_method_sets_its_recipe_and_the_user_wins(train, tmp_path):
    status, _, err = train("--method", "sam", "--rho", 0.1, "--epochs", 1, "--out", tmp_path / "r")
    assert status == 0, err
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert (config["method"], config["optimizer"], config["rho"]) == ("sam", "sam", 0.1)
    status, _, err = train("--method", "bitta", "--out", tmp_path / "no")
    assert status == 2
    assert "did you mean bitat" in err
    assert not (tmp_path / "no").exists()


def test_hook_of_a_method_goes_on_where_it_stopped(train, tmp_path, monkeypatch):
    made = []

    def hook():
        made.append(Counting())
        return made[-1]

    method = dataclasses.replace(methods.get("sam"), hook=hook, recipe={})
    monkeypatch.setattr(methods, "get", lambda name: method)
    options = ("--method", "sam", "--epochs", 2)
    assert train(*options, "--out", tmp_path / "whole")[0] == 0
    assert made[0].called == ["prepare", "start 24", "finish"]
    assert made[0].done == 24
    assert train(*options, "--out", tmp_path / "parts", "--stop-after", 1)[0] == 0
    assert train("--resume", tmp_path / "parts")[0] == 0
    rows = [
        [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in path.read_text().splitlines()]
        for path in (tmp_path / "whole" / "metrics.jsonl", tmp_path / "parts" / "metrics.jsonl")
    ]
    assert rows[0] == rows[1]

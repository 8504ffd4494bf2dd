# SPDX-License-Identifier: Apache-2.0
"""``fastflat train --demo``: one network four times, with the same seed, data and schedule."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import click
import torch

import fastflat
from fastflat.cli import _report, _runs, train
from fastflat.cli._config import Config
from fastflat.cli._trainer import Trainer
from fastflat.data import Dataset

#: As many images as the floors below were measured with.
_TRAIN, _TEST = 10_000, 2_000
#: Quantizer and optimizer of each run.
_RUNS = (("none", "sgd"), ("fastflat", "sgd"), ("python", "sgd"), ("fastflat", "sam"))
#: Accuracy of simple classifiers on Fashion-MNIST with that many images; a network below them is broken.
_FLOORS = {"fashion-mnist": "on as many images a linear classifier reaches 83.7 %, 5 nearest neighbours 82.3 %"}
#: Steps of one turn.
_TURN = 8
_OVER = object()
_FIXED = {"quantizer", "optimizer", "base", "rho", "resume", "init"}


def demo(given: dict[str, Any], options: dict[str, Any]) -> None:
    """Train the four side by side and print the tables.

    They take turns every few steps: what else the machine does in the meantime hits all alike. The time of an epoch is
    that of its training steps; the table shows the median over epochs.
    """
    if _FIXED & given.keys():
        raise ValueError(f"train: --demo must come without --{min(_FIXED & given.keys())}, which it sets itself")
    began = time.perf_counter()
    config = train.config_of(options)
    config = dataclasses.replace(
        config, train_images=config.train_images or _TRAIN, test_images=config.test_images or _TEST
    )
    if options["out"] is not None and options["out"].exists():
        _runs.check_free(options["out"])
    # A demonstration on a fresh machine may fetch its data: --data names another set.
    dataset = train.load_data(config, download=options["download"] or config.data == "auto")
    config = dataclasses.replace(config, data=dataset.name if config.data == "auto" else config.data)
    configs = [dataclasses.replace(config, quantizer=quantizer, optimizer=optimizer) for quantizer, optimizer in _RUNS]
    trainers = [Trainer(of_run, dataset) for of_run in configs]
    out = _runs.create(options["out"] or _runs.free(Path("runs/demo")))
    folders = [out / trainer.config.label for trainer in trainers]
    for folder, trainer in zip(folders, trainers, strict=True):
        _runs.write(_runs.create(folder) / _runs.CONFIG, trainer.config.to_json())
    click.echo(f"{train.describe(dataset)}; {config.model}, {config.epochs} epochs, seed {config.seed}")

    names = labels(config)
    for number in range(config.epochs):
        _together(trainers, f"epoch {number + 1}/{config.epochs}")
        for name, folder, trainer in zip(names, folders, trainers, strict=True):
            _runs.save(folder, trainer.state())
            click.echo(f"{name:<{max(map(len, names)) + 2}}{train.line(trainer.history[-1], config)}")

    shown = [_report.Run.of(trainer) for trainer in trainers]
    shown = [dataclasses.replace(run, label=label) for run, label in zip(shown, names, strict=True)]
    lines = table(shown, folders)
    note = _note(dataset, config)
    page = _report.html(f"{dataset.name}: 4 bits against fp32", train.describe(dataset), note, shown, dataset.classes)
    _runs.write(out / _runs.REPORT, page)
    if options["json_file"] is not None:
        configs = [trainer.config for trainer in trainers]
        text = json.dumps(train.result(dataset, list(zip(configs, shown, strict=True))), indent=1)
        _runs.write(options["json_file"].resolve(), text + "\n")
    click.echo("")
    for text in lines:
        click.echo(text)
    click.echo("")
    click.echo(note)
    click.echo(f"report: {out / _runs.REPORT}   total {time.perf_counter() - began:.0f} s")


def _together(trainers: list[Trainer], text: str) -> None:
    """One epoch of every trainer, in turns of a few steps, under one progress bar."""
    with train.progress(sum(len(t.train_batches) for t in trainers), text) as bar:
        waiting = [trainer.parts(_TURN, bar.update) for trainer in trainers]
        while waiting:
            waiting = [part for part in waiting if next(part, _OVER) is not _OVER]


def labels(config: Config) -> list[str]:
    """Names of the runs; those of fastflat tell which backend computes."""
    bits = f"W{config.weight_bits}A{config.activation_bits}"
    kind = torch.device(config.device).type
    ours = f"{bits} fastflat ({fastflat.choose('fake_quantize', kind)[0]})"
    return ["fp32", ours, f"{bits} Python quantizer", f"{ours} + SAM"]


def table(runs: list[_report.Run], folders: list[Path]) -> list[str]:
    """The comparison as lines of text."""
    width = max(len(run.label) for run in runs) + 2
    lines = [f"{'':<{width}}{'accuracy':>10}{'sharpness':>11}{'s/epoch':>10}{'of fp32':>10}   run"]
    for run, folder in zip(runs, folders, strict=True):
        ratio = run.seconds / runs[0].seconds
        accuracy = f"{100 * run.last['test_accuracy']:.2f} %"
        numbers = f"{run.last['sharpness']:>11.4f}{run.seconds:>10.2f}{ratio:>9.2f}x"
        lines.append(f"{run.label:<{width}}{accuracy:>10}{numbers}   {folder}")
    lines += ["", f"{'weights quantized afterwards':<{width}}" + "".join(f"{n + ' bits':>10}" for n in _bits(runs))]
    for run in runs:
        lines.append(f"{run.label:<{width}}" + "".join(f"{100 * a:>8.2f} %" for a in run.post_training.values()))
    return lines


def _bits(runs: list[_report.Run]) -> list[str]:
    return list(runs[0].post_training)


def _note(dataset: Dataset, config: Config) -> str:
    parts = [
        f"s/epoch: median over {config.epochs} epochs of the training steps alone, the runs taking turns every"
        f" {_TURN} steps; CPU threads: {torch.get_num_threads()}, device {config.device}"
    ]
    if dataset.name in _FLOORS and (len(dataset.train_x), len(dataset.test_x)) == (_TRAIN, _TEST):
        parts.append(_FLOORS[dataset.name])
    return "; ".join(parts) + "."

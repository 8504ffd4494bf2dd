# SPDX-License-Identifier: Apache-2.0
"""``fastflat train``: a low-bit network on real images, in a folder that keeps everything about the run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch

import fastflat
from fastflat import data, methods
from fastflat.cli import _runs
from fastflat.cli._config import BASES, OPTIMIZERS, QUANTIZERS, Config
from fastflat.cli._trainer import Diverged, Trainer
from fastflat.data import Dataset
from fastflat.methods.lab.networks import MODELS

_DEFAULT = Config()
_MODEL_NAMES = click.Choice(list(MODELS))


def _option(name: str, help: str, **settings: Any):
    """An option whose default is the config's, so that each is written once."""
    field = name.lstrip("-").split("/")[0].replace("-", "_")
    settings.setdefault("default", getattr(_DEFAULT, field))
    settings.setdefault("show_default", settings["default"] is not None)
    return click.option(name, help=help, **settings)


@click.command(context_settings={"max_content_width": 110})
@_option(
    "--data", "fashion-mnist, fashion-mnist-m, mnist-5k, digits, auto (first at hand), a folder of images, an .npz."
)
@_option("--image-size", "Resize the images of a folder to this side.", type=int)
@_option("--train-images", "Use this many training images.", type=int)
@_option("--test-images", "Use this many test images.", type=int)
@click.option("--download", is_flag=True, help="Fetch Debian's Fashion-MNIST package into the cache if it is missing.")
@_option("--model", "Network: convnet for small gray images, resnet20 for 32x32, mlp.", type=_MODEL_NAMES)
@_option(
    "--quantizer",
    "fastflat: our kernels; python: plain PyTorch code; torch: PyTorch's builtin operator; none: fp32.",
    type=click.Choice(QUANTIZERS),
)
@_option("--weight-bits", "Bits of the weights.", type=int)
@_option("--activation-bits", "Bits of the activations.", type=int)
@_option("--bits", "PATTERN=BITS or PATTERN=W/A: other widths for some layers. Repeatable.", multiple=True)
@_option("--skip", "Layers left in floats: patterns, first, last. Repeatable.", multiple=True)
@_option("--per-channel/--per-tensor", "Scales of the weights.")
@_option("--epochs", "Epochs of the whole run.", type=int)
@_option("--batch", "Images in a batch.", type=int)
@_option("--lr", "Learning rate at its height (cosine schedule).", type=float)
@_option("--scale-lr", "Learning rate of the quantizers' scales; that of the weights if not given.", type=float)
@_option("--momentum", "Momentum of SGD and LARS.", type=float)
@_option(
    "--optimizer",
    f"Of {', '.join(OPTIMIZERS)}; from sam on two passes a step, three in hero.",
    type=click.Choice(list(OPTIMIZERS)),
    metavar="NAME",
)
@_option("--base", "Base of an optimizer that perturbs.", type=click.Choice(BASES))
@_option("--rho", "Radius of the perturbation; by the optimizer if not given.", type=float)
@_option("--weight-decay", "Weight decay, not applied to scales.", type=float)
@_option("--shift", "Augment by random shifts of up to this many pixels.", type=int)
@_option("--mirror/--no-mirror", "Augment by mirroring, where that keeps the class.")
@_option("--seed", "Seed of everything random.", type=int)
@_option("--device", "cpu, cuda, cuda:1, ...")
@_option("--amp/--no-amp", "bfloat16 autocast.")
@_option("--method", "Options and training step of a published method; fastflat methods list names them.")
@_option("--init", "Start from the weights of another run: its folder.")
@click.option("--threads", type=int, help="CPU threads.")
@click.option("--out", type=click.Path(path_type=Path), help="New folder of the run; by default one under runs/.")
@click.option("--resume", type=click.Path(path_type=Path), help="Continue the run in this folder; its options hold.")
@click.option("--stop-after", type=int, help="Stop after this many epochs in this call; --resume goes on.")
@click.option(
    "--demo", is_flag=True, help="Train fp32, 4 bits by fastflat, with SAM too, and by Python code, side by side."
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the results to this file, too.")
@click.pass_context
def train(ctx: click.Context, **options: Any) -> None:
    """Train a network with fake-quantized weights and activations.

    The folder of the run holds config.json, metrics.jsonl, checkpoint.pt and report.html. A run that was stopped goes
    on with --resume, bit for bit as if it had not been (on a CPU).

    \b
    Examples:
      fastflat train --demo
      fastflat train --model resnet20 --bits "layer3.*=2" --epochs 20 --out runs/mixed
      fastflat train --data photos/ --image-size 32 --model resnet20 --device cuda
      fastflat train --optimizer sam --rho 0.1 --out runs/flat
      fastflat train --method sam
      fastflat train --resume runs/mixed
    """
    given = {
        name: value
        for name, value in options.items()
        if ctx.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE
    }
    if options["method"] is not None:
        recipe = methods.get(options["method"]).recipe
        options.update({name: value for name, value in recipe.items() if name not in given})
    _checked(options, given)
    fastflat.tune_host_memory()
    if options["threads"] is not None:
        torch.set_num_threads(options["threads"])
    if options["demo"]:
        from fastflat.cli._demo import demo

        demo(given, options)
        return
    run, trainer = _resumed(options, given) if options["resume"] else _new(options)
    _epochs(run, trainer, options["stop_after"])
    if trainer.done == trainer.config.epochs:
        _finish(run, trainer, options["json_file"])
    else:
        click.echo(
            f"stopped after epoch {trainer.done} of {trainer.config.epochs}; fastflat train --resume {run} goes on"
        )


def _checked(options: dict[str, Any], given: dict[str, Any]) -> None:
    """What can be refused before anything is read or written."""
    for name in ("threads", "stop_after"):
        if options[name] is not None and options[name] < 1:
            raise ValueError(f"train: --{name.replace('_', '-')} must be at least 1, got {options[name]}")
    if options["resume"] and ("out" in given or options["demo"]):
        raise ValueError("train: --resume must come without --out and --demo, got both")
    target = options["json_file"]
    if target is not None and (target.is_dir() or not target.resolve().parent.is_dir()):
        raise ValueError(f"train: --json must name a file in an existing folder, got {target}")
    if not options["resume"]:
        device(options["device"])


def device(name: str) -> torch.device:
    """The device, if this machine has it."""
    try:
        wanted = torch.device(name)
    except RuntimeError:
        raise ValueError(f"train: device must be cpu or cuda, got {name!r}") from None
    if wanted.type not in ("cpu", "cuda"):
        raise ValueError(f"train: device must be cpu or cuda, got {name!r}")
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"train: device must be one that PyTorch sees, got {name!r} with {count} GPUs")
    return wanted


def config_of(options: dict[str, Any]) -> Config:
    return Config(**{f.name: options[f.name] for f in dataclasses.fields(Config)})


def load_data(config: Config, download: bool = False) -> Dataset:
    dataset = data.load(config.data, size=config.image_size, download=download)
    return dataset.first(config.train_images, config.test_images)


def _new(options: dict[str, Any]) -> tuple[Path, Trainer]:
    config = config_of(options)
    if options["out"] is not None and options["out"].exists():
        _runs.check_free(options["out"])
    dataset = load_data(config, options["download"])
    # `auto` is settled here: the run goes on with the same data whatever the machine has later.
    config = dataclasses.replace(config, data=dataset.name if config.data == "auto" else config.data)
    trainer = Trainer(config, dataset)
    run = options["out"] or _runs.free(Path("runs") / f"{dataset.name}-{config.model}-{config.label}-s{config.seed}")
    _runs.create(run)
    _runs.write(run / _runs.CONFIG, config.to_json())
    click.echo(f"{describe(dataset)}; {config.model}, {config.label}, seed {config.seed}; run folder {run}")
    return run, trainer


def _resumed(options: dict[str, Any], given: dict[str, Any]) -> tuple[Path, Trainer]:
    run = options["resume"]
    config = _runs.config(run)
    _runs.differences(given, config)
    state = _runs.checkpoint(run)
    device(config.device)
    trainer = Trainer(config, load_data(config, options["download"]))
    trainer.load(state, run / _runs.CHECKPOINT)
    if trainer.done >= config.epochs:
        raise ValueError(f"train: {run} must have epochs left to resume, got a run whose {config.epochs} are done")
    click.echo(f"{describe(trainer.dataset)}; resuming {run} after epoch {trainer.done} of {config.epochs}")
    return run, trainer


def describe(dataset: Dataset) -> str:
    """One line about the data."""
    channels, height, width = dataset.shape
    sizes = f"{len(dataset.train_x)} training and {len(dataset.test_x)} test images of {channels}x{height}x{width}"
    return f"{dataset.name} ({dataset.source}): {sizes}"


def _epochs(run: Path, trainer: Trainer, most: int | None) -> None:
    last = trainer.config.epochs if most is None else min(trainer.config.epochs, trainer.done + most)
    while trainer.done < last:
        with progress(len(trainer.train_batches), f"epoch {trainer.done + 1}/{trainer.config.epochs}") as bar:
            row = trainer.epoch(bar.update)
        _runs.save(run, trainer.state())
        click.echo(line(row, trainer.config))


@contextlib.contextmanager
def progress(steps: int, text: str) -> Iterator[Any]:
    """A progress bar, which shows on terminals only. A loss that is not finite ends the command with one line."""
    from tqdm import tqdm

    with tqdm(total=steps, desc=text, unit="step", leave=False, disable=None) as bar:
        try:
            yield bar
        except Diverged as error:
            raise click.ClickException(str(error)) from error


def line(row: dict[str, float], config: Config) -> str:
    return (
        f"epoch {row['epoch']:>3}/{config.epochs}  train loss {row['train_loss']:.4f}  test loss {row['test_loss']:.4f}"
        f"  test accuracy {100 * row['test_accuracy']:.2f} %  sharpness {row['sharpness']:.4f}  {row['seconds']:.2f} s"
    )


def _finish(run: Path, trainer: Trainer, json_file: Path | None) -> None:
    from fastflat.cli import _report

    config, dataset = trainer.config, trainer.dataset
    shown = _report.Run.of(trainer)
    note = f"Data checksum {dataset.checksum()}."
    title = f"{dataset.name}: {config.model}, {config.label}"
    page = _report.html(title, describe(dataset), note, [shown], dataset.classes)
    _runs.write(run / _runs.REPORT, page)
    if json_file is not None:
        _runs.write(json_file.resolve(), json.dumps(result(dataset, [(config, shown)]), indent=1) + "\n")
    accuracy = 100 * shown.last["test_accuracy"]
    averaged = shown.last.get("averaged_accuracy")
    mean = "" if averaged is None else f", of averaged weights {100 * averaged:.2f} %"
    click.echo(f"test accuracy {accuracy:.2f} %{mean}, {shown.seconds:.2f} s per epoch; report: {run / _runs.REPORT}")


def result(dataset: Dataset, runs: list[tuple[Config, Any]]) -> dict[str, Any]:
    """What --json writes."""
    return {
        "data": {"name": dataset.name, "source": dataset.source, "checksum": dataset.checksum()},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "runs": [{**shown.to_dict(), "config": dataclasses.asdict(config)} for config, shown in runs],
    }

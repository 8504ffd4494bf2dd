# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: files written aside and renamed, so that each is whole or absent."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import torch

from fastflat import _checks, _files
from fastflat.cli._config import Config

CONFIG, METRICS, CHECKPOINT, REPORT = "config.json", "metrics.jsonl", "checkpoint.pt", "report.html"

#: Version of the checkpoint's layout.
FORMAT = 1
_KEYS = {"format", "config", "checksum", "epoch", "model", "optimizer", "scheduler", "random", "history"}
#: What checkpoints before them lack, with what they stand for.
_NEWER = {"hook": {}}


def write(path: Path, content: str | bytes) -> None:
    """Write a file aside, flush it to disk, and rename it."""
    _files.write_all({path: content.encode() if isinstance(content, str) else content})


def check_free(out: Path) -> None:
    """Refuse a path that holds something.

    Raises:
        ValueError: it does.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        hint = f"; --resume {out} continues it" if (out / CHECKPOINT).exists() else ""
        raise ValueError(f"train: out must be a new or empty folder, got {out}{hint}")


def create(out: Path) -> Path:
    """A new folder for a run."""
    check_free(out)
    out.mkdir(parents=True, exist_ok=True)
    return out


def free(base: Path) -> Path:
    """The path, or the first of path-2, path-3, ... that does not exist."""
    number, path = 1, base
    while path.exists():
        number += 1
        path = base.with_name(f"{base.name}-{number}")
    return path


def save(run: Path, state: dict[str, Any]) -> None:
    """Write the checkpoint, then the metrics that it holds."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write(run / CHECKPOINT, buffer.getvalue())
    write(run / METRICS, "".join(json.dumps(row) + "\n" for row in state["history"]))


def config(run: Path) -> Config:
    """The config of a run's folder.

    Raises:
        FileNotFoundError, ValueError: it is not there, or not one.
    """
    path = run / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"train: resume must name the folder of a run, got {str(run)!r} without {CONFIG}")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"train: {path} must hold JSON, got: {error}") from None
    return Config.from_dict(values, path)


def checkpoint(run: Path) -> dict[str, Any]:
    """The checkpoint of a run, with plain values and tensors only (``weights_only``).

    Raises:
        FileNotFoundError, ValueError: it is not there, cut short, or of another layout.
    """
    path = run / CHECKPOINT
    if not path.is_file():
        raise FileNotFoundError(f"train: {path} must be a checkpoint, got no file; no epoch was finished")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a broken file
        reason = _checks.first_line(error, 120)
        raise ValueError(f"train: {path} must be a whole checkpoint, got: {reason}") from None
    if isinstance(state, dict):
        state = _NEWER | state
    if not isinstance(state, dict) or set(state) != _KEYS | set(_NEWER) or state["format"] != FORMAT:
        raise ValueError(f"train: {path} must be a checkpoint of fastflat train (format {FORMAT}), got another file")
    return state


def differences(given: dict[str, Any], kept: Config) -> None:
    """Refuse options given on the command line that contradict the run that is resumed."""
    values = dataclasses.asdict(kept)
    for name, value in given.items():
        if name in values and values[name] != value:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"train: {option} must stay {values[name]!r} to resume this run, got {value!r}")

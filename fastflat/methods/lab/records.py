# SPDX-License-Identifier: Apache-2.0
"""Finished runs, one line of a file each: read, and added so that the file is whole at every moment."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastflat import _files


@dataclasses.dataclass(frozen=True)
class Record:
    """A finished run, a line of a study's file.

    Attributes:
        kind: ``"tune"``, ``"run"``, or ``"profile"``, a short run for the time of a step; ``"search"`` of the search
            for combinations.
        arm, seed, choice: which.
        metrics: what the arm gave; NaN where a training did not end in finite numbers.
        settings: the experiment's, as plain values.
        machine: versions and threads.
    """

    kind: str
    arm: str
    seed: int
    choice: dict[str, float]
    metrics: dict[str, float]
    settings: dict[str, Any]
    machine: dict[str, Any]

    def line(self) -> str:
        values = {**vars(self), "metrics": {k: v if math.isfinite(v) else None for k, v in self.metrics.items()}}
        return json.dumps(values, sort_keys=True) + "\n"


_KEYS = {field.name for field in dataclasses.fields(Record)}


def read(path: Path) -> list[Record]:
    """The runs in a file, none where there is no file.

    Raises:
        ValueError: a line is not one of a study's.
    """
    return _parsed(path, path.read_bytes()) if path.is_file() else []


def _parsed(path: Path, content: bytes) -> list[Record]:
    records = []
    for number, line in enumerate(content.decode(errors="replace").splitlines(), 1):
        try:
            values = json.loads(line)
            if set(values) != _KEYS or not isinstance(values["metrics"], dict):
                raise ValueError("other keys")
            values["metrics"] = {k: math.nan if v is None else float(v) for k, v in values["metrics"].items()}
            records.append(Record(**values))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"methods: line {number} of {path} must be a run of a study, got: {error}") from None
    return records


def write(path: Path, records: list[Record]) -> None:
    """The runs as a file, written aside and renamed."""
    _files.write_all({path: "".join(r.line() for r in records).encode()})


class Kept:
    """The runs of one study in their file, to which finished ones are added.

    Args:
        path: the file; its folder is made.
        settings: what must agree for two runs to belong together, as plain values.

    Raises:
        ValueError: the file holds runs of other settings, or is none of runs.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        for record in read(path):
            if record.settings != settings:
                odd = sorted(k for k in {*settings, *record.settings} if settings.get(k) != record.settings.get(k))
                raise ValueError(
                    f"methods: {path} must hold runs of these settings, got others in {', '.join(odd)}; move it away,"
                    " or choose another folder"
                )
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.settings = path, settings
        self._seen: tuple[bytes, list[Record]] = (b"", [])

    def one(
        self, kind: str, arm: str, seed: int, choice: dict[str, float], train: Callable[[], dict[str, float]]
    ) -> Record:
        """The run, which ``train`` makes where the file does not hold it yet.

        Runs of the same kind and arm at another choice go, but for those that tune.
        """
        for record in self._read():
            if (record.kind, record.arm, record.seed, record.choice) == (kind, arm, seed, choice):
                return record
        record = Record(kind, arm, seed, choice, train(), self.settings, machine())
        # Read anew: another process may have added lines meanwhile.
        kept = [r for r in self._read() if (r.kind, r.arm) != (kind, arm) or kind == "tune" or r.choice == choice]
        content = "".join(r.line() for r in [*kept, record]).encode()
        _files.write_all({self.path: content})
        self._seen = (content, [*kept, record])
        return record

    def _read(self) -> list[Record]:
        """What the file holds; parsed where it is not what was read or written last."""
        content = self.path.read_bytes() if self.path.is_file() else b""
        if content != self._seen[0]:
            self._seen = (content, _parsed(self.path, content))
        return self._seen[1]


def machine() -> dict[str, Any]:
    """Where a run ran, as far as its numbers depend on it."""
    return {
        "fastflat": importlib.metadata.version("fastflat"),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
    }

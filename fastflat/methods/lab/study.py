# SPDX-License-Identifier: Apache-2.0
"""Runs an experiment: every arm alike is tuned, then trained with each seed; finished runs are kept in one file."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastflat.methods._contract import Arm, Experiment, Method, Settings
from fastflat.methods.lab.records import Kept, Record, machine, write
from fastflat.methods.lab.records import read as read

#: Seed of the runs that choose from the grid; those that are reported have the seeds 0, 1, ...
TUNING_SEED = 1000
#: Points that an arm may try beyond the grid while its best one lies at an end.
FURTHER = 4


class _Noted(Mapping):
    """A point of the grid that notes which of its values were read."""

    def __init__(self, choice: Mapping[str, float]) -> None:
        self._choice, self.read = choice, set()

    def __getitem__(self, name: str) -> float:
        self.read.add(name)
        return self._choice[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._choice)

    def __len__(self) -> int:
        return len(self._choice)

    def values_read(self) -> dict[str, float]:
        return {name: self._choice[name] for name in self.read}


def file(folder: Path, name: str, quick: bool) -> Path:
    """Where the runs of a method are kept."""
    return folder / f"{name}{'-quick' if quick else ''}.jsonl"


def profile_file(folder: Path, name: str) -> Path:
    """Where the profile of a method is kept."""
    return folder / f"{name}-profile.jsonl"


def fingerprint(experiment: Experiment, settings: Settings) -> dict[str, Any]:
    """What must agree for two runs to belong to one study."""
    kept = {k: v for k, v in dataclasses.asdict(settings).items() if k not in ("seeds", "choice", "steps")}
    return {**kept, "grid": {name: list(values) for name, values in experiment.grid.items()}}


def points(experiment: Experiment) -> list[dict[str, float]]:
    """All points of the grid."""
    names = list(experiment.grid)
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*experiment.grid.values())]


def further(experiment: Experiment, tuned: Sequence[Record]) -> dict[str, float] | None:
    """What an arm tries next: its best point with one value moved on, in the ratio of the last two, where no greater
    or no smaller one was tried; None where the best point has neighbours on all sides.

    Values that are not positive, and those that the arm does not read, stay.
    """
    best = max(tuned, key=lambda r: _score(r.metrics[experiment.tuned_on]))
    for name in experiment.grid:
        values, value = sorted({r.choice[name] for r in tuned}), best.choice[name]
        if len(values) < 2 or not _reads(tuned, name):
            continue
        for end, neighbour in (values[:2], values[:-3:-1]):
            if end == value and end > 0 and neighbour > 0:
                return {**best.choice, name: float(f"{end * end / neighbour:.3g}")}
    return None


def _reads(tuned: Sequence[Record], name: str) -> bool:
    """Whether points that differ only in that value have different metrics."""
    by_rest: dict[tuple, dict[str, float]] = {}
    for r in tuned:
        rest = tuple(v for k, v in r.choice.items() if k != name)
        if by_rest.setdefault(rest, r.metrics) != r.metrics:
            return True
    return False


def size(experiment: Experiment, settings: Settings) -> int:
    """How many trainings there are in all, if no arm looks beyond the grid."""
    tuning = len(points(experiment)) if _tunes(experiment, settings) else 0
    return len(experiment.arms) * (tuning + settings.seeds)


def runs(method: Method, path: Path) -> list[Record]:
    """What a file of runs holds, after a look at whether today's experiment tunes by a metric that they have.

    Raises:
        ValueError: it tunes by another one, or the file is none of runs.
    """
    found, metric = read(path), method.experiment.tuned_on
    if any(r.kind == "tune" and metric not in r.metrics for r in found):
        raise ValueError(
            f"methods: {path} must hold runs of {method.name} tuned by {metric}, got others; move it away, or choose"
            " another folder"
        )
    return found


def run(
    method: Method, settings: Settings, path: Path, before: Callable[[str], object] = lambda text: None
) -> Iterator[Record]:
    """Trains what the file does not hold yet, and yields every run, those that it held included.

    Points of the grid that differ only in what an arm does not read, as a baseline does not the strength of a penalty,
    are one training. An arm whose best point lies at an end of the grid tries up to four more beyond it
    (:func:`further`).

    Args:
        method: whose experiment it is.
        settings: full, quick, or changed from them.
        path: the file of the study; each finished run adds its line, written aside and renamed.
        before: called with a few words before each training.

    Raises:
        ValueError: the file holds runs of other settings.
    """
    experiment = method.experiment
    kept = Kept(path, fingerprint(experiment, settings))
    runs(method, path)
    trained: list[tuple[str, str, int, dict[str, float], dict[str, float]]] = []

    def metrics_of(kind: str, arm: Arm, seed: int, choice: dict[str, float]) -> dict[str, float]:
        for *what, used, metrics in trained:
            if what == [kind, arm.name, seed] and used.items() <= choice.items():
                return metrics
        before(f"{method.name}: {arm.name}, {'tuning ' + _words(choice) if kind == 'tune' else f'seed {seed}'}")
        noted = _Noted(choice)
        metrics = _metrics(experiment, arm, seed, _for_arm(settings, arm, noted), kind)
        trained.append((kind, arm.name, seed, noted.values_read(), metrics))
        return metrics

    def one(kind: str, arm: Arm, seed: int, choice: dict[str, float]) -> Record:
        return kept.one(kind, arm.name, seed, choice, lambda: metrics_of(kind, arm, seed, choice))

    for arm in experiment.arms:
        grid = points(experiment)
        choice = grid[0]
        if _tunes(experiment, settings):
            tuned = [one("tune", arm, TUNING_SEED, point) for point in grid]
            yield from tuned
            while len(tuned) < len(grid) + FURTHER and (point := further(experiment, tuned)):
                tuned.append(one("tune", arm, TUNING_SEED, point))
                yield tuned[-1]
            choice = max(tuned, key=lambda r: _score(r.metrics[experiment.tuned_on])).choice
        for seed in range(settings.seeds):
            yield one("run", arm, seed, choice)


def profile(
    method: Method, rounds: int, path: Path, before: Callable[[str], object] = lambda text: None
) -> Iterator[Record]:
    """Times a step of every arm, all arms in turn in each round, at the quick settings; the file is written anew.

    Short runs beside each other see the same machine, which those of a study, hours apart, do not.
    """
    experiment = method.experiment
    settings = dataclasses.replace(experiment.quick, tune=False)
    choice, mark, records = points(experiment)[0], fingerprint(experiment, settings), []
    for number in range(rounds):
        for arm in experiment.arms:
            before(f"{method.name}: {arm.name}, round {number}")
            metrics = _metrics(experiment, arm, number, _for_arm(settings, arm, choice), "profile")
            kept = {"seconds_per_step": metrics["seconds_per_step"]}
            records.append(Record("profile", arm.name, number, choice, kept, mark, machine()))
            yield records[-1]
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, records)


def _for_arm(settings: Settings, arm: Arm, choice: Mapping[str, float]) -> Settings:
    steps = int(settings.passes / arm.passes)
    return dataclasses.replace(settings, choice=choice, steps=steps)


def _metrics(experiment: Experiment, arm: Arm, seed: int, settings: Settings, kind: str) -> dict[str, float]:
    try:
        metrics = {name: float(value) for name, value in arm.run(seed, settings).items()}
    except ArithmeticError:
        # A training that diverged: its numbers do not exist. Tuning passes it by; no claim holds with it.
        return {"seconds_per_step": math.nan, experiment.tuned_on: math.nan}
    missing = {"seconds_per_step", *([experiment.tuned_on] if kind == "tune" else [])} - set(metrics)
    if missing:
        raise ValueError(f"methods: arm {arm.name} must give {', '.join(sorted(missing))}, got {', '.join(metrics)}")
    return metrics


def _tunes(experiment: Experiment, settings: Settings) -> bool:
    return settings.tune and len(points(experiment)) > 1


def _score(value: float) -> float:
    return value if math.isfinite(value) else -math.inf


def _words(choice: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in choice.items())

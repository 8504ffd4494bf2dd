# SPDX-License-Identifier: Apache-2.0
"""The search for combinations: values are tuned, every combination is trained once, the best ones with several seeds.

1. *Tuning.* Each optimizer takes the best of its points with the baseline's quantizer and loss, then each loss the best
   of its own with the baseline's quantizer and optimizer: on validation images, one training a point.
2. *Search.* Every combination is trained once for each condition of the search that its parts have something to say
   for, and measured on validation images.
3. *Runs.* For each goal the best two, the baseline, and the changed parts of the best one alone, with seeds that
   neither of the above has seen, measured on test images. What is said of gains comes from these.
4. *Profile.* Short trainings of all of them in turns, for the time of a step.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastflat.methods.lab.goals import training
from fastflat.methods.lab.goals.catalogue import GOALS, Goal
from fastflat.methods.lab.goals.parts import BASELINE, LOSSES, OPTIMIZERS, QUANTIZERS, Combination, Part, own_values
from fastflat.methods.lab.records import Kept, Record
from fastflat.methods.lab.study import TUNING_SEED

#: How many of a goal's ranking are run with several seeds.
BEST = 2
#: Steps of a training that is timed.
_TIMED_STEPS = 12


@dataclasses.dataclass(frozen=True)
class Search:
    """What is searched.

    Attributes:
        size: of all trainings.
        quantizers, optimizers, losses: names of the parts; the baseline's are among them.
        seeds: of the runs, from 0 on.
        rounds: of the profile.
        tune: whether values are tuned; else each part takes its first point.
    """

    size: training.Size
    quantizers: tuple[str, ...] = tuple(QUANTIZERS)
    optimizers: tuple[str, ...] = tuple(OPTIMIZERS)
    losses: tuple[str, ...] = tuple(LOSSES)
    seeds: int = 3
    rounds: int = 5
    tune: bool = True

    @property
    def conditions(self) -> tuple[str, ...]:
        """Those that rank for some goal."""
        return tuple(dict.fromkeys(goal.chosen[0] for goal in GOALS.values()))

    def combinations(self, condition: str) -> list[Combination]:
        """All that are trained for a condition of the search."""
        every = itertools.starmap(Combination, itertools.product(self.quantizers, self.optimizers, self.losses))
        return [c for c in every if all(condition in part.tried for part in c.parts)]

    @property
    def settings(self) -> dict[str, Any]:
        """What must agree for two runs to belong together."""
        return dataclasses.asdict(self.size)


FULL = Search(training.Size(passes=400, images=3000, test_images=2000, hard=200))
QUICK = Search(
    training.Size(passes=32, images=640, test_images=200, hard=40),
    ("lsq", "tempered"),
    ("sgd", "sam"),
    ("none", "symreg"),
    seeds=1,
    rounds=1,
    tune=False,
)

#: ``(combination, condition's name, seed, point, size, part) -> metrics``.
Train = Callable[[Combination, str, int, dict[str, float], training.Size, str | None], dict[str, float]]


def key(condition: str, combination: Combination) -> str:
    """The name of an arm in the file: what is trained for what."""
    return f"{condition}: {combination}"


def combination(arm: str) -> Combination:
    """What is trained, from the name of an arm."""
    return Combination(*arm.split(": ", 1)[1].split(" + "))


def tuned(records: Sequence[Record], search: Search) -> dict[str, dict[str, float]]:
    """The point of each part that has some: the best one tried, or the first where none was."""
    found = {}
    for name, part in _with_points(search).items():
        arm, metric = key(part.tuned_on[0], _tuning(name)), part.tuned_on[1]
        tried = [(own_values(part, r.choice), r.metrics) for r in records if (r.kind, r.arm) == ("tune", arm)]
        tried = [(values, metrics) for values, metrics in tried if values in part.points]
        best = max(tried, key=lambda row: _score(row[1].get(metric, math.nan)), default=(part.points[0], {}))
        found[name] = dict(best[0])
    return found


def point(combination: Combination, points: dict[str, dict[str, float]]) -> dict[str, float]:
    """The values with which a combination is trained."""
    return {**points.get(combination.optimizer, {}), **points.get(combination.loss, {})}


def ranking(records: Sequence[Record], goal: Goal, search: Search) -> list[Combination]:
    """The combinations of the search, the best for a goal first; those that diverged are left out.

    Of equal ones the cheaper comes first, then the one that changes less.
    """
    condition, metric = goal.chosen
    values = {r.arm: r.metrics for r in records if r.kind == "search"}
    least = -math.inf
    if goal.within is not None:
        least = values.get(key(condition, BASELINE), {}).get("validation_accuracy", math.nan) - goal.within
    sign = 1 if goal.direction == "higher" else -1
    scored = []
    for combination in search.combinations(condition):
        metrics = values.get(key(condition, combination), {})
        score = sign * metrics.get(metric, math.nan)
        if goal.admits(combination) and math.isfinite(score) and not metrics["validation_accuracy"] < least:
            scored.append((-score, combination.passes, len(combination.changed), combination))
    return [combination for *_, combination in sorted(scored, key=lambda row: row[:3])]


def finalists(records: Sequence[Record], goal: Goal, search: Search) -> list[Combination]:
    """What is run with several seeds for a goal: the baseline, the best ones, the changed parts of the first alone."""
    best = ranking(records, goal, search)[:BEST]
    return list(dict.fromkeys([BASELINE, *best, *(best[0].alone() if best else ())]))


def runs(records: Sequence[Record], search: Search) -> list[tuple[str, Combination]]:
    """All (condition, combination) that are run with several seeds, each once."""
    found: dict[tuple[str, Combination], None] = {}
    for goal in GOALS.values():
        best = ranking(records, goal, search)[:BEST]
        for condition in dict.fromkeys(r.condition for r in goal.readings):
            # Parts alone belong to the condition that ranks.
            own = finalists(records, goal, search) if condition == goal.chosen[0] else [BASELINE, *best]
            found |= dict.fromkeys((condition, combination) for combination in own)
    return list(found)


def size(search: Search, records: Sequence[Record] = ()) -> int:
    """How many trainings there are in all; of the runs and the profile only once the search is whole."""
    tuning = sum(len(part.points) for part in _with_points(search).values()) if search.tune else 0
    count = tuning + sum(len(search.combinations(condition)) for condition in search.conditions)
    if not whole(records, search):
        return count
    chosen = runs(records, search)
    return count + search.seeds * len(chosen) + search.rounds * len(_timed(chosen))


def whole(records: Sequence[Record], search: Search) -> bool:
    """Whether every combination was trained once."""
    there = {r.arm for r in records if r.kind == "search"}
    return all(key(c, combination) in there for c in search.conditions for combination in search.combinations(c))


def run(
    search: Search,
    path: Path,
    before: Callable[[str], object] = lambda text: None,
    train: Train | None = None,
) -> Iterator[Record]:
    """Makes what the file does not hold yet, and yields every record, those that it held included.

    Args:
        search: full, quick, or others.
        path: the file; each finished training adds its line, written aside and renamed.
        before: called with a few words before each training.
        train: what trains and measures; by default :func:`training.measured`.

    Raises:
        ValueError: the file holds runs of other settings.
    """
    kept, train = Kept(path, search.settings), _measured if train is None else train
    records: list[Record] = []

    def one(kind: str, name: str, combination: Combination, seed: int, at: dict[str, float], size: training.Size):
        part, arm = {"run": "test", "profile": None}.get(kind, "validation"), key(name, combination)

        def metrics() -> dict[str, float]:
            # What was tuned and is searched at the same point is one training.
            for r in records:
                if kind == "search" and (r.kind, r.arm, r.choice) == ("tune", arm, at):
                    return r.metrics
            before(f"{kind} {arm}, seed {seed}")
            try:
                return train(combination, name, seed, at, size, part)
            except ArithmeticError:
                return {"seconds_per_step": math.nan}

        records.append(kept.one(kind, arm, seed, at, metrics))
        return records[-1]

    if search.tune:
        for name, part in _with_points(search).items():
            combination = _tuning(name)
            for own in part.points:
                at = {**point(combination, tuned(records, search)), **own}
                yield one("tune", part.tuned_on[0], combination, TUNING_SEED, at, search.size)
    points = tuned(records, search)
    for condition in search.conditions:
        for combination in search.combinations(condition):
            yield one("search", condition, combination, TUNING_SEED, point(combination, points), search.size)
    chosen = runs(records, search)
    for condition, combination in chosen:
        for seed in range(search.seeds):
            yield one("run", condition, combination, seed, point(combination, points), search.size)
    for number in range(search.rounds):
        for combination in _timed(chosen):
            size = dataclasses.replace(search.size, passes=_TIMED_STEPS * combination.passes)
            yield one("profile", "clean", combination, number, point(combination, points), size)


def _with_points(search: Search) -> dict[str, Part]:
    """The parts that have points to choose from: optimizers first, since losses are tuned with the baseline's."""
    parts = {name: OPTIMIZERS[name] for name in search.optimizers} | {name: LOSSES[name] for name in search.losses}
    return {name: part for name, part in parts.items() if part.points}


def _tuning(name: str) -> Combination:
    """The baseline with one part."""
    return Combination(**{"optimizer" if name in OPTIMIZERS else "loss": name})


def _timed(chosen: Sequence[tuple[str, Combination]]) -> list[Combination]:
    return list(dict.fromkeys([BASELINE, *(combination for _, combination in chosen)]))


def _score(value: float) -> float:
    return value if math.isfinite(value) else -math.inf


def _measured(combination: Combination, name: str, seed: int, at: dict[str, float], size: Any, part: str | None):
    return training.measured(combination, training.CONDITIONS[name], seed, at, size, part)

# SPDX-License-Identifier: Apache-2.0
"""What the records of a search say: gains over the baseline, what parts do alone, which pairs go together."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Sequence

from fastflat.methods._contract import Claim
from fastflat.methods.lab import verdict
from fastflat.methods.lab.goals.catalogue import Goal, Reading
from fastflat.methods.lab.goals.parts import BASELINE, KINDS, Combination
from fastflat.methods.lab.goals.search import BEST, Search, key, ranking
from fastflat.methods.lab.records import Record


@dataclasses.dataclass(frozen=True)
class Gain:
    """How a combination differs from another in a reading, in the direction that is better.

    Attributes:
        reading: which.
        mean, error: of the differences between runs of one seed, and its standard error; NaN where one diverged.
        seeds: how many both have.
        answer: ``"more"`` or ``"less"`` where the mean lies beyond two standard errors of 0, ``"same"`` where it does
            not, ``"open"`` with fewer than three seeds or where the other diverged. What diverges itself is ``"less"``.
    """

    reading: Reading
    mean: float
    error: float
    seeds: int
    answer: str


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two parts in the search, each value a mean over the third kind, one training each.

    Attributes:
        kinds, names: which two.
        mean: of the trainings that have both.
        together: how far that mean is beyond what both do on their own, ``mean - (first + second - all)``.
    """

    kinds: tuple[str, str]
    names: tuple[str, str]
    mean: float
    together: float


def gain(
    records: Sequence[Record], goal: Goal, reading: Reading, combination: Combination, base: Combination = BASELINE
) -> Gain:
    """What a combination gains over another in a reading."""
    arms = key(reading.condition, combination), key(reading.condition, base)
    found = verdict.finding(records, Claim(reading.metric, *arms, goal.direction))
    others = verdict.values(records, arms[1], reading.metric).values()
    if found.holds is None or not all(map(math.isfinite, others)):
        answer = "open"
    elif found.holds:
        answer = "more"
    else:
        answer = "same" if found.difference + verdict.ERRORS * found.error >= 0 else "less"
    return Gain(reading, found.difference, found.error, found.seeds, answer)


def gains(records: Sequence[Record], goal: Goal, combination: Combination) -> list[Gain]:
    """In every reading of a goal, over the baseline."""
    return [gain(records, goal, reading, combination) for reading in goal.readings]


def deciding(goal: Goal) -> list[Reading]:
    """The readings of the condition that ranks: there parts were run alone, too."""
    return [reading for reading in goal.readings if reading.condition == goal.chosen[0]]


def recommended(records: Sequence[Record], goal: Goal, search: Search) -> Combination | None:
    """What the runs speak for: the first of the best two that gains in some reading and loses in none, or the cheapest
    of its parts alone that does so and that it does not exceed; the baseline where none gains; None before there are
    three seeds of all."""
    best = ranking(records, goal, search)[:BEST]
    answers = {c: [g.answer for g in gains(records, goal, c)] for c in best}
    if not answers or any("open" in row for row in answers.values()):
        return None
    found = next((c for c, row in answers.items() if _good(row)), BASELINE)
    enough = [
        alone
        for alone, over in beyond_parts(records, goal, found)
        if _good([gain(records, goal, reading, alone).answer for reading in deciding(goal)])
        and not any(g.answer in ("more", "open") for g in over)
    ]
    return min(enough, key=lambda c: c.passes, default=found)


def _good(row: Sequence[str]) -> bool:
    return "more" in row and not {"less", "open"} & set(row)


def beyond_parts(
    records: Sequence[Record], goal: Goal, combination: Combination
) -> list[tuple[Combination, list[Gain]]]:
    """What a combination gains over each of its changed parts alone."""
    return [
        (alone, [gain(records, goal, reading, combination, alone) for reading in deciding(goal)])
        for alone in combination.alone()
    ]


def cost(records: Sequence[Record], combination: Combination) -> float:
    """The time of a step over the baseline's, the median over the rounds of the profile; NaN without one."""
    own, base = (
        verdict.values(records, key("clean", c), "seconds_per_step", "profile") for c in (combination, BASELINE)
    )
    ratios = [own[n] / base[n] for n in own.keys() & base.keys()]
    return statistics.median(ratios) if ratios else math.nan


def pairs(records: Sequence[Record], goal: Goal, search: Search) -> list[Pair]:
    """Of each two kinds the pair with the best mean among the baseline and the ranked ones."""
    condition, metric = goal.chosen
    values = {r.arm: r.metrics.get(metric, math.nan) for r in records if r.kind == "search"}
    sign = 1 if goal.direction == "higher" else -1
    there = {c: values.get(key(condition, c), math.nan) for c in [BASELINE, *ranking(records, goal, search)]}
    there = {c: value for c, value in there.items() if math.isfinite(value)}
    found = []
    for kinds in itertools.combinations(KINDS, 2):
        every = _mean(there, {})
        rows = []
        for names in sorted({tuple(getattr(c, kind) for kind in kinds) for c in there}):
            both = dict(zip(kinds, names, strict=True))
            single = [_mean(there, {kind: name}) for kind, name in both.items()]
            mean = _mean(there, both)
            rows.append(Pair(kinds, names, mean, mean - (sum(single) - every)))
        if rows:
            found.append(max(rows, key=lambda pair: sign * pair.mean))
    return found


def _mean(there: dict[Combination, float], parts: dict[str, str]) -> float:
    return statistics.fmean(
        value for c, value in there.items() if all(getattr(c, kind) == name for kind, name in parts.items())
    )

# SPDX-License-Identifier: Apache-2.0
"""From the runs of a study to an answer: which claims hold, and what the method costs."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

from fastflat.methods._contract import Claim, Experiment
from fastflat.methods.lab.records import Record

#: Runs of an arm without which nothing is said.
LEAST_SEEDS = 3
#: Standard errors by which a difference must exceed its margin.
ERRORS = 2.0


@dataclasses.dataclass(frozen=True)
class Finding:
    """What the runs say of a claim.

    Attributes:
        claim: the claim.
        difference: mean over seeds of the difference in the claimed direction.
        error: its standard error.
        seeds: how many both arms have.
        holds: whether the difference exceeds the margin by more than two errors; None with fewer than three seeds.
    """

    claim: Claim
    difference: float
    error: float
    seeds: int
    holds: bool | None


@dataclasses.dataclass(frozen=True)
class Cost:
    """An arm's step beside that of the first arm: measured, and as its passes say."""

    arm: str
    measured: float
    passes: float


def values(records: Sequence[Record], arm: str, metric: str, kind: str = "run") -> dict[int, float]:
    """A metric of the reported runs of an arm, by seed."""
    return {r.seed: r.metrics.get(metric, math.nan) for r in records if r.kind == kind and r.arm == arm}


def spread(numbers: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (over n - 1; 0 for a single number)."""
    if not numbers:
        return math.nan, math.nan
    if not all(map(math.isfinite, numbers)):
        return math.nan, math.nan
    return statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else 0.0


def finding(records: Sequence[Record], claim: Claim) -> Finding:
    """What the runs say of one claim."""
    method, base = (values(records, arm, claim.metric) for arm in (claim.arm, claim.baseline))
    sign = 1 if claim.direction == "higher" else -1
    differences = [sign * (method[seed] - base[seed]) for seed in sorted(set(method) & set(base))]
    mean, deviation = spread(differences)
    error = deviation / math.sqrt(len(differences)) if differences else math.nan
    enough = len(differences) >= LEAST_SEEDS
    return Finding(claim, mean, error, len(differences), mean - ERRORS * error > claim.margin if enough else None)


def findings(records: Sequence[Record], experiment: Experiment) -> list[Finding]:
    """What the runs say of all claims."""
    return [finding(records, claim) for claim in experiment.claims]


def verdict(found: Sequence[Finding]) -> str:
    """``reproduced`` where all claims hold, ``partly``, ``not``, or ``open`` where there are too few runs."""
    if any(f.holds is None for f in found) or not found:
        return "open"
    holding = sum(bool(f.holds) for f in found)
    return "reproduced" if holding == len(found) else "partly" if holding else "not"


def costs(profile: Sequence[Record], experiment: Experiment) -> list[Cost]:
    """Step times over that of the first arm: the median over the rounds of a profile, in which all arms take turns.

    Runs of a study, hours apart on a machine that does other things, too, say little of a step's time.
    """
    base = experiment.arms[0]
    first, found = _steps(profile, base.name), []
    for arm in experiment.arms[1:]:
        own = _steps(profile, arm.name)
        ratios = [own[n] / first[n] for n in sorted(set(own) & set(first))]
        found.append(Cost(arm.name, statistics.median(ratios) if ratios else math.nan, arm.passes / base.passes))
    return found


def _steps(profile: Sequence[Record], arm: str) -> dict[int, float]:
    of_rounds = values(profile, arm, "seconds_per_step", "profile")
    return {number: seconds for number, seconds in of_rounds.items() if math.isfinite(seconds)}

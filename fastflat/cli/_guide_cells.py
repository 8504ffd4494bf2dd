# SPDX-License-Identifier: Apache-2.0
"""Numbers of the user's guide as words."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from fastflat.methods.lab import verdict
from fastflat.methods.lab.goals import answers
from fastflat.methods.lab.goals.answers import Gain
from fastflat.methods.lab.goals.catalogue import Goal, Reading
from fastflat.methods.lab.goals.parts import Combination
from fastflat.methods.lab.goals.search import key
from fastflat.methods.lab.records import Record

NONE = "–"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def value(metric: str, number: float) -> str:
    """A metric: accuracies in per cent."""
    if not math.isfinite(number):
        return NONE
    return f"{number:.3g}" if metric == "top_eigenvalue" else f"{100 * number:.1f} %"


def difference(metric: str, number: float) -> str:
    """A difference of a metric: of accuracies in points."""
    # + 0.0: no minus before a zero.
    if metric == "top_eigenvalue":
        return f"{round(number, 3) + 0.0:+.3g}"
    return f"{round(100 * number, 1) + 0.0:+.1f}"


def gain(found: Gain, label: bool = False) -> str:
    """A gain with its standard error, bold beyond two of them; ``label``: with the name of the reading."""
    if not found.seeds:
        text = NONE
    elif not math.isfinite(found.mean):
        text = "diverged"
    elif found.reading.metric == "top_eigenvalue":
        text = f"{-found.mean:+.3g} ± {found.error:.2g}"
    else:
        text = f"{difference(found.reading.metric, found.mean)} ± {100 * found.error:.1f}"
    text = f"**{text}**" if found.answer in ("more", "less") else text
    return f"{found.reading.label} {text}" if label else text


def gains(found: Sequence[Gain]) -> str:
    """Several, each with its reading."""
    return ", ".join(gain(g, label=len(found) > 1) for g in found)


def measured(records: Sequence[Record], reading: Reading, combination: Combination) -> str:
    """The mean of a reading over the seeds."""
    runs = verdict.values(records, key(reading.condition, combination), reading.metric)
    return value(reading.metric, verdict.spread(list(runs.values()))[0])


def cost(records: Sequence[Record], combination: Combination) -> str:
    """The time of a step beside the baseline's."""
    ratio = answers.cost(records, combination)
    return f"{ratio:.2f} x" if math.isfinite(ratio) else NONE


def changed(alone: Combination) -> str:
    """The name of the one part that is not the baseline's."""
    (kind,) = alone.changed
    return getattr(alone, kind)


def rows(records: Sequence[Record], kind: str, arms: Collection[str]) -> str:
    """The lines of the file of runs, counted from 1, with the runs of that kind and those arms: ``3-5, 9``."""
    lines = [number for number, r in enumerate(records, 1) if r.kind == kind and r.arm in arms]
    spans: list[list[int]] = []
    for line in lines:
        if spans and line == spans[-1][1] + 1:
            spans[-1][1] = line
        else:
            spans.append([line, line])
    return ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in spans) or NONE


def runs_of(records: Sequence[Record], goal: Goal, *combinations: Combination) -> str:
    """The lines with the runs of combinations for a goal."""
    return rows(records, "run", {key(r.condition, c) for r in goal.readings for c in combinations})


def results(records: Sequence[Record], goal: Goal, shown: Sequence[Combination]) -> str:
    """Combinations of a goal, the baseline first: what was measured, and the gain over the baseline."""
    found = []
    for combination in shown:
        cells = []
        for reading in goal.readings:
            level = measured(records, reading, combination)
            over = gain(answers.gain(records, goal, reading, combination))
            cells.append(level if combination == shown[0] or level == NONE else f"{level} ({over})")
        lines = runs_of(records, goal, combination)
        found.append([str(combination), *cells, str(combination.passes), cost(records, combination), lines])
    return table(["combination", *(r.label for r in goal.readings), "passes a step", "a step costs", "rows"], found)

# SPDX-License-Identifier: Apache-2.0
"""The part of the user's guide that says how it was searched."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from fastflat.cli import _guide_cells as cells
from fastflat.methods.lab.goals import answers, search, training
from fastflat.methods.lab.goals.catalogue import GOALS
from fastflat.methods.lab.goals.parts import BASELINE, KINDS, LOSSES, OPTIMIZERS, Part
from fastflat.methods.lab.goals.search import Search, key
from fastflat.methods.lab.records import Record

_KINDS = {"tune": "to tune", "search": "of the search", "run": "runs", "profile": "short ones for the time of a step"}


def section(records: Sequence[Record], what: Search, report: str) -> str:
    """What was trained, by which rule it was chosen, and every number of the search."""
    size = what.size
    lines = [
        "## How it was searched",
        f"""\
A convolutional network of four layers on Fashion-MNIST, its inner layers with {training.CONDITIONS["clean"].bits} bits
for weights and activations by `fastflat.prepare`; {size.images} training images, a fifth as many for validation,
{size.test_images} for the test ({size.hard} of each for corruptions and attacks), batches of {size.batch}. Every
training may use {size.passes} forward-backward passes: one whose optimizer takes two and whose loss takes two makes a
quarter of the steps. A combination is named by its quantizer, its optimizer and its loss:""",
        "\n".join(f"- {kind.capitalize()}: {text}." for kind, text in _parts(what, report).items()),
        _stages(what),
    ]
    if any(r.kind == "tune" for r in records):
        lines += ["Tuned, and what was tried:", _tuned(records, what)]
    if any(r.kind == "search" for r in records):
        lines += [
            "The search, one training each, on validation images, the eigenvalue on training images"
            f" ({cells.NONE}: not trained, or diverged):",
            _every(records, what),
        ]
    if records:
        there = {kind: sum(r.kind == kind for r in records) for kind in _KINDS}
        told = ", ".join(f"{count} {_KINDS[kind]}" for kind, count in there.items() if count)
        machines = sorted({", ".join(f"{k} {v}" for k, v in r.machine.items()) for r in records})
        lines.append(f"{len(records)} trainings: {told}. Machine: {'; '.join(machines)}.")
    return "\n\n".join(lines)


def pairs(records: Sequence[Record], what: Search) -> str:
    """The best pairs of the search by goal."""
    rows = []
    for goal in GOALS.values():
        metric = goal.chosen[1]
        found = [
            f"{' + '.join(p.names)}: {cells.value(metric, p.mean)} ({cells.difference(metric, p.together)})"
            for p in answers.pairs(records, goal, what)
        ]
        rows.append([goal.title, *found, *[cells.NONE] * (3 - len(found))])
    return cells.table(["goal", "quantizer and optimizer", "quantizer and loss", "optimizer and loss"], rows)


def _parts(what: Search, report: str) -> dict[str, str]:
    names = {"quantizer": what.quantizers, "optimizer": what.optimizers, "loss": what.losses}

    def words(part: Part) -> str:
        text = part.words if part.method is None else f"[{part.words}]({report}#{part.method})"
        return text + (f", {part.passes} passes" if part.passes > 1 else "")

    return {kind: ", ".join(f"`{n}` ({words(KINDS[kind][n])})" for n in names[kind]) for kind in KINDS}


def _stages(what: Search) -> str:
    conditions = "; ".join(f"*{name}*, {training.CONDITIONS[name].words}" for name in what.conditions)
    count = sum(len(what.combinations(c)) for c in what.conditions)
    few = [
        f"`{name}` for {' and '.join(part.tried)} alone"
        for table in KINDS.values()
        for name, part in table.items()
        if set(what.conditions) - set(part.tried)
    ]
    elsewhere = [
        f"`{name}` for *{part.tuned_on[0]}*"
        for name, part in {**OPTIMIZERS, **LOSSES}.items()
        if part.tuned_on[0] != "clean"
    ]
    return f"""\
1. *Tuning.* Each optimizer takes the best of its points with `lsq` and `none`, then each loss the best of its own with
   `lsq` and `sgd`: one training a point, on validation images, {", ".join(elsewhere)}; the others for *clean*. The
   values are the same in all conditions.
2. *Search.* Every combination is trained once for each of: {conditions}; {", ".join(few)}. These are {count} trainings,
   measured on validation images, the eigenvalue on training images.
3. *Runs.* For each goal the best two, the baseline, and the changed parts of the first alone, with {what.seeds} seeds
   that neither of the above has seen, on test images. What is said of gains comes from these alone.
4. *Profile.* {what.rounds} rounds of short trainings of all of them in turns, for the time of a step."""


def _tuned(records: Sequence[Record], what: Search) -> str:
    """The values of each part, beside those that were tried."""
    rows = []
    for name, at in search.tuned(records, what).items():
        points = {**OPTIMIZERS, **LOSSES}[name].points
        for value, chosen in at.items():
            tried = sorted({point[value] for point in points})
            rows.append(
                [name, value, f"{chosen:g}", ", ".join(f"{number:g}" for number in tried), _lines(records, name)]
            )
    return cells.table(["part", "value", "chosen", "tried", "rows"], rows)


def _lines(records: Sequence[Record], name: str) -> str:
    """The lines with the trainings that tuned a part, all else as in the baseline."""
    alone = dataclasses.replace(BASELINE, **{"optimizer" if name in OPTIMIZERS else "loss": name})
    return cells.rows(records, "tune", {r.arm for r in records if search.combination(r.arm) == alone})


def _every(records: Sequence[Record], what: Search) -> str:
    """Every combination of the search by what ranks."""
    titles = {goal.chosen: goal.title for goal in reversed(GOALS.values())}
    columns = list(dict.fromkeys(goal.chosen for goal in GOALS.values()))
    values = {r.arm: r.metrics for r in records if r.kind == "search"}
    every = dict.fromkeys(c for condition in what.conditions for c in what.combinations(condition))
    rows = []
    for combination in sorted(every, key=lambda c: [list(table).index(getattr(c, k)) for k, table in KINDS.items()]):
        found = (
            cells.value(metric, values.get(key(condition, combination), {}).get(metric, math.nan))
            for condition, metric in columns
        )
        lines = cells.rows(records, "search", {key(condition, combination) for condition in what.conditions})
        rows.append([str(combination), str(combination.passes), *found, lines])
    return cells.table(["combination", "passes a step", *(titles[column] for column in columns), "rows"], rows)

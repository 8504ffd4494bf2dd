# SPDX-License-Identifier: Apache-2.0
"""The user's guide to the methods as a Markdown page with a figure for each goal, drawn from the runs of the search."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fastflat.cli import _guide_cells as cells
from fastflat.cli import _guide_search
from fastflat.cli._methods_markdown import FIGURES
from fastflat.methods import Figure
from fastflat.methods.lab import verdict
from fastflat.methods.lab.goals import answers, search
from fastflat.methods.lab.goals.answers import Gain
from fastflat.methods.lab.goals.catalogue import GOALS, Goal
from fastflat.methods.lab.goals.parts import BASELINE, Combination
from fastflat.methods.lab.goals.search import Search, key
from fastflat.methods.lab.records import Record

_REPORT = "methods-report.md"
_INTRODUCTION = f"""\
# Which method for which goal

Drawn by `fastflat methods guide`; do not edit. One low-bit network, goal by goal: which quantizer, optimizer and loss
are worth their cost, and which go well together. What each paper claims, and whether that shows in an experiment of its
own: [the report]({_REPORT}). How the methods are used: [Published methods](methods.md).
"""
_SHORT = """\
## In short

Gains over the baseline (LSQ, SGD, cross-entropy) at equal passes on test images, in points of accuracy, of the
eigenvalue as it is: mean ± standard error of the differences between runs of one seed; bold beyond two standard errors.
What the runs do not speak for is not here, even if it was best in the search. A step costs so many times the
baseline's.
"""
_ROWS = """\
*Rows*, here and below, are the lines of {source} that hold the trainings behind the numbers.
"""
_PAIRS = """\
## What works well together

The best combination of each goal in the search beside its changed parts alone: runs of the same seeds on test images,
for the condition that chose it. *Together*: it gains beyond two standard errors over every one of its parts in
some reading.
"""
_SEARCHED = """\
Pairs in the search, one training each, so weaker evidence: of each two kinds the pair with the best mean over the third
on validation images (of the eigenvalue: training images), and in brackets how far that is from what the two parts give
on their own, the interaction.
"""
_TOGETHER = """\
## Together in your own loop

The quantizer's method comes first, since it may add parameters, then the optimizer; the loss is called in the closure:

```python
import torch
import fastflat as ff

model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 32), torch.nn.Linear(32, 3))
model = ff.prepare(model, weights=ff.QuantSpec.lsq(bits=3, axis=0), skip=("0", "3"))
tempering = ff.methods.NoiseTempering(model, steps=3)
groups = ff.param_groups(model, lr=0.1, scale_lr=0.01, weight_decay=5e-4)
opt = ff.methods.SAM(groups, momentum=0.9, rho=0.05, model=model)
objective = ff.methods.DiGN(model, K=1)
for _ in range(3):
    x, y = torch.randn(16, 8), torch.randint(3, (16,))

    def closure():
        opt.zero_grad()
        loss, scores = objective(x, y)
        loss.backward()
        return loss

    opt.step(closure)
    tempering.step()
```
"""
_CANNOT = """\
## What this cannot say

One small network, one data set, few passes: what takes several passes a step makes few steps here, and the order may be
another one for your network. Standard errors are over seeds; that the test images are a sample, too, comes on top. With
three seeds a difference that is none exceeds two of its standard errors upwards about once in eleven times, so that of
many gains some are chance; a gain in all readings of a goal says more than one. `fastflat methods goals` repeats the
search on your machine, `fastflat train --method NAME` takes a method to your data.
"""


def page(records: Sequence[Record], what: Search, source: str = "the file of runs") -> tuple[str, dict[str, str]]:
    """The page, and its figures as SVG by file name. Of a search that is not finished it says how far it is.

    Args:
        records: in the order of their file.
        what: was searched.
        source: the file's name.
    """
    whole, sections, figures = search.whole(records, what), [], {}
    for name, goal in GOALS.items():
        shown = [c for c in search.finalists(records, goal, what) if _ran(records, goal, c)] if whole else []
        if len(shown) > 1:
            figures[f"goal-{name}.svg"] = _figure(records, name, goal, shown)
        sections.append(_section(records, name, goal, what, shown))
    few = "**Few seeds: this shows that it works, and proves nothing.**"
    parts = [
        _INTRODUCTION + (f"\n{few}" if what.seeds < verdict.LEAST_SEEDS else ""),
        *(_answers(records, what, source) if whole else [_unfinished(records, what)]),
        *sections,
        _TOGETHER,
        _guide_search.section(records, what, _REPORT),
        _CANNOT,
    ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n", figures


def _ran(records: Sequence[Record], goal: Goal, combination: Combination) -> bool:
    arms = {key(r.condition, combination) for r in goal.readings}
    return any(r.kind == "run" and r.arm in arms for r in records)


def _unfinished(records: Sequence[Record], what: Search) -> str:
    done = sum(r.kind in ("tune", "search") for r in records)
    state = f"The search is not finished: {done} of {search.size(what)} trainings ran" if done else "Nothing ran yet"
    return (
        f"**{state}**, so that this page has no answer. `fastflat methods goals` runs it, and goes on where it stopped."
    )


def _answers(records: Sequence[Record], what: Search, source: str) -> list[str]:
    """What to take for which goal, and what works well together."""
    short, together = [], []
    for goal in GOALS.values():
        link = f"[{goal.title}](#{goal.title.lower().replace(' ', '-')})"
        found = answers.recommended(records, goal, what)
        if found in (None, BASELINE):
            words = ["too few runs", cells.NONE] if found is None else ["the baseline", "1.00 x"]
            short.append([link, words[0], cells.NONE, words[1], cells.runs_of(records, goal, BASELINE)])
        else:
            gains = [g for g in answers.gains(records, goal, found) if g.seeds]
            lines = cells.runs_of(records, goal, BASELINE, found)
            short.append([link, str(found), cells.gains(gains), cells.cost(records, found), lines])
        for best in search.ranking(records, goal, what)[:1]:
            rows = answers.beyond_parts(records, goal, best)
            over = "; ".join(f"{cells.changed(alone)}: {cells.gains(found)}" for alone, found in rows) or cells.NONE
            lines = cells.runs_of(records, goal, best, *(alone for alone, _ in rows))
            together.append([goal.title, str(best), over, _together(rows), lines])
    return [
        _SHORT,
        cells.table(["goal", "take", "gain over the baseline", "a step costs", "rows"], short),
        _ROWS.format(source=source),
        _PAIRS,
        cells.table(["goal", "best combination", "gain over each part alone", "answer", "rows"], together),
        _SEARCHED,
        _guide_search.pairs(records, what),
    ]


def _together(rows: Sequence[tuple[Combination, list[Gain]]]) -> str:
    if not rows:
        return "one part only"
    if any(g.answer == "open" for _, found in rows for g in found):
        return "too few runs"
    if set.intersection(*({g.reading.label for g in found if g.answer == "more"} for _, found in rows)):
        return "together"
    enough = [cells.changed(alone) for alone, found in rows if not any(g.answer == "more" for g in found)]
    return f"no more than {' or '.join(enough)} alone" if enough else "in no reading more than all"


def _section(records: Sequence[Record], name: str, goal: Goal, what: Search, shown: Sequence[Combination]) -> str:
    """A goal: an answer that follows from the numbers, the numbers, who claims it."""
    lines = [f"## {goal.title}"]
    if shown:
        lines += [_advice(records, goal, what), cells.results(records, goal, shown)]
    claims = ", ".join(f"[{method}]({_REPORT}#{method})" for method in goal.methods)
    lines.append(f"{goal.limits} Methods that aim at it: {claims}.".strip())
    if len(shown) > 1:
        told = (
            ", ".join(map(str, shown))
            if goal.most_passes is None
            else "all that was run, the time of a step over the baseline's beside it"
        )
        lines.append(f"![{goal.title}: {told}]({FIGURES}/goal-{name}.svg)")
    return "\n\n".join(lines)


def _advice(records: Sequence[Record], goal: Goal, what: Search) -> str:
    best = search.ranking(records, goal, what)[: search.BEST]
    order = f"Best in the search: {', then '.join(map(str, best))}."
    found = answers.recommended(records, goal, what)
    if found is None:
        return f"{order} There are too few runs for an answer."
    if found == BASELINE:
        return (
            f"{order} **Stay with the baseline**: neither gains beyond two standard errors in some reading without"
            " losing in another."
        )
    at = search.point(found, search.tuned(records, what))
    values = ", ".join(f"{name} {value:g}" for name, value in at.items())
    why = "it gains beyond two standard errors and loses in no reading"
    if found not in best:
        why = f"{why}, and {best[0]} does not exceed it"
    elif found != best[0]:
        why = f"{why}, which {best[0]} does not"
    return f"{order} **Take {found}** ({values}): {why}."


def _figure(records: Sequence[Record], name: str, goal: Goal, shown: Sequence[Combination]) -> str:
    from fastflat.cli import _figures

    if goal.most_passes is not None:
        return _figures.dots(f"goal-{name}", _by_cost(records, goal), "test accuracy")
    arms = {str(c): c for c in shown}
    readings = {str(i): reading for i, reading in enumerate(goal.readings)}
    kind, measured = "lines" if len(readings) > 2 else "dots", "test accuracy"
    if goal.direction == "lower":
        measured = goal.readings[0].label
    figure = Figure(kind, tuple(readings), tuple(r.label for r in goal.readings), goal.axis, measured)

    def spread(arm: str, metric: str) -> tuple[float, float]:
        reading = readings[metric]
        runs = verdict.values(records, key(reading.condition, arms[arm]), reading.metric)
        return verdict.spread(list(runs.values()))

    return _figures.arms(f"goal-{name}", figure, list(arms), spread)


def _by_cost(records: Sequence[Record], goal: Goal) -> dict[str, tuple[float, float]]:
    """Mean and deviation of all that was run for a goal's only reading, also for other goals, the cheapest first."""
    (reading,) = goal.readings
    arms = dict.fromkeys(r.arm for r in records if r.kind == "run" and r.arm.startswith(f"{reading.condition}: "))
    rows = []
    for arm in arms:
        combination = search.combination(arm)
        spread = verdict.spread(list(verdict.values(records, arm, reading.metric).values()))
        if math.isfinite(spread[0]):
            rows.append((answers.cost(records, combination), combination, spread))
    rows.sort(key=lambda row: (not math.isfinite(row[0]), row[0], row[1].passes))
    return {f"{combination}, {cells.cost(records, combination)}": spread for _, combination, spread in rows}

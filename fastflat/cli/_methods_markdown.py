# SPDX-License-Identifier: Apache-2.0
"""The report of ``fastflat methods`` as Markdown: a page with its figures, and a short table for another page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from fastflat.cli._methods_report import ANSWERS, Entry, chosen, cost, machines, sentences
from fastflat.methods.lab import study

#: Between these a page has the short table.
MARKS = ("<!-- methods: start -->\n", "<!-- methods: end -->")
#: Folder of the figures beside the page.
FIGURES = "figures"

_INTRODUCTION = """\
# What the papers claim and what showed here

Drawn by `fastflat methods report`; do not edit. Each paper's claim, put to a test that two processor cores can run:
real data, small networks, all arms with equal budgets of forward-backward passes and equal tuning ([how an experiment
decides](methods.md#how-an-experiment-decides)). What does not show at this size may show at the paper's. Mean ±
standard deviation over seeds. Every training is a line of the file that the method names, in the folder of runs: of the
project's own page `benchmarks/results/methods`.
"""


def answer(entry: Entry) -> str:
    """The verdict, with how many claims hold where it is between."""
    if not entry.records:
        return "not run yet"
    found = entry.findings
    words = ANSWERS[entry.verdict]
    if entry.verdict in ("partly", "not"):
        words += f": {sum(bool(f.holds) for f in found)} of {len(found)} claims"
    return words + (" (quick settings)" if entry.quick else "")


def table(entries: Sequence[Entry], page: str = "") -> str:
    """A line for each method: paper, answer, cost of its step. ``page``: where the sections are."""
    lines = ["| method | paper | claim shown | a step costs |", "|---|---|---|---|"]
    for entry in entries:
        m, costs = entry.method, entry.costs
        name = f"[{m.name}]({page}#{m.name})"
        paper = f"{_cell(m.title)} ([{m.arxiv}](https://arxiv.org/abs/{m.arxiv}))"
        shown = ", ".join(f"{_cell(c.arm)} {c.measured:.2f} x ({c.passes:.2g} x)" for c in costs) or "-"
        lines.append(f"| {name} | {paper} | {answer(entry)} | {shown} |")
    return "\n".join(lines) + "\n"


def inserted(text: str, entries: Sequence[Entry], page: str) -> str:
    """A page with the short table between its marks. Raises ValueError where it has none."""
    start, end = MARKS
    if start not in text or end not in text.split(start, 1)[1]:
        raise ValueError(f"methods: the page must hold the lines {start.strip()} and {end}, got a page without")
    before, rest = text.split(start, 1)
    return f"{before}{start}{table(entries, page)}{end}{rest.split(end, 1)[1]}"


def page(entries: Sequence[Entry]) -> tuple[str, dict[str, str]]:
    """The page, and its figures as SVG by file name."""
    from fastflat.cli import _figures

    parts, figures = [_INTRODUCTION, table(entries)], {}
    for entry in entries:
        m = entry.method
        paper = f"{m.authors}, {m.year}, [{m.title}](https://arxiv.org/abs/{m.arxiv})."
        head = [f"## {m.name}", f"{paper} Kernels: {', '.join(m.kernels)}.", f"**Claim.** {m.claim}"]
        if not entry.records:
            parts += [*head, f"**Not run yet.** {m.experiment.summary} `fastflat methods run {m.name}` runs it."]
            continue
        experiment, arms = m.experiment, [arm.name for arm in m.experiment.arms]
        figures[f"{m.name}.svg"] = _figures.arms(m.name, experiment.figure, arms, entry.spread)
        rows = [f"| {' | '.join(['arm', *map(_metric, entry.metrics)])} |", "|" + "---|" * (1 + len(entry.metrics))]
        rows += [f"| {' | '.join([_cell(a), *(entry.cell(a, metric) for metric in entry.metrics)])} |" for a in arms]
        parts += [
            *head,
            f"**Experiment.** {experiment.summary}{' Quick settings, which prove nothing.' if entry.quick else ''}",
            "\n".join(rows),
            "\n".join(f"- {_cell(line)}" for line in [*sentences(entry.findings), *chosen(entry), *cost(entry)]),
            f"**Answer: {answer(entry)}.** {experiment.tried}".strip(),
            f"![{m.name}: {experiment.figure.ylabel or ', '.join(experiment.figure.metrics)}]({FIGURES}/{m.name}.svg)",
            f"Runs: `{study.file(Path(), m.name, entry.quick).name}`. Machine: {'; '.join(machines(entry))}.",
        ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n", figures


def _cell(text: str) -> str:
    """Text that a table and a list take as it is."""
    return re.sub(r"([|<>*`\\[\]])", r"\\\1", text)


def _metric(name: str) -> str:
    return name.replace("_", " ")

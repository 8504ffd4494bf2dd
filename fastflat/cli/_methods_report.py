# SPDX-License-Identifier: Apache-2.0
"""The report of ``fastflat methods``: an HTML page, and the JSON it is drawn from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastflat import methods as registry
from fastflat.methods import Claim, Method
from fastflat.methods.lab import study, verdict

_TEMPLATE = Path(__file__).with_name("methods.html.jinja")
#: What a verdict says.
ANSWERS = {"reproduced": "reproduced", "partly": "partly reproduced", "not": "not reproduced", "open": "too few runs"}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A method with its runs.

    Attributes:
        method: the method.
        records: its runs; those of the quick settings where there are no others.
        quick: whether they are.
        profile: timed steps of all arms, where there are any.
    """

    method: Method
    records: list[study.Record]
    quick: bool
    profile: list[study.Record] = dataclasses.field(default_factory=list)

    @property
    def findings(self) -> list[verdict.Finding]:
        return verdict.findings(self.records, self.method.experiment)

    @property
    def verdict(self) -> str:
        return verdict.verdict(self.findings)

    @property
    def costs(self) -> list[verdict.Cost]:
        return verdict.costs(self.profile, self.method.experiment) if self.profile else []

    @property
    def metrics(self) -> list[str]:
        """Those of the claims, then those of the figure."""
        experiment = self.method.experiment
        return list(dict.fromkeys([*(c.metric for c in experiment.claims), *experiment.figure.metrics]))

    def spread(self, arm: str, metric: str) -> tuple[float, float]:
        """Mean and deviation over the seeds."""
        return verdict.spread(list(verdict.values(self.records, arm, metric).values()))

    def cell(self, arm: str, metric: str) -> str:
        mean, deviation = self.spread(arm, metric)
        if math.isnan(mean):
            return "–"
        if "accuracy" in metric:
            return f"{100 * mean:.2f} ± {100 * deviation:.2f} %"
        return f"{mean:.4g} ± {deviation:.2g}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values; null for what is not finite."""
        m, arms = self.method, [arm.name for arm in self.method.experiment.arms]
        return {
            "name": m.name,
            "number": m.number,
            "title": m.title,
            "arxiv": m.arxiv,
            "claim": m.claim,
            "tried": m.experiment.tried,
            "kernels": list(m.kernels),
            "quick": self.quick,
            "verdict": self.verdict if self.records else None,
            "measured": {
                arm: {metric: list(map(_plain, self.spread(arm, metric))) for metric in self.metrics} for arm in arms
            },
            "findings": [_plain_dict(f) for f in self.findings],
            "costs": [_plain_dict(c) for c in self.costs],
            "runs": [_plain_dict(r) for r in self.records],
        }


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain_dict(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {k: _plain_dict(v) for k, v in value.items()}
    return _plain(value)


def entries(folder: Path) -> list[Entry]:
    """All methods with what the folder holds of them."""
    found = []
    for method in registry.methods():
        records = study.runs(method, study.file(folder, method.name, quick=False))
        quick = not records
        if quick:
            records = study.runs(method, study.file(folder, method.name, quick=True))
        found.append(Entry(method, records, quick, study.read(study.profile_file(folder, method.name))))
    return found


def words(claim: Claim) -> str:
    """A claim as a sentence."""
    margin = ""
    if claim.margin:
        margin = f" by more than {claim.margin:g}" if claim.margin > 0 else f", or worse by less than {-claim.margin:g}"
    return f"{claim.metric} of {claim.arm} is {claim.direction} than of {claim.baseline}{margin}"


def sentences(findings: Sequence[verdict.Finding]) -> list[str]:
    """What the runs say of each claim."""
    answers = {True: "holds", False: "does not hold", None: "open"}
    return [
        f"{words(f.claim)}: {answers[f.holds]}, by {f.difference:.4g} with a standard error of {f.error:.2g} over"
        f" {f.seeds} seed{'s' if f.seeds != 1 else ''}"
        for f in findings
    ]


def chosen(entry: Entry) -> list[str]:
    """The point that each arm took, and a warning where a largest or smallest value was the best."""
    points = {r.arm: r.choice for r in entry.records if r.kind == "run"}
    tuned = {arm: [r for r in entry.records if r.kind == "tune" and r.arm == arm] for arm in points}
    if not any(tuned.values()):
        return []
    words = {arm: ", ".join(f"{name} {value:g}" for name, value in point.items()) for arm, point in points.items()}
    ends = [arm for arm, tried in tuned.items() if tried and study.further(entry.method.experiment, tried)]
    lines = ["chosen on validation examples: " + "; ".join(f"{arm}: {text}" for arm, text in words.items())]
    if ends:
        lines.append(f"at an end of what was tried, so that more may change the answer: {', '.join(ends)}")
    return lines


def cost(entry: Entry) -> list[str]:
    """The step of each arm beside the first's."""
    base = entry.method.experiment.arms[0].name
    return [f"{c.arm}: {c.measured:.2f} x a step of {base}; its passes: {c.passes:.2g} x" for c in entry.costs]


def html(entries: Sequence[Entry]) -> str:
    """The page. Everything that is not our own SVG is escaped."""
    import jinja2

    from fastflat.cli import _figures

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    shown = []
    for entry in entries:
        experiment = entry.method.experiment
        arms = [arm.name for arm in experiment.arms]
        figure = _figures.arms(entry.method.name, experiment.figure, arms, entry.spread) if entry.records else ""
        shown.append({
            "m": entry.method,
            "ran": bool(entry.records),
            "quick": entry.quick,
            "answer": ANSWERS[entry.verdict],
            "sentences": [*sentences(entry.findings), *chosen(entry)] if entry.records else [],
            "table": [(arm, [entry.cell(arm, metric) for metric in entry.metrics]) for arm in arms],
            "metrics": entry.metrics,
            "cost": cost(entry),
            "machines": machines(entry),
            "figure": figure,
        })  # fmt: skip
    text = _TEMPLATE.read_text(encoding="utf-8")
    return environment.from_string(text).render(entries=shown, errors=verdict.ERRORS, least=verdict.LEAST_SEEDS)


def machines(entry: Entry) -> list[str]:
    """Where an entry's runs ran, each once."""
    return sorted({", ".join(f"{k} {v}" for k, v in record.machine.items()) for record in entry.records})

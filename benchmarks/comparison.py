# SPDX-License-Identifier: Apache-2.0
"""Two records row by row: the ratio of their medians, whether the quartiles overlap, what only one of them has, and how
their machines differ."""

from __future__ import annotations

import dataclasses
from typing import Any

from . import report

#: Fields that say what was measured; rows of two records that agree in all of them are compared.
KEY = (
    *("family", "what", "device", "threads", "dtype", "granularity", "passes", "elements"),
    *("network", "mode", "quantized", "k", "batch", "bits", "optimizer", "peer"),
)
#: Fields of the machine that move numbers.
MACHINE = ("cpu", "gpu", "cores", "isa", "torch_isa", "system", "python", "torch", "cuda", "driver", "compiler",
           "fastflat", "commit", "backend")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Pair:
    """A row of both records; ``ratio`` is the new median over the old, ``in_copies`` the same with each in copies of
    its own run (None where the rows have none)."""

    key: tuple
    old: dict[str, Any]
    new: dict[str, Any]

    @property
    def ratio(self) -> float:
        return self.new["seconds"] / self.old["seconds"]

    @property
    def in_copies(self) -> float | None:
        old, new = self.old.get("copies"), self.new.get("copies")
        return new / old if old and new else None

    @property
    def overlap(self) -> bool:
        """Whether the spans between first and third quartile meet."""
        return self.new["q1"] <= self.old["q3"] and self.old["q1"] <= self.new["q3"]

    @property
    def verdict(self) -> str:
        if self.overlap:
            return "quartiles overlap"
        return "faster" if self.ratio < 1 else "slower"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Rows of both, names of those that only one has (timed there), and what differs: field, old, new."""

    pairs: list[Pair]
    only_old: list[str]
    only_new: list[str]
    machines: list[tuple[str, Any, Any]]


def compare(old: dict[str, Any], new: dict[str, Any]) -> Comparison:
    """Rows in the order of the new record."""
    before, after = _timed(old), _timed(new)
    pairs = [Pair(key, before[key], row) for key, row in after.items() if key in before]
    facts = old["machine"], new["machine"]
    machines = [(f, facts[0].get(f), facts[1].get(f)) for f in MACHINE if facts[0].get(f) != facts[1].get(f)]
    for field in ("allocator", "effort"):
        if old.get(field) != new.get(field):
            machines.append((field, old.get(field), new.get(field)))
    return Comparison(
        pairs, [name(key) for key in before if key not in after], [name(key) for key in after if key not in before],
        machines,
    )  # fmt: skip


def name(key: tuple) -> str:
    """A key in words."""
    fields = dict(zip(KEY, key, strict=True))
    words = [str(fields[f]) for f in ("family", "what", "device", "network", "mode") if fields[f] is not None]
    words += [report.elements(fields["elements"])] if fields["elements"] else []
    words += [str(fields[f]) for f in ("dtype", "granularity", "passes", "optimizer") if fields[f] is not None]
    words += ["4 bits"] if fields["quantized"] else []
    words += [f"{f} {fields[f]}" for f in ("batch", "k", "threads") if fields[f] is not None]
    return " ".join([*words, str(fields["peer"] or "")]).strip()


def table(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the pairs."""
    head = ["measured in both", "old", "new", "new / old", "in copies", ""]
    lines = []
    for pair in found.pairs:
        copies = "-" if pair.in_copies is None else f"{pair.in_copies:.2f}"
        times = [report.seconds(row["seconds"]) for row in (pair.old, pair.new)]
        lines.append([name(pair.key), *times, f"{pair.ratio:.2f}", copies, pair.verdict])
    return head, lines


def notes(found: Comparison, most: int = 8) -> list[str]:
    """What the table does not show, a line each."""
    words = [pair.verdict for pair in found.pairs]
    counts = ", ".join(f"{words.count(w)} {w}" for w in ("faster", "slower", "quartiles overlap") if w in words)
    lines = [f"{len(found.pairs)} rows in both: {counts}"]
    for label, names in (("old", found.only_old), ("new", found.only_new)):
        if names:
            more = f", and {len(names) - most} more" if len(names) > most else ""
            lines.append(f"only in {label} ({len(names)}): {'; '.join(names[:most])}{more}")
    lines += [f"{field} differs: {old} -> {new}" for field, old, new in found.machines]
    if any(field in ("cpu", "gpu", "cores", "isa") for field, _, _ in found.machines):
        lines.append("other machines: of the two ratios, that in copies of each run's own memory says more")
    return lines


def _timed(record: dict[str, Any]) -> dict[tuple, dict[str, Any]]:
    rows = [*record.get("roofline", ()), *record["rows"]]
    default = {"device": record.get("device"), "family": _family(record)}
    default |= {"network": record["model"], "mode": "eager", "optimizer": "sgd"} if "model" in record else {}
    default |= {field: record[field] for field in ("batch", "bits") if field in record}
    return {
        tuple({**default, **row}.get(field) for field in KEY): row
        for row in rows
        if all(isinstance(row.get(field), (int, float)) for field in ("seconds", "q1", "q3"))
    }


def _family(record: dict[str, Any]) -> str | None:
    """Rows of the first training steps name no family."""
    return "step" if record.get("benchmark") == "step" else None

# SPDX-License-Identifier: Apache-2.0
"""A record as one HTML file that needs nothing else: figures to hover over, tables to sort, the machine at the top."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import audited, machine, plots, report, sections

_TEMPLATE = Path(__file__).with_name("page.html.jinja")
_NOTES = {
    "roofline": "Copy (c = a), triad (c = a + 0.5 b) and products of square matrices, measured before everything else"
    " in the same run. A kernel cannot be above the roof; small data in caches can.",
    "kernels": "Calls of all peers of a case took turns in one process. A click in the legend hides a peer, a double"
    " click all others.",
    "steps": "One training step: forward, backward and optimizer. fp32: without quantizers, the floor of the others.",
    "audited": "Compiled and audited GPU kernels that this run did not execute. The bound is the longer of two times:"
    " the declared bytes at the bandwidth of the GPU's data sheet, and the declared operations at its rate of fp32. No"
    " measurement.",
}


def html(result: dict[str, Any]) -> str:
    """The page. All text of the record is escaped, names in figures included."""
    import jinja2
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    shown = parts(result)
    for number, part in enumerate(shown):
        for at, figure in enumerate(part["figures"]):
            figure["id"] = f"figure-{number}-{at}"
            figure["data"] = _json(figure.pop("figure"))
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        title=f"fastflat bench {result.get('benchmark', '')}".strip(),
        machines=machines(result),
        warnings=warnings(result),
        parts=shown,
        plotly=get_plotlyjs(),
    )


def write(path: Path, result: dict[str, Any]) -> None:
    """The page as a file."""
    report.write_text(path, html(result))


def machines(result: dict[str, Any]) -> list[str]:
    """A line for each device, and the allocator's."""
    facts = result.get("machines") or {str(result.get("device", "cpu")): result["machine"]}
    lines = [f"{name}: {machine.line(own)}" for name, own in facts.items()]
    return [*lines, f"allocator: {result['allocator']}"] if result.get("allocator") else lines


def warnings(result: dict[str, Any]) -> list[str]:
    """What a reader must know before the numbers."""
    lines = [] if result.get("complete", True) else [f"Incomplete: {result.get('stopped', 'the run was interrupted')}"]
    busy = machine.busy(result["machine"])
    return [*lines, *([busy] if busy else [])]


def parts(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Title, note, figures and tables of each part of the page; parts without rows are left out."""
    rows, roofs, static = result["rows"], result.get("roofline", []), result.get("audited", [])
    places = dict.fromkeys((row["device"], row["threads"]) for row in roofs)
    drawn = [(_place(*place), plots.roofline(roofs, rows, *place)) for place in places]
    found = [_part("Roofline", "roofline", drawn, sections.roofline_table(result))]
    for section in sections.of(result):
        kind = "steps" if section.family in sections.NETWORKS else "kernels"
        figures = [("Samples per second", plots.samples(section.rows))]
        if figures[0][1] is None:
            figures.append(("Time", plots.times(section.rows)))
        figures.append(("Bandwidth by size", plots.sizes(section.rows)))
        figures.append(("Peak memory", plots.memory(section.rows)))
        found.append(_part(section.title, kind, figures, section.table))
    found.append(
        _part(f"GPU kernels: {audited.MARK}", "audited", [("", plots.audited(static))], sections.audited_table(result))
    )
    return [part for part in found if part["lines"]]


def _place(device: str, threads: int) -> str:
    return f"{device}, {threads} thread{'s' if threads > 1 else ''}" if device == "cpu" else device


def _part(title: str, note: str, figures: list[tuple[str, Any]], table: sections.Table) -> dict[str, Any]:
    drawn = [{"title": text, "figure": figure} for text, figure in figures if figure is not None]
    return {"title": title, "note": _NOTES[note], "figures": drawn, "head": table[0], "lines": table[1]}


def _json(figure: Any) -> str:
    """A figure inside a script element, which no text in it can end."""
    text = figure.to_json()
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text

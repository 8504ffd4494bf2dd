# SPDX-License-Identifier: Apache-2.0
"""The page's interactive figures, by plotly: every point says its numbers, a click in the legend hides a peer."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from . import comparison, report

#: Okabe and Ito: told apart by colour-blind readers, on white and on black.
_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2", "#999999", "#B2A300")
_OURS = "#0B84F3"
_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "triangle-down", "x", "star")
#: Pixels of a line of a dot plot, and of its axes and legend.
_LINE, _FRAME = 21, 150


def roofline(measured: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], device: str, threads: int):
    """Arithmetic rate over intensity: the measured roofs, and every kernel under them; None without the roofs."""
    own = [row for row in measured if (row["device"], row["threads"]) == (device, threads)]
    points = [
        row
        for row in rows
        if (row.get("device"), row.get("threads")) == (device, threads) and row.get("operations") and "seconds" in row
    ]
    if not own or not points:
        return None
    graph = _graph()
    intensity = [row["operations"] / row["bytes"] for row in points]
    low, high = min(intensity) / 3, max(max(intensity) * 3, 100)
    figure = graph.Figure()
    memory = max(own, key=lambda row: row["rate"] if row["what"] != "gemm" else 0)
    for row in own:
        if row["what"] != "gemm":
            continue
        knee = row["rate"] / memory["rate"]
        xs = [low, knee, max(high, 3 * knee)] if knee > low else [low, high]
        ys = [min(x * memory["rate"], row["rate"]) for x in xs]
        text = f"{memory['what']} {memory['rate'] / 1e9:.1f} GB/s, GEMM {row['dtype']} {row['rate'] / 1e9:.1f} GFLOP/s"
        figure.add_scatter(
            x=xs, y=ys, mode="lines", name=f"roof, {row['dtype']}", hovertemplate=_safe(text) + "<extra></extra>",
            line={"color": "#888888", "dash": {"fp32": "solid"}.get(row["dtype"], "dash")},
        )  # fmt: skip
    for number, peer in enumerate(_peers(points)):
        mine = [row for row in points if row["peer"] == peer]
        figure.add_scatter(
            x=[row["operations"] / row["bytes"] for row in mine],
            y=[row["operations"] / row["seconds"] for row in mine],
            mode="markers", name=_safe(peer), marker=_marker(peer, number),
            visible=True if number < 3 else "legendonly",
            text=[_safe(label(row, ["threads"])) for row in mine], customdata=[_numbers(row) for row in mine],
            hovertemplate="%{text}<br>%{customdata}<extra>" + _safe(peer) + "</extra>",
        )  # fmt: skip
    plain = "{:g}".format
    rates = [row["operations"] / row["seconds"] for row in points]
    rates += [row["rate"] for row in own if row["what"] == "gemm"]
    figure.update_xaxes(title_text="operations per byte of memory traffic", **_ticks([low, high], plain))
    figure.update_yaxes(title_text="operations per second", **_ticks(rates, _prefixed("")))
    return _finished(figure, 460)


def times(rows: Sequence[dict[str, Any]]):
    """Seconds of a call of each case and peer, the whiskers its quartiles; None without timings."""
    timed = [row for row in rows if "seconds" in row]
    return _dots(timed, "seconds", "time of a call; whiskers: quartiles", report.seconds) if timed else None


def memory(rows: Sequence[dict[str, Any]]):
    """Peak memory of a call of each case and peer; None where it was not measured."""
    shown = [row for row in rows if row.get("peak_bytes")]
    return _dots(shown, "peak_bytes", "memory that a call allocates, at its peak", _prefixed("B")) if shown else None


def _dots(rows: Sequence[dict[str, Any]], field: str, title: str, text: Callable[[float], str]):
    """A line a case, a mark a peer."""
    named = dict(zip(map(id, rows), _labels(rows), strict=True))
    figure = _graph().Figure()
    for number, peer in enumerate(_peers(rows)):
        mine = [row for row in rows if row["peer"] == peer]
        whiskers = {}
        if field == "seconds":
            upper, lower = ([abs(row[q] - row["seconds"]) for row in mine] for q in ("q3", "q1"))
            whiskers = {"error_x": {"array": upper, "arrayminus": lower, "thickness": 1, "width": 3}}
        figure.add_scatter(
            x=[row[field] for row in mine], y=[_safe(named[id(row)]) for row in mine], mode="markers",
            name=_safe(peer), marker=_marker(peer, number), customdata=[_numbers(row) for row in mine],
            hovertemplate="%{y}<br>%{customdata}<extra>" + _safe(peer) + "</extra>", **whiskers,
        )  # fmt: skip
    order = list(dict.fromkeys(map(_safe, named.values())))[::-1]
    fields = ("q1", "q3") if field == "seconds" else (field,)
    figure.update_xaxes(title_text=title, **_ticks([row[f] for row in rows for f in fields], text))
    figure.update_yaxes(categoryorder="array", categoryarray=order, range=[-0.7, len(order) - 0.3])
    return _finished(figure, _FRAME + _LINE * len(order))


def sizes(rows: Sequence[dict[str, Any]]):
    """Bandwidth by size, a choice of case in the menu; None where no case has three sizes."""
    shown = [row for row in rows if row.get("bandwidth") and row.get("elements")]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row, text in zip(shown, _labels(shown, ["elements"]) if shown else (), strict=True):
        groups.setdefault(text or "all", []).append(row)
    groups = {text: own for text, own in groups.items() if len({row["elements"] for row in own}) > 2}
    if not groups:
        return None
    figure, owner = _graph().Figure(), []
    for text, own in groups.items():
        for number, peer in enumerate(_peers(own)):
            mine = sorted((row for row in own if row["peer"] == peer), key=lambda row: row["elements"])
            owner.append(text)
            figure.add_scatter(
                x=[row["elements"] for row in mine], y=[row["bandwidth"] for row in mine], name=_safe(peer),
                mode="lines+markers", marker=_marker(peer, number), visible=text == next(iter(groups)),
                line={"color": _colour(peer, number), "width": 3 if peer == "fastflat" else 1.5},
                customdata=[_numbers(row) for row in mine],
                hovertemplate="%{x} elements<br>%{customdata}<extra>" + _safe(peer) + "</extra>",
            )  # fmt: skip
    buttons = [
        {"label": _safe(text), "method": "update", "args": [{"visible": [other == text for other in owner]}]}
        for text in groups
    ]
    of_groups = [row for own in groups.values() for row in own]
    figure.update_xaxes(title_text="elements", **_powers(row["elements"] for row in of_groups))
    figure.update_yaxes(
        title_text="least traffic per second", **_ticks([row["bandwidth"] for row in of_groups], _prefixed("B/s"))
    )
    figure = _finished(figure, 480)
    figure.update_layout(
        margin={"t": 80}, updatemenus=[{"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.2, "yanchor": "top"}]
    )
    return figure


def _powers(counts: Iterable[int]) -> dict[str, Any]:
    """A logarithmic axis of numbers of elements, marked at the powers of two that were measured."""
    marks = sorted(set(counts))
    return {"type": "log", "tickvals": marks, "ticktext": [report.elements(count) for count in marks]}


def samples(rows: Sequence[dict[str, Any]]):
    """Samples a second of a training step; None without such rows."""
    shown = [row for row in rows if row.get("samples_per_second")]
    return _dots(shown, "samples_per_second", "samples per second, more is better", "{:g}".format) if shown else None


def audited(rows: Sequence[dict[str, Any]]):
    """Bounds of kernels that have not run, by GPU; None without any."""
    if not rows:
        return None
    figure = _graph().Figure()
    text = [f"{row['family']} {row['granularity']} {report.elements(row['elements'])} {row['dtype']}" for row in rows]
    for number, gpu in enumerate(dict.fromkeys(row["gpu"] for row in rows)):
        mine = [(words, row) for words, row in zip(text, rows, strict=True) if row["gpu"] == gpu]
        figure.add_scatter(
            x=[row["bound_seconds"] for _, row in mine], y=[_safe(words) for words, _ in mine], mode="markers",
            name=_safe(gpu), marker={"color": _COLOURS[number % 8], "symbol": "line-ns-open", "size": 12,
                                     "line": {"width": 3}},
            customdata=[report.seconds(row["bound_seconds"]) for _, row in mine],
            hovertemplate="%{y}<br>not below %{customdata}<extra>" + _safe(gpu) + ": audited, not run</extra>",
        )  # fmt: skip
    bounds = [row["bound_seconds"] for row in rows]
    figure.update_xaxes(title_text="static bound, no measurement", **_ticks(bounds, report.seconds))
    order = list(dict.fromkeys(_safe(words) for words in text))[::-1]
    figure.update_yaxes(categoryorder="array", categoryarray=order, range=[-0.7, len(order) - 0.3])
    return _finished(figure, _FRAME + _LINE * len(order))


def label(row: dict[str, Any], without: Iterable[str] = ()) -> str:
    """What a row is of, without its peer, its device and the fields of `without`."""
    fields = {**row, "peer": None, "device": None} | dict.fromkeys(without)
    return comparison.name(tuple(fields.get(field) for field in comparison.KEY))


def _labels(rows: Sequence[dict[str, Any]], without: Iterable[str] = ()) -> list[str]:
    """A label for each row. Fields that all rows agree in are left out: the section's title and table have them."""
    same = [f for f in ("family", "threads", "dtype", "passes", "mode") if len({row.get(f) for row in rows}) == 1]
    return [label(row, (*same, *without)) or label(row, without) for row in rows]


def _ticks(values: Iterable[float], text: Callable[[float], str]) -> dict[str, Any]:
    """A logarithmic axis around the values with marks at 1, 2 and 5 of each decade, or at decades alone."""
    values = list(values)
    low, high = math.log10(min(values)), math.log10(max(values))
    wider = max(0.06 * (high - low), (0.5 - (high - low)) / 2, 0.03)
    low, high = low - wider, high + wider
    steps = (1,) if high - low > 3 else (1, 2, 5) if high - low > 0.8 else (1, 1.5, 2, 3, 4, 5, 6, 8)
    marks = [m * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for m in steps]
    marks = [mark for mark in marks if low <= math.log10(mark) <= high]
    return {"type": "log", "range": [low, high], "tickvals": marks, "ticktext": [text(mark) for mark in marks]}


def _prefixed(unit: str) -> Callable[[float], str]:
    return lambda value: f"{report.engineering(value)}{unit}".strip()


def _numbers(row: dict[str, Any]) -> str:
    """What a row says of itself, for the box beside a point."""
    lines = [report.seconds(row["seconds"])] if "seconds" in row else []
    for field, unit in (
        ("bandwidth", "B/s"),
        ("elements_per_second", "elements/s"),
        ("samples_per_second", "samples/s"),
    ):
        if row.get(field):
            lines.append(f"{report.engineering(row[field])}{unit}")
    if row.get("of_roofline"):
        lines.append(f"{100 * row['of_roofline']:.0f} % of the roofline")
    if row.get("peak_bytes") is not None:
        lines.append(f"peak {report.engineering(row['peak_bytes'])}B")
    if row.get("error"):
        lines.append(f"error {row['error']:.0e}")
    return "<br>".join(_safe(line) for line in lines)


def _peers(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Ours first, the others in the order of the rows."""
    names = dict.fromkeys(row["peer"] for row in rows)
    return sorted(names, key=lambda peer: not peer.startswith("fastflat"))


def _colour(peer: str, number: int) -> str:
    return _OURS if peer == "fastflat" else _COLOURS[number % len(_COLOURS)]


def _marker(peer: str, number: int) -> dict[str, Any]:
    size = 11 if peer == "fastflat" else 8
    at = number + number // len(_COLOURS)  # where the colours begin again, another symbol
    return {"color": _colour(peer, number), "symbol": _SYMBOLS[at % len(_SYMBOLS)], "size": size}


def _safe(text: Any) -> str:
    """Text for plotly, which reads a subset of HTML in names and labels."""
    return html.escape(str(text))


def _graph():
    import plotly.graph_objects

    return plotly.graph_objects


def _finished(figure, height: float):
    figure.update_xaxes(automargin=True, title_standoff=8)
    figure.update_yaxes(automargin=True, title_standoff=8)
    figure.update_layout(
        height=math.ceil(height), margin={"l": 60, "r": 20, "t": 40, "b": 50}, paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)", font={"family": "system-ui, sans-serif", "size": 13}, template="none",
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0}, hoverlabel={"align": "left"},
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": "#888888", "activecolor": _OURS},
    )  # fmt: skip
    return figure

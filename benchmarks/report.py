# SPDX-License-Identifier: Apache-2.0
"""Results as rows of JSON and as a table in the terminal."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

#: Changes when the meaning of a field does.
FORMAT = 1
#: What a record of this format holds, field by field.
SCHEMA = Path(__file__).with_name("schema.json")

#: Fields that name a case: rows that agree in them were measured in turns.
CASE = ("family", "threads", "dtype", "granularity", "passes", "elements")
#: Bytes of an element.
_WIDTHS = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}
#: Column of the others' factor: how many times longer they take than fastflat.
_OURS, _FLOOR = "fastflat", "mul"
#: Whose peak memory the table shows.
_PEAKS = ("fastflat", "eager")


def write(path: Path, result: dict[str, Any]) -> None:
    """A result as a file of the current format."""
    write_text(path, json.dumps({"format": FORMAT, **result}, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write aside and rename: a file of that name is whole or is the old one."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any]:
    """Results of an earlier run. What schema.json asks of them is in docs/benchmarks.md.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        wrong = _wrong(result)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        wrong = "something else"
    if wrong:
        raise ValueError(f"bench: {path} must be results of format {FORMAT}, got {wrong}")
    return result


def _wrong(result: Any) -> str | None:
    """What keeps a value from being results that tables, figures and comparisons can take."""
    if not isinstance(result, dict) or "format" not in result:
        return "something else"
    if result["format"] != FORMAT:
        return f"format {str(result['format'])[:40]}"
    if not isinstance(result.get("machine"), dict) or not _facts(result["machine"]):
        return "results without their machine"
    for field in ("rows", "roofline", "audited"):
        rows = result.get(field, [])
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            return f"{field} that are no list of objects"
        for number, row in enumerate(rows):
            bad = next((f for f in _NUMBERS if f in row and not _positive(row[f])), None)
            if bad is not None:
                return f"{bad} {str(row[bad])[:40]} in row {number} of {field}"
            if field == "rows" and not isinstance(row.get("peer"), str):
                return f"row {number} without its peer"
    return None if isinstance(result.get("rows"), list) else "results without rows"


def _facts(machine: dict[str, Any]) -> bool:
    """Whether the machine's line can be drawn."""
    return {"cpu", "cores", "isa", "torch", "torch_isa", "python", "system", "fastflat", "backend"} <= machine.keys()


#: Times of a row, positive where they are there.
_NUMBERS = ("seconds", "q1", "q3", "best", "copy_seconds", "gradient_seconds", "bound_seconds")


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")


def seconds(value: float) -> str:
    """A time with three digits and its unit."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def engineering(value: float) -> str:
    """Three digits and a prefix, ready for its unit: ``12.3 G``."""
    for prefix, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.3g} "


def elements(count: int) -> str:
    exponent = count.bit_length() - 1
    return f"2^{exponent}" if count == 1 << exponent else str(count)


def cases(rows: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, dict[str, Any]]]]:
    """The rows of each case: what names it, and its rows by peer."""
    found: dict[tuple, dict[str, dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[field] for field in CASE), {})[row["peer"]] = row
    for key, by_peer in found.items():
        yield dict(zip(CASE, key, strict=True)), by_peer


def quantize_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and lines: for each case the copy, fastflat, its share of the copy's bandwidth, its time in floors, by how
    many times each peer takes longer; peak memory in tensors of the data, all of which are in the rows."""
    rows = result["rows"]
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    others = [peer for peer in peers if peer not in (_OURS, _FLOOR)]
    roofs = any("of_roofline" in row for row in rows)
    graphs = any("launched_seconds" in row for row in rows)
    head = ["elements", "type", "scale", "threads", "copy", _OURS, *(["launched"] if graphs else [])]
    head += ["spread", "copies", "of copy bw"]
    head += ["elements/s", "GB/s", *(["of roofline"] if roofs else []), f"x {_FLOOR}"]
    head += [f"vs {peer}" for peer in others]
    peaks = [peer for peer in _PEAKS if peer in peers]
    head += [f"peak {peer}" for peer in peaks]
    lines = []
    for case, by_peer in cases(rows):
        ours = by_peer.get(_OURS, {})
        time = ours.get("seconds")
        line = [elements(case["elements"]), case["dtype"], case["granularity"], str(case["threads"])]
        line.append(seconds(next(iter(by_peer.values()))["copy_seconds"]))
        if time is None:
            line += ["-"] * (6 + roofs + graphs)
        else:
            spread = 100 * (ours["q3"] - ours["q1"]) / time
            line += [seconds(time), *([seconds(launched(ours))] if graphs else [])]
            line += [f"+-{spread / 2:.0f} %", f"{ours['copies']:.2f}"]
            line.append(f"{100 * ours['of_copy_bandwidth']:.0f} %")
            line += [f"{engineering(case['elements'] / time)}".strip(), f"{ours['bandwidth'] / 1e9:.1f}"]
            line += [_percent(ours.get("of_roofline"))] if roofs else []
        line += [ratio(by_peer, _OURS, _FLOOR), *(ratio(by_peer, peer, _OURS) for peer in others)]
        line += [_peak(by_peer, peer) for peer in peaks]
        lines.append(line)
    return head, lines


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def _peak(by_peer: dict[str, dict[str, Any]], peer: str) -> str:
    """Peak memory of a call in tensors of the case's data."""
    row = by_peer.get(peer, {})
    if row.get("peak_bytes") is None:
        return "-"
    return f"{row['peak_bytes'] / (row['elements'] * _WIDTHS[row['dtype']]):.1f}"


def ratio(by_peer: dict[str, dict[str, Any]], of: str, to: str) -> str:
    """How many times longer one peer takes than another: by their ratios to the floor, else by their medians; both as
    launched where a graph holds only one of them."""
    two = [by_peer.get(name, {}) for name in (of, to)]
    if any("seconds" not in row for row in two):
        return "-"
    if len({row.get("timing") for row in two}) > 1:
        a, b = (launched(row) for row in two)
    elif all(row.get("over_floor") is not None for row in two) and len(_timings(by_peer, _FLOOR, of)) == 1:
        a, b = (row["over_floor"] for row in two)
    else:
        a, b = (row["seconds"] for row in two)
    return f"{a / b:.2f}"


def launched(row: dict[str, Any]) -> float:
    """Seconds of a call launched from Python."""
    return row.get("launched_seconds", row["seconds"])


def _timings(by_peer: dict[str, dict[str, Any]], *peers: str) -> set[str | None]:
    """How those peers that were timed were timed."""
    return {by_peer[peer].get("timing") for peer in peers if "seconds" in by_peer.get(peer, {})}


def step_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and lines of a training step: its time, samples a second, peak memory, and what the quantizers add to the
    step without any."""
    head = ["network", "mode", "optimizer", "threads", "quantizers", "step", "spread", "samples/s", "over fp32"]
    floors = any(row.get("of_identity") is not None for row in result["rows"])
    gains = any("speedup" in row for row in result["rows"])
    head += [*(["of identity's"] if floors else []), *(["speed-up", "of the cap"] if gains else []), "peak"]
    lines = []
    for row in result["rows"]:
        batch = row.get("batch", result.get("batch"))
        line = [f"{row.get('network', result.get('model', '-'))}, batch {batch}", row.get("mode", "eager")]
        line += [row.get("optimizer", "sgd"), str(row["threads"]), row["peer"]]
        if "seconds" not in row:
            lines.append([*line, *["-"] * (len(head) - len(line))])
            continue
        spread = 100 * (row["q3"] - row["q1"]) / row["seconds"] / 2
        line += [seconds(row["seconds"]), f"+-{spread:.0f} %"]
        line.append(f"{batch / row['seconds']:.4g}" if batch else "-")
        over, share, peak = row["overhead"], row["of_identity"], row.get("peak_bytes")
        line.append("-" if over is None else f"{100 * over:+.1f} %")
        if floors:
            line.append("-" if share is None else f"{share:.2f} x")
        if gains:
            line += [f"{row['speedup']:.2f} x", f"{100 * row['of_cap']:.0f} %"] if "speedup" in row else ["-", "-"]
        lines.append([*line, "-" if peak is None else f"{engineering(peak)}B"])
    return head, lines


def optimizer_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and lines of optimizers' steps, one a list of parameters and base: the time of each peer in copies of the
    parameters, fastflat's share of the copy's bandwidth, and the most memory that a step allocates, in parameters."""
    rows = result["rows"]
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    head = ["parameters", "type", "list", "threads", "least B/param", "copy", *peers, "of copy bw"]
    roofs = any("of_roofline" in row for row in rows)
    head += ["of roofline"] if roofs else []
    head += [f"peak {peer}" for peer in (_OURS, "stock") if peer in peers]
    lines = []
    for case, by_peer in cases(rows):
        line = [elements(case["elements"]), case["dtype"], case["granularity"], str(case["threads"])]
        moved = next((row["bytes"] / case["elements"] for row in by_peer.values() if "bytes" in row), None)
        line += ["-" if moved is None else f"{moved:.0f}", seconds(next(iter(by_peer.values()))["copy_seconds"])]
        mixed = len(_timings(by_peer, *peers)) > 1  # a graph does not hold them all: each as launched
        for row in (by_peer.get(peer, {}) for peer in peers):
            copies = launched(row) / row["copy_seconds"] if mixed and "seconds" in row else row.get("copies")
            line.append(f"{copies:.2f}" if copies else "-")
        best = [r for p, r in by_peer.items() if p.startswith(_OURS) and r.get("of_copy_bandwidth")]
        line.append(_percent(max((r["of_copy_bandwidth"] for r in best), default=None)))
        line += [_percent(max((r.get("of_roofline", 0) for r in best), default=None))] if roofs else []
        line += [_peak(by_peer, peer) for peer in (_OURS, "stock") if peer in peers]
        lines.append(line)
    return head, lines


def curvature_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and lines of products with curvature matrices: for each case fastflat's seconds of all K vectors, the
    gradients that one vector costs each peer, fastflat's error and its peak memory in those of a gradient."""
    rows = result["rows"]
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    head = ["matrix", "network", "parameters", "K", "threads", "gradient", "our time", *peers, "error", "peak"]
    grouped: dict[tuple, dict[str, dict[str, Any]]] = {}
    for row in rows:
        key = tuple(row[f] for f in ("mode", "network", "quantized", "parameters", "k", "threads"))
        grouped.setdefault(key, {})[row["peer"]] = row
    lines = []
    for (mode, network, quantized, parameters, k, threads), by_peer in grouped.items():
        unit = next(iter(by_peer.values()))["gradient_seconds"]
        ours = by_peer.get(_OURS, {})
        line = [mode, f"{network} {'4 bits' if quantized else 'plain'}", f"{parameters}", f"{k}", f"{threads}"]
        line += [seconds(unit), seconds(ours["seconds"]) if "seconds" in ours else "-"]
        line += [f"{by_peer[p]['gradients']:.2f}" if by_peer.get(p, {}).get("gradients") else "-" for p in peers]
        line.append(f"{ours['error']:.0e}" if "error" in ours else "-")
        peak = ours.get("peak_bytes")
        line.append(f"{peak / max(ours['gradient_peak_bytes'], 1):.1f}" if peak else "-")
        lines.append(line)
    return head, lines


def show(title: str, head: list[str], lines: list[list[str]], notes: list[str], echo: Callable[[str], Any]) -> None:
    """Print a table by rich, as wide as its columns need where the output is no terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", header_style="bold", pad_edge=False, box=SIMPLE_HEAD)
    for number, name in enumerate(head):
        table.add_column(name, justify="left" if number == 0 else "right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    needed = sum(max(len(cell) for cell in column) + 3 for column in zip(head, *lines, strict=True))
    text = io.StringIO()
    Console(file=text, width=max(needed, shutil.get_terminal_size().columns)).print(table)
    echo(text.getvalue().rstrip())
    for note in notes:
        echo(note)

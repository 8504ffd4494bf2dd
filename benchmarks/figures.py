# SPDX-License-Identifier: Apache-2.0
"""README's tables and figure of the quantizer benchmark, drawn from committed results: of fake_quantize over its sizes,
and of the other families at their largest.

python -m fastflat.benchmarks.figures README.md benchmarks/results/{quantize.json,families.json,quantize.svg}
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from . import machine, report

#: Peers in the order and with the words of the table.
WORDS = {
    "mul": "two multiplications",
    "fastflat": "fastflat",
    "compile": "torch.compile",
    "eager": "eager Python",
    "builtin": "PyTorch's builtin",
    "torchao": "torchao",
    "brevitas": "Brevitas",
}


def chosen(result: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, dict[str, Any]]]]:
    """The cases shown: fake_quantize in fp32, forward and backward on one thread, every size and granularity that was
    measured."""
    shown = {"family": "fake_quantize", "dtype": "fp32", "threads": 1, "passes": "both"}
    return [(c, p) for c, p in report.cases(result["rows"]) if c.items() >= shown.items()]


def markdown(result: dict[str, Any]) -> str:
    """Microseconds of a forward and backward pass, and how many times longer the peers take."""
    peers = [p for p in WORDS if any(p in by_peer for _, by_peer in chosen(result))]
    others = [p for p in peers if p != "fastflat"]
    lines = ["| elements | scale | fastflat | " + " | ".join(WORDS[p] for p in others) + " |"]
    lines.append("|" + "---|" * (3 + len(others)))
    for case, by_peer in chosen(result):
        ours = by_peer["fastflat"]["seconds"]
        cells = [report.elements(case["elements"]), case["granularity"], f"{ours * 1e6:.0f} us"]
        for peer in others:
            seconds = by_peer.get(peer, {}).get("seconds")
            cells.append("-" if seconds is None else f"{seconds / ours:.2f} x")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([f"Machine: {machine.line(result['machine'])}.", "", *lines])


#: Peers of the second table. "one by one": fastflat's own calls, composed.
FAMILY_WORDS = {"compile": "torch.compile", "eager": "eager Python", "each": "one by one", "composed": "one by one"}


def families(result: dict[str, Any]) -> str:
    """The largest fp32 case of each kind on one thread: time, in copies too, how many times longer the peers take, and
    the peak memory of a call."""
    shown, largest = {"dtype": "fp32", "threads": 1, "passes": "both"}, {}
    for case, by_peer in report.cases(result["rows"]):
        kind = (case["family"], case["granularity"])
        if case.items() >= shown.items() and case["elements"] >= largest.get(kind, ({"elements": 0},))[0]["elements"]:
            largest[kind] = case, by_peer
    columns = list(dict.fromkeys(FAMILY_WORDS.values()))
    lines = [f"| kernel | kind | elements | fastflat | in copies | {' | '.join(columns)} | peak memory, eager |"]
    lines.append("|" + "---|" * (6 + len(columns)))
    for (family, kind), (case, by_peer) in largest.items():
        ours = by_peer["fastflat"]
        cells = dict.fromkeys(columns, "-")
        for peer, words in FAMILY_WORDS.items():
            if by_peer.get(peer, {}).get("seconds") is not None:
                cells[words] = f"{by_peer[peer]['seconds'] / ours['seconds']:.2f} x"
        peaks = [by_peer.get(peer, {}).get("peak_bytes") for peer in ("fastflat", "eager")]
        memory = ", ".join("-" if peak is None else f"{peak / (4 * case['elements']):.1f} x" for peak in peaks)
        start = [f"`{family}`", kind, report.elements(case["elements"]), f"{ours['seconds'] * 1e3:.2f} ms"]
        lines.append("| " + " | ".join([*start, f"{ours['copies']:.1f}", *cells.values(), memory]) + " |")
    return "\n".join([f"Machine: {machine.line(result['machine'])}.", "", *lines])


def draw(result: dict[str, Any], path: Path) -> None:
    """Time of a forward and backward pass in copies of the tensor, by size, one line for each peer."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "fastflat"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    for peer, words in WORDS.items():
        points = [
            (case["elements"], by_peer[peer]["copies"])
            for case, by_peer in chosen(result)
            if case["granularity"] == "channel" and by_peer.get(peer, {}).get("copies") is not None
        ]
        if points:
            style = {"linewidth": 2.5} if peer == "fastflat" else {"linewidth": 1.2, "linestyle": "--"}
            axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, label=words, **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("elements, fp32, one scale per channel")
    axes.set_ylabel("forward + backward, in copies")
    axes.legend(fontsize=8)
    axes.grid(visible=True, which="both", alpha=0.2)
    part = path.with_name(path.name + ".part")
    figure.savefig(part, format="svg", metadata={"Date": None})
    part.replace(path)


def insert(text: str, name: str, source: str, table: str) -> str:
    """`text` with the table between the two marks of the name."""
    start, end = f"<!-- {name}: drawn from", f"<!-- {name}: end -->"
    before, rest = text.split(start, 1)
    _, after = rest.split(end, 1)
    return f"{before}{start} {source} -->\n{table}\n{end}{after}"


def main(readme: str, quantize: str, others: str, figure: str) -> None:
    target = Path(readme)
    result = report.read(Path(quantize))
    text = insert(target.read_text(), "quantize", quantize, markdown(result))
    text = insert(text, "families", others, families(report.read(Path(others))))
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    part.write_text(text)
    part.replace(target)
    draw(result, Path(figure))


if __name__ == "__main__":
    main(*sys.argv[1:])

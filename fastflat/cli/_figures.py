# SPDX-License-Identifier: Apache-2.0
"""Figures of the report as SVG text."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

from fastflat.methods import Figure
from fastflat.quant import LayerSummary

#: One colour for each run (Okabe and Ito: told apart by colour-blind readers too).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_SETTINGS = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.edgecolor": "#888888",
    "legend.frameon": False,
}
_MOST_LAYERS = 48


def curves(runs: dict[str, list[dict[str, float]]]) -> str:
    """Loss and accuracy by epoch: training dashed, test solid."""
    plt = _pyplot("curves")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    for colour, (label, history) in zip(_cycle(len(runs)), runs.items(), strict=True):
        epochs = [row["epoch"] for row in history]
        mark = "o" if len(epochs) < 30 else None
        left.plot(epochs, [row["train_loss"] for row in history], "--", color=colour, linewidth=1)
        left.plot(epochs, [row["test_loss"] for row in history], color=colour, marker=mark, markersize=3, label=label)
        right.plot(epochs, [100 * row["train_accuracy"] for row in history], "--", color=colour, linewidth=1)
        right.plot(epochs, [100 * row["test_accuracy"] for row in history], color=colour, marker=mark, markersize=3)
    left.set(xlabel="epoch", ylabel="cross-entropy", title="Loss (dashed: training)")
    right.set(xlabel="epoch", ylabel="accuracy in %", title="Accuracy (dashed: training)")
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
    left.legend()
    return _svg(plt, figure)


def times(runs: dict[str, list[dict[str, float]]]) -> str:
    """Seconds per epoch: the bar is the median, the dots are the epochs."""
    plt = _pyplot("times")
    figure, axes = plt.subplots(figsize=(9, 0.5 + 0.45 * len(runs)), layout="constrained")
    for at, (colour, history) in enumerate(zip(_cycle(len(runs)), runs.values(), strict=True)):
        seconds = sorted(row["seconds"] for row in history)
        axes.barh(at, median(seconds), color=colour, height=0.55, alpha=0.85)
        axes.plot(seconds, [at] * len(seconds), ".", color="black", markersize=4)
    axes.set_yticks(range(len(runs)), list(runs))
    axes.invert_yaxis()
    axes.set(xlabel="seconds per epoch")
    axes.grid(axis="y", visible=False)
    return _svg(plt, figure)


def layers(rows: list[LayerSummary], name: str) -> str:
    """Each quantized layer: signal to noise of its weights, and the share of them that is clipped."""
    plt = _pyplot("layers-" + name)
    rows = [row for row in rows if row.snr is not None][:_MOST_LAYERS]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, 0.9 + 0.24 * len(rows)), layout="constrained", sharey=True, gridspec_kw={"wspace": 0.05}
    )
    at = range(len(rows))
    left.barh(at, [row.snr if math.isfinite(row.snr) else 0 for row in rows], color=COLOURS[0], height=0.6)
    right.barh(at, [100 * row.clipped for row in rows], color=COLOURS[1], height=0.6)
    left.set_yticks(at, [f"{row.name}  ({row.weight_bits} bits)" for row in rows])
    left.invert_yaxis()
    left.set(xlabel="signal to quantization noise of the weights, dB")
    most = max(100 * row.clipped for row in rows)
    right.set(xlabel="weights clipped, %", xlim=(0, max(1.05 * most, 0.1)))
    for axes in (left, right):
        axes.grid(axis="y", visible=False)
    return _svg(plt, figure)


def codes(rows: list[LayerSummary], name: str) -> str:
    """Histogram of the codes that the weights of each layer take."""
    plt = _pyplot("codes-" + name)
    rows = [row for row in rows if row.codes is not None][:_MOST_LAYERS]
    columns = min(4, len(rows))
    lines = -(-len(rows) // columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(2.25 * columns, 0.4 + 1.25 * lines), layout="constrained", squeeze=False
    )
    for axes in grid.flat[len(rows) :]:
        axes.set_visible(False)
    for axes, row in zip(grid.flat, rows, strict=False):
        total = max(sum(row.codes), 1)
        at = range(row.lowest, row.lowest + len(row.codes))
        axes.bar(at, [100 * n / total for n in row.codes], width=0.9, color=COLOURS[0])
        axes.set_title(row.name, fontsize=8)
        axes.set_xticks([row.lowest, 0, row.lowest + len(row.codes) - 1])
        axes.tick_params(labelsize=7)
        axes.grid(axis="x", visible=False)
    figure.supxlabel("code", fontsize=8)
    figure.supylabel("weights, %", fontsize=8)
    return _svg(plt, figure)


def arms(name: str, figure: Figure, names: list[str], spread: Callable[[str, str], tuple[float, float]]) -> str:
    """The arms of an experiment over its metrics: mean, and a bar of one standard deviation over the seeds."""
    plt = _pyplot("arms-" + name)
    draw = _lines if figure.kind == "lines" else _panels
    return _svg(plt, draw(plt, figure, names, spread))


def _lines(plt, figure: Figure, names: list[str], spread: Callable):
    """A line for each arm over the metrics."""
    drawn, axes = plt.subplots(figsize=(9, 3), layout="constrained")
    at = range(len(figure.metrics))
    for colour, arm in zip(_cycle(len(names)), names, strict=True):
        mean, deviation = zip(*(spread(arm, metric) for metric in figure.metrics), strict=True)
        axes.errorbar(at, mean, deviation, color=colour, marker="o", markersize=3, capsize=3, label=arm)
    axes.set_xticks(at, figure.labels or figure.metrics)
    axes.set(xlabel=figure.xlabel, ylabel=figure.ylabel)
    axes.grid(axis="x", visible=False)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return drawn


def _panels(plt, figure: Figure, names: list[str], spread: Callable):
    """A panel for each metric, a dot for each arm, a dashed line where the first of them is."""
    size = (9, 0.9 + 0.26 * len(names))
    drawn, panels = plt.subplots(1, len(figure.metrics), figsize=size, layout="constrained", sharey=True, squeeze=False)
    at = range(len(names))
    for axes, metric, title in zip(panels[0], figure.metrics, figure.labels or figure.metrics, strict=True):
        mean, deviation = zip(*(spread(arm, metric) for arm in names), strict=True)
        axes.axvline(mean[0], color="#888888", linewidth=0.8, linestyle="--")
        axes.errorbar(mean, at, xerr=deviation, fmt="o", color=COLOURS[0], markersize=4, capsize=3)
        axes.set_title(title, fontsize=9)
        axes.set(xlabel=figure.ylabel)
    panels[0][0].set_yticks(at, names)
    panels[0][0].invert_yaxis()
    return drawn


def dots(name: str, rows: dict[str, tuple[float, float]], xlabel: str) -> str:
    """A line for each label with its mean and a bar of one deviation."""
    plt = _pyplot("dots-" + name)
    drawn, axes = plt.subplots(figsize=(9, 0.7 + 0.26 * len(rows)), layout="constrained")
    mean, deviation = zip(*rows.values(), strict=True)
    axes.errorbar(mean, range(len(rows)), xerr=deviation, fmt="o", color=COLOURS[0], markersize=4, capsize=3)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set(xlabel=xlabel)
    return _svg(plt, drawn)


def median(values: list[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _cycle(n: int) -> list[str]:
    return [COLOURS[k % len(COLOURS)] for k in range(n)]


def _pyplot(salt: str):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(_SETTINGS)
    # Element ids come from this: the same figure gives the same bytes, and two figures of a page do not share ids.
    plt.rcParams["svg.hashsalt"] = salt
    return plt


def _svg(plt, figure) -> str:
    text = io.StringIO()
    empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(text, format="svg", metadata=empty)
    plt.close(figure)
    svg = text.getvalue()
    return svg[svg.index("<svg") :]

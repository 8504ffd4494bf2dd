# SPDX-License-Identifier: Apache-2.0
"""Figures of the reports about curvature as SVG text."""

from __future__ import annotations

from typing import Any

from fastflat.cli._figures import COLOURS, _cycle, _pyplot, _svg


def _style(at: int) -> str:
    """Of a line by its number: where the colours begin again, another."""
    return ("-", "--", ":")[at // len(COLOURS) % 3]


def sensitivity(layers: list[dict[str, Any]]) -> str:
    """Score of each layer by width, crosses where it was measured, rings at the chosen ones; trace per weight of each
    layer with its error."""
    plt = _pyplot("sensitivity")
    figure, (left, right) = plt.subplots(
        1,
        2,
        figsize=(9, max(3.2, 0.9 + 0.24 * len(layers))),
        layout="constrained",
        gridspec_kw={"width_ratios": (3, 2)},
    )
    for at, (colour, row) in enumerate(zip(_cycle(len(layers)), layers, strict=True)):
        points = [(int(b), score) for b, score in row["scores"].items() if score > 0]
        if points:
            line = {"color": colour, "marker": ".", "linestyle": _style(at), "linewidth": 1}
            left.plot(*zip(*points, strict=True), label=row["name"], **line)
        measured = [(int(b), score) for b, score in row["scores"].items() if score > row["predicted"][b]]
        if measured:
            left.plot(*zip(*measured, strict=True), "x", color=colour, markersize=5)
        chosen = row["scores"][str(row["bits"])]
        if chosen > 0:
            left.plot(row["bits"], chosen, "o", markerfacecolor="none", color=colour, markersize=9)
    left.set(xlabel="bits", ylabel="score", yscale="log")
    left.xaxis.get_major_locator().set_params(integer=True)
    if len(layers) <= 12:
        left.legend(fontsize=7)
    at = range(len(layers))
    means = [row["trace"]["value"] / row["parameters"] for row in layers]
    errors = [row["trace"]["stderr"] / row["parameters"] for row in layers]
    right.barh(at, means, xerr=errors, color=_cycle(len(layers)), height=0.6, ecolor="black", capsize=2)
    right.set_yticks(at, [f"{row['name']}  ({row['bits']} bits)" for row in layers])
    right.invert_yaxis()
    right.set(xlabel="trace of the Hessian's block, per weight")
    right.xaxis.set_major_locator(plt.MaxNLocator(3))
    right.xaxis.set_major_formatter(lambda x, _: f"{x:.3g}")
    right.grid(axis="y", visible=False)
    return _svg(plt, figure)


def accuracies(found: dict[str, Any]) -> str:
    """Loss and accuracy by size: one width for all layers, and widths chosen for the same size."""
    plt = _pyplot("accuracies")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    uniform = [pair[0] for pair in found["compared"]]
    chosen = sorted([*(pair[1] for pair in found["compared"]), *found["between"]], key=lambda row: row["bytes"])
    for label, rows, style, colour in (
        ("one width", uniform, "s--", COLOURS[1]),
        ("chosen widths", chosen, "o-", COLOURS[0]),
    ):
        sizes = [row["bytes"] / 1000 for row in rows]
        for axes, values in (
            (left, [row["loss"] for row in rows]),
            (right, [100 * row["accuracy"] for row in rows]),
        ):
            axes.plot(sizes, values, style, color=colour, markersize=4, linewidth=1, label=label)
    own = found["chosen"]
    for axes, value, exact in (
        (left, own["loss"], found["float_loss"]),
        (right, 100 * own["accuracy"], 100 * found["float_accuracy"]),
    ):
        axes.plot(own["bytes"] / 1000, value, "*", color="black", markersize=10, label="this budget")
        axes.axhline(exact, color="#888888", linewidth=0.8, linestyle=":", label="float")
        axes.set(xlabel="kB of weights")
    left.set(ylabel="test loss", yscale="log")
    right.set(ylabel=f"{found['measure']}, %")
    right.legend()
    return _svg(plt, figure)


def densities(curves: list[dict[str, Any]], salt: str) -> str:
    """Densities of eigenvalues over a logarithmic axis, each with its band of one standard error."""
    plt = _pyplot("density-" + salt)
    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    most = max(max(curve["density"]) for curve in curves)
    floor = 1e-6 * most
    for at, (colour, curve) in enumerate(zip(_cycle(len(curves)), curves, strict=True)):
        x, y, e = curve["x"], curve["density"], curve["stderr"]
        line = [max(v, floor) for v in y]
        axes.plot(x, line, color=colour, linestyle=_style(at), linewidth=1.2, label=curve["label"])
        low = [max(v - s, floor) for v, s in zip(y, e, strict=True)]
        high = [max(v + s, floor) for v, s in zip(y, e, strict=True)]
        axes.fill_between(x, low, high, color=colour, alpha=0.25, linewidth=0)
        for value in curve["eigenvalues"]:
            axes.axvline(value, color=colour, linewidth=0.6, linestyle=":")
    axes.set(xlabel="eigenvalue", ylabel="density", yscale="log", ylim=(floor, 2 * most))
    if len(curves) > 1:
        axes.legend(fontsize=7, ncols=2)
    return _svg(plt, figure)


def by_class(rows: list[dict[str, Any]]) -> str:
    """Trace and largest eigenvalue of each class, with error bars."""
    plt = _pyplot("by-class")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 0.9 + 0.26 * len(rows)), layout="constrained", sharey=True)
    at = range(len(rows))
    for axes, colour, value, error in (
        (left, COLOURS[0], lambda r: r["trace"]["value"], lambda r: r["trace"]["stderr"]),
        (right, COLOURS[1], lambda r: r["eigenvalues"][0], lambda r: r["residuals"][0]),
    ):
        axes.barh(at, list(map(value, rows)), xerr=list(map(error, rows)), color=colour, height=0.6, capsize=2)
        axes.grid(axis="y", visible=False)
    left.set_yticks(at, [row["label"] for row in rows])
    left.invert_yaxis()
    left.set(xlabel="trace")
    right.set(xlabel="largest eigenvalue")
    return _svg(plt, figure)

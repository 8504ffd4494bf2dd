# SPDX-License-Identifier: Apache-2.0
"""``fastflat spectrum``: eigenvalues, trace and density of the curvature of a trained network."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import click
import torch

from fastflat.cli import _subject
from fastflat.cli._subject import Subject


@click.command(context_settings={"max_content_width": 110})
@_subject.options
@click.option(
    "--operator", "kind", default="hessian", show_default=True, type=click.Choice(("hessian", "ggn")),
    help="The Hessian, or the generalised Gauss-Newton matrix.",
)  # fmt: skip
@click.option("--top", default=5, show_default=True, type=click.IntRange(1), help="How many eigenvalues.")
@click.option("--steps", default=40, show_default=True, type=click.IntRange(2), help="Lanczos steps of a probe.")
@click.option("--probes", default=4, show_default=True, type=click.IntRange(2), help="Random probes of the density.")
@click.option("--rtol", default=0.05, show_default=True, help="Relative standard error of the trace.")
@click.option("--per-class", is_flag=True, help="The same of each class alone, over its examples.")
def spectrum(run: Path | None, model: str | None, **given: Any) -> None:
    """Density of the eigenvalues of a trained network's Hessian, its largest eigenvalues and its trace.

    RUN is the folder of a run of fastflat train. The network is taken as it was trained, quantizers included, in
    evaluation mode. The folder of the results holds spectrum.json and report.html.

    \b
    Examples:
      fastflat spectrum runs/flat
      fastflat spectrum runs/flat --operator ggn --per-class --batches 10 --json spectrum.json
      fastflat spectrum --model crepe-tiny --batches 1
    """
    _subject.check("spectrum", run, model, given)
    if not given["rtol"] > 0:
        raise ValueError(f"spectrum: --rtol must be above 0, got {given['rtol']}")
    if given["threads"] is not None:
        torch.set_num_threads(given["threads"])
    subject = _subject.load("spectrum", run, model)
    if given["per_class"] and not subject.classes:
        raise ValueError(f"spectrum: --per-class must come with a network that has classes, got {subject.name}")
    found = _found(subject, given)
    folder = given["out"] or subject.folder
    results = json.dumps(found, indent=1) + "\n"
    _subject.write(
        folder, {"spectrum.json": results, "report.html": _report(subject, found)}, given["json_file"], results
    )
    for line in _text(found):
        click.echo(line)
    click.echo(f"report: {folder / 'report.html'}")


def _found(subject: Subject, given: dict[str, Any]) -> dict[str, Any]:
    """Everything that is measured, as plain values."""
    from fastflat import curvature

    examples = subject.batches(given["batches"], given["batch"])
    kind = {"hessian": curvature.Hessian, "ggn": curvature.GGN}[given["kind"]]
    operator = kind(subject.model, subject.loss, examples)
    n = operator.shape[0]
    if given["top"] > n:
        raise ValueError(f"spectrum: --top must be at most the {n} parameters, got {given['top']}")
    found = {
        "network": subject.name,
        "operator": given["kind"],
        "examples": sum(len(x) for x, _ in examples),
        "parameters": n,
        "seed": given["seed"],
        "all": _measured(operator, "all", given["top"], given),
        "classes": [],
    }
    if given["per_class"]:
        x, y = (torch.cat(parts) for parts in zip(*examples, strict=True))
        for label in y.unique().tolist():
            # In evaluation mode rows do not see each other: those of the class alone, and no others at weight zero.
            rows = zip(x[y == label].split(given["batch"]), y[y == label].split(given["batch"]), strict=True)
            of_class = kind(subject.model, subject.loss, list(rows))
            found["classes"].append(_measured(of_class, subject.classes[label], 1, given))
    return found


def _measured(operator: Any, label: str, top: int, given: dict[str, Any]) -> dict[str, Any]:
    progress = sys.stderr.isatty()

    def generator() -> torch.Generator:
        return torch.Generator(operator.device).manual_seed(given["seed"])

    eigenvalues = operator.eigenvalues(top, "largest_magnitude", generator=generator(), progress=progress)
    trace = operator.trace(given["rtol"], generator=generator(), progress=progress)
    density = operator.density(given["steps"], given["probes"], generator=generator(), progress=progress)
    grid = density.grid(400)
    values = density.evaluate(grid)
    return {
        "label": label,
        "eigenvalues": eigenvalues.value.tolist(),
        "residuals": eigenvalues.stderr.tolist(),
        "eigenvalues_converged": eigenvalues.converged,
        "trace": dataclasses.asdict(trace),
        "products": eigenvalues.products + trace.products + density.products,
        "density": {
            "x": grid.tolist(),
            "value": values.value.tolist(),
            "stderr": values.stderr.tolist(),
            "width": density.width(),
            "nodes": density.nodes.tolist(),
            "weights": density.weights.tolist(),
        },
    }


def _tables(found: dict[str, Any]) -> list[list[list[str]]]:
    whole = found["all"]
    table = [["quantity", "value"], ["trace", _number(whole["trace"])]]
    for at, (value, residual) in enumerate(zip(whole["eigenvalues"], whole["residuals"], strict=True), 1):
        table.append([f"eigenvalue {at}", _subject.with_error(value, residual)])
    if not found["classes"]:
        return [table]
    classes = [["class", "trace", "largest eigenvalue"]]
    for row in found["classes"]:
        largest = _subject.with_error(row["eigenvalues"][0], row["residuals"][0])
        classes.append([row["label"], _number(row["trace"]), largest])
    return [table, classes]


def _number(estimate: dict[str, Any]) -> str:
    note = "" if estimate["converged"] else " (not converged)"
    return _subject.with_error(estimate["value"], estimate["stderr"]) + note


def _lead(found: dict[str, Any]) -> str:
    name = {"hessian": "Hessian", "ggn": "Gauss-Newton matrix"}[found["operator"]]
    return f"{name} of {found['parameters']} parameters over {found['examples']} examples"


def _text(found: dict[str, Any]) -> list[str]:
    lines = [f"{found['network']}; {_lead(found)}"]
    for table in _tables(found):
        lines += ["", *_subject.aligned(table)]
    return [*lines, ""]


def _curve(row: dict[str, Any]) -> dict[str, Any]:
    density = row["density"]
    return {
        "label": row["label"],
        "x": density["x"],
        "density": density["value"],
        "stderr": density["stderr"],
        "eigenvalues": row["eigenvalues"],
    }


def _report(subject: Subject, found: dict[str, Any]) -> str:
    from fastflat.cli import _curvature_figures as figures

    tables = _tables(found)
    width = found["all"]["density"]["width"]
    parts = [
        {
            "title": "Density of the eigenvalues",
            "figure": figures.densities([_curve(found["all"])], "all"),
            "note": f"{_lead(found)}, by stochastic Lanczos quadrature seen through a kernel of width {width:.3g}; the"
            " band is one standard error over the probes, dotted lines are the largest eigenvalues.",
        },
        {
            "title": "Eigenvalues and trace",
            "table": tables[0],
            "note": "Of largest magnitude. The error of an eigenvalue is its residual norm, that of the trace a"
            f" standard error. {found['all']['products']} products in all.",
        },
    ]
    if found["classes"]:
        parts += [
            {
                "title": "Classes",
                "figure": figures.by_class(found["classes"]),
                "table": tables[1],
                "note": "Each over the examples of one class alone.",
            },
            {
                "title": "Densities of the classes",
                "figure": figures.densities([_curve(row) for row in found["classes"]], "classes"),
            },
        ]
    return _subject.page(f"Spectrum of {found['network']}", subject.lead, parts)

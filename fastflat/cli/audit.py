# SPDX-License-Identifier: Apache-2.0
"""``fastflat audit``: compiled GPU kernels against their budget, without a GPU."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from fastflat.audit import Report


@click.command("audit")
@click.option("--arch", "arches", multiple=True, metavar="SM", help="Architecture, as sm_90; repeat it for several.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write all facts here.")
@click.option("--update-budget", is_flag=True, help="Write benchmarks/budgets anew. Spills stay failures.")
@click.option("--traffic/--no-traffic", default=True, help="Also count bytes per element, on the CPU.  [default: on]")
def audit(arches: tuple[str, ...], json_file: Path | None, update_budget: bool, traffic: bool) -> None:
    """Compile every GPU kernel and check registers, spills, access widths, instructions and bytes per element.

    Needs no GPU. Exit status 1 if a kernel breaks a rule or its budget.

    \b
    Examples:
      fastflat audit
      fastflat audit --arch sm_90 --arch sm_100 --json audit.json
    """
    import importlib.util

    if importlib.util.find_spec("triton") is None:
        raise click.ClickException("audit needs triton; pip install 'fastflat[triton]'")
    from fastflat import audit as library

    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise click.ClickException(f"audit: --json: no folder {json_file.parent}")
    try:
        report = library.audit(
            arches or library.BUDGETED,
            update_budget=update_budget,
            traffic=traffic,
            progress=lambda line: click.echo(f"  {line}", err=True),
        )
    except RuntimeError as error:
        raise click.ClickException(str(error).removeprefix("fastflat ")) from None
    for line in table(report):
        click.echo(line)
    if json_file is not None:
        part = json_file.with_name(json_file.name + ".part")
        part.write_text(json.dumps(report.to_dict(), indent=1) + "\n")
        os.replace(part, json_file)
    if not report.passed:
        click.get_current_context().exit(1)


def table(report: Report) -> list[str]:
    """The report as text: a line for each kernel function, its variants and architectures taken together."""
    groups: dict[tuple[str, str, str], list] = {}
    for facts in report.kernels:
        function = facts.name.rsplit("/", 1)[1].split("[")[0].split("<")[0]
        groups.setdefault((facts.language, facts.family, function), []).append(facts)
    arches = list(dict.fromkeys(facts.arch for facts in report.kernels))
    head = ["kernel", "variants", *(f"regs {arch}" for arch in arches), "spilled", "16 B streams", "forbidden"]
    rows = []
    for (language, family, function), facts in sorted(groups.items()):
        registers = [_span([f.registers for f in facts if f.arch == arch]) for arch in arches]
        spilled, forbidden = (sum(bool(getattr(f, what)) for f in facts) for what in ("local", "forbidden"))
        wide = "narrow" if any(f.narrow for f in facts) else _span([len(f.wide) for f in facts])
        count = len({f.name for f in facts})
        rows.append([f"{language}/{family}/{function}", str(count), *registers, str(spilled), wide, str(forbidden)])
    lines = _columns([head, *rows])
    if report.traffic:
        head = ["bytes per element", "moved", "least"]
        rows = [[t.name, f"{t.moved:.3f}", f"{t.least:g}"] for t in report.traffic]
        lines += ["", *_columns([head, *rows])]
    lines += ["", *_columns([[name, status] for name, status in report.to_dict()["status"].items()])]
    lines += [f"note: {note}" for note in report.notes]
    lines += [f"FAILED {name}: {line}" for name, broken in report.failures.items() for line in broken]
    tools = ", ".join(f"{name} {version}" for name, version in report.toolchain.items())
    verdict = "passed" if report.passed else f"{len(report.failures)} FAILED"
    return [*lines, f"{len(report.kernels)} kernels for {', '.join(arches)} ({tools}): {verdict}"]


def _span(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]

# SPDX-License-Identifier: Apache-2.0
"""``fastflat bench compare`` and ``bench page``: what is done with records of earlier runs."""

from __future__ import annotations

from pathlib import Path

import click

from fastflat.cli import _bench as common
from fastflat.cli._bench import package

_RECORD = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.argument("old", type=_RECORD)
@click.argument("new", type=_RECORD)
def compare(old: Path, new: Path) -> None:
    """Two records of `bench`, row by row: the ratio of the medians, and whether the quartiles overlap.

    "in copies": the same ratio with each time in copies of its own run, which leaves out how fast the two memories are.
    Rows that only one record has, and what differs between the machines, are named below the table.

    \b
    Example:
      fastflat bench compare before.json after.json
    """
    report, machine, comparison = package("report"), package("machine"), package("comparison")
    before, after = report.read(old), report.read(new)
    found = comparison.compare(before, after)
    if not found.pairs:
        raise ValueError(f"bench: {old} and {new} must share a row, got none")
    notes = [f"{name}: {machine.line(result['machine'])}" for name, result in (("old", before), ("new", after))]
    report.show("bench compare", *comparison.table(found), notes + comparison.notes(found), click.echo)


@click.command()
@click.argument("record", type=_RECORD)
@click.argument("html_file", type=click.Path(path_type=Path))
def page(record: Path, html_file: Path) -> None:
    """Draw the page of a record: one HTML file with interactive figures, which needs nothing else.

    \b
    Example:
      fastflat bench page result.json result.html
    """
    common.writable(None, html_file)
    package("page").write(html_file.resolve(), package("report").read(record))
    click.echo(f"wrote {html_file}")

# SPDX-License-Identifier: Apache-2.0
"""``fastflat methods``: the published methods, what their equations give, and experiments that test their claims."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
from pathlib import Path
from typing import Any

import click
import torch

import fastflat
from fastflat import _files
from fastflat import methods as registry
from fastflat.cli import _methods_markdown, _methods_report
from fastflat.methods import Method, Settings
from fastflat.methods.lab import study, verdict

_FILE = click.Path(path_type=Path)
_DEFAULT = Path("runs") / "methods"
_JSON = click.option("--json", "json_file", type=_FILE, help="Write the results to this file, too.")
_THREADS = click.option("--threads", type=click.IntRange(1), help="CPU threads.")
_RUNS = click.option("--runs", type=_FILE, help="File of the runs; by default runs/methods-goals.jsonl.")
_FOLDER = click.option("--out", type=_FILE, default=_DEFAULT, show_default=True, help="Folder of the runs.")


@click.group(context_settings={"max_content_width": 110})
def methods() -> None:
    """Published methods on these kernels: their equations checked, their claims tested.

    \b
    Examples:
      fastflat methods list
      fastflat methods show sam
      fastflat methods check
      fastflat methods run sam --quick
      fastflat methods report
      fastflat methods goals --quick
    """


@methods.command("list")
@_JSON
def list_(json_file: Path | None) -> None:
    """A table of the methods."""
    found = registry.methods()
    width = max(len(m.name) for m in found)
    for m in found:
        click.echo(f"{m.number:>2}  {m.name:<{width}}  {m.year}  {m.arxiv:<10}  {m.title}")
    _to_json(json_file, [{**_facts(m), "claim": m.claim} for m in found])


@methods.command()
@click.argument("name")
def show(name: str) -> None:
    """Equations, defaults, recipe and an example of a method."""
    m = registry.get(name)
    from fastflat.methods import _registry

    click.echo(inspect.cleandoc(_registry.module(name).__doc__ or ""))
    click.echo(f"\nClaim: {m.claim}")
    click.echo(f"Kernels: {', '.join(m.kernels)}")
    options = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in m.recipe.items())
    click.echo(f"Recipe: fastflat train --method {name}   sets {options or 'no other option'}")
    e = m.experiment
    passes = ", ".join(f"{arm.name} {arm.passes:g}" for arm in e.arms)
    click.echo(f"Experiment: {e.summary} Passes a step: {passes}. {_size(e.full)}")


@methods.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@_JSON
@_THREADS
def check(names: tuple[str, ...], json_file: Path | None, threads: int | None) -> None:
    """Compare numbers that the papers' equations give with ours; exit status 1 if one differs."""
    chosen = [registry.get(name) for name in names] or list(registry.methods())
    _prepare(threads, json_file)
    rows, failed = [], 0
    for m in chosen:
        click.echo(f"{m.name}: {m.title}")
        for c in m.check():
            failed += not c.passed
            rows.append({"method": m.name, **dataclasses.asdict(c), "passed": c.passed})
            relation = "" if c.relation == "equal" else c.relation + " "
            click.echo(
                f"  {'ok  ' if c.passed else 'FAIL'} {c.name}: want {relation}{c.want:.10g}, got {c.got:.10g}"
                f" (tolerance {c.tolerance:.3g}; {c.source})"
            )
    click.echo(f"{len(rows) - failed} of {len(rows)} checks of {len(chosen)} methods pass")
    _to_json(json_file, rows)
    if failed:
        raise click.exceptions.Exit(1)


@methods.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--quick", is_flag=True, help="Small: shows that it works in two minutes, proves nothing.")
@click.option("--seeds", type=click.IntRange(1), help="Runs of each arm; fewer than three give no verdict.")
@_FOLDER
@_THREADS
def run(names: tuple[str, ...], quick: bool, seeds: int | None, out: Path, threads: int | None) -> None:
    """Train all arms of the experiments with all seeds, of all methods without names; what was finished before is not
    trained again."""
    from tqdm import tqdm

    chosen = [registry.get(name) for name in names] or list(registry.methods())
    if out.exists() and not out.is_dir():
        raise ValueError(f"methods: --out must be a folder, got the file {out}")
    _prepare(threads)
    settings = [_settings(m, quick, seeds) for m in chosen]
    total = sum(study.size(m.experiment, s) for m, s in zip(chosen, settings, strict=True))
    with tqdm(total=total, unit="run", leave=False, disable=None) as bar:
        for m, s in zip(chosen, settings, strict=True):
            _run(m, s, study.file(out, m.name, quick), bar)


def _settings(m: Method, quick: bool, seeds: int | None) -> Settings:
    settings = m.experiment.quick if quick else m.experiment.full
    return settings if seeds is None else dataclasses.replace(settings, seeds=seeds)


def _run(m: Method, settings: Settings, path: Path, bar: Any) -> None:
    records = []
    for record in study.run(m, settings, path, bar.set_description):
        records.append(record)
        bar.update()
        bar.clear()
        if record.kind == "run":
            shown = ", ".join(f"{k} {v:.4g}" for k, v in record.metrics.items() if k in _tested(m))
            click.echo(f"{record.arm}, seed {record.seed}: {shown}")
    for text in _methods_report.sentences(verdict.findings(records, m.experiment)):
        click.echo(text)
    answer = verdict.verdict(verdict.findings(records, m.experiment))
    click.echo(f"{m.name}: {_methods_report.ANSWERS[answer]}; runs in {path}")


@methods.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Short runs of each arm.")
@_FOLDER
@_THREADS
def profile(names: tuple[str, ...], rounds: int, out: Path, threads: int | None) -> None:
    """Time a step of every arm, all arms in turn, beside what its passes must cost; the report takes it from there."""
    from tqdm import tqdm

    chosen = [registry.get(name) for name in names] or list(registry.methods())
    _prepare(threads)
    with tqdm(total=rounds * sum(len(m.experiment.arms) for m in chosen), leave=False, disable=None) as bar:
        for m in chosen:
            records = []
            for record in study.profile(m, rounds, study.profile_file(out, m.name), bar.set_description):
                records.append(record)
                bar.update()
            bar.clear()
            base = m.experiment.arms[0].name
            for c in verdict.costs(records, m.experiment):
                over = f"({100 * (c.measured / c.passes - 1):+.0f} %)"
                click.echo(f"{m.name}: {c.arm} {c.measured:.2f} x a step of {base}, its passes {c.passes:.2f} x {over}")


@methods.command()
@_FOLDER
@click.option("--html", "page", type=_FILE, help="The page; by default report.html in the folder of the runs.")
@click.option("--markdown", type=_FILE, help="Write the page as Markdown to this file, too, figures/ beside it.")
@click.option("--table", type=_FILE, help="A Markdown page that has the short table between its marks.")
@_JSON
def report(out: Path, page: Path | None, markdown: Path | None, table: Path | None, json_file: Path | None) -> None:
    """One page of all methods: claim, measured, reproduced or not, cost, figure; with the JSON it is drawn from."""
    entries = _methods_report.entries(out)
    if not any(entry.records for entry in entries):
        raise ValueError(f"methods: {out} must hold runs, got none; fastflat methods run NAME makes them")
    page = page or out / "report.html"
    numbers = [entry.to_dict() for entry in entries]
    files = {
        page: _methods_report.html(entries),
        json_file or page.with_suffix(".json"): json.dumps(numbers, indent=1) + "\n",
    }
    for path in (*files, *filter(None, (markdown, table))):
        _writable(path)
    if markdown:
        files[markdown], figures = _methods_markdown.page(entries)
        folder = markdown.parent / _methods_markdown.FIGURES
        folder.mkdir(exist_ok=True)
        files |= {folder / name: text for name, text in figures.items()}
    if table:
        from_table = os.path.relpath(markdown, table.parent) if markdown else ""
        text = table.read_text(encoding="utf-8")
        files[table] = _methods_markdown.inserted(text, entries, Path(from_table).as_posix() if from_table else "")
    _files.write_all({path: text.encode() for path, text in files.items()})
    click.echo(f"{sum(bool(e.records) for e in entries)} of {len(entries)} methods have runs; report: {page}")


@methods.command()
@click.option(
    "--quick", is_flag=True, help="A few combinations, small: shows that it works in two minutes, proves nothing."
)
@_RUNS
@_THREADS
def goals(quick: bool, runs: Path | None, threads: int | None) -> None:
    """Search combinations of quantizer, optimizer and loss for what serves which goal on a low-bit network; what was
    finished before is not trained again."""
    from tqdm import tqdm

    from fastflat.methods.lab.goals import search

    what, path = (search.QUICK if quick else search.FULL), _goals_file(runs, quick)
    if path.is_dir():
        raise ValueError(f"methods: --runs must be a file, got the folder {path}")
    _prepare(threads)
    records = []
    with tqdm(total=search.size(what), unit="training", leave=False, disable=None) as bar:
        for record in search.run(what, path, bar.set_description):
            records.append(record)
            bar.update()
            if bar.n >= bar.total:
                bar.total = search.size(what, records)
            if record.kind != "profile":
                bar.clear()
                values = record.metrics.items()
                shown = ", ".join(f"{k} {v:.4g}" for k, v in values if k.endswith(("_accuracy", "rounded", "robust")))
                click.echo(f"{record.kind} {record.arm}, seed {record.seed}: {shown or 'diverged'}")
    click.echo(f"{len(records)} trainings in {path}; fastflat methods guide --markdown FILE writes the page")


@methods.command()
@click.option("--quick", is_flag=True, help="Of the quick search.")
@_RUNS
@click.option("--markdown", type=_FILE, required=True, help="Write the page to this file, figures/ beside it.")
def guide(quick: bool, runs: Path | None, markdown: Path) -> None:
    """The user's guide: which method for which goal, which pairs go together, drawn from the runs of the search."""
    from fastflat.cli import _methods_guide
    from fastflat.methods.lab.goals import search
    from fastflat.methods.lab.records import read

    path = _goals_file(runs, quick)
    if runs is not None and not path.is_file():
        raise ValueError(f"methods: --runs must be a file of runs, got {path}; fastflat methods goals makes it")
    _writable(markdown)
    records = read(path)
    text, figures = _methods_guide.page(records, search.QUICK if quick else search.FULL, f"`{path.as_posix()}`")
    folder = markdown.parent / _methods_markdown.FIGURES
    if figures:
        folder.mkdir(exist_ok=True)
    files = {markdown: text} | {folder / name: svg for name, svg in figures.items()}
    _files.write_all({path: text.encode() for path, text in files.items()})
    click.echo(f"{len(records)} trainings, {len(figures)} figures; page: {markdown}")


def _goals_file(runs: Path | None, quick: bool) -> Path:
    return runs or Path("runs") / f"methods-goals{'-quick' if quick else ''}.jsonl"


def _facts(m: Method) -> dict[str, Any]:
    plain = ("name", "number", "title", "authors", "year", "arxiv", "kernels")
    return {name: getattr(m, name) for name in plain}


def _tested(m: Method) -> set[str]:
    return {claim.metric for claim in m.experiment.claims}


def _size(settings: Settings) -> str:
    data = f", {settings.images} images" if settings.images else ""
    return f"{settings.passes} passes{data}, {settings.seeds} seeds."


def _prepare(threads: int | None, json_file: Path | None = None) -> None:
    if json_file is not None:
        _writable(json_file)
    fastflat.tune_host_memory()
    if threads is not None:
        torch.set_num_threads(threads)


def _writable(path: Path) -> None:
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise ValueError(f"methods: {path} must name a file in an existing folder, got no such place")


def _to_json(path: Path | None, values: Any) -> None:
    if path is not None:
        _writable(path)
        _files.write_all({path.resolve(): (json.dumps(values, indent=1) + "\n").encode()})

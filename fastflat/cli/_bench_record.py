# SPDX-License-Identifier: Apache-2.0
"""The record of a run of ``fastflat bench``: the jobs that fill it, where it is written, the tables that show it."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from fastflat.cli._bench import package

#: A label, and a function that gives rows.
Job = tuple[str, Callable[[], list[dict[str, Any]]]]
#: Device, list of the record, and what to do there.
Jobs = tuple[Any, str, list[Job]]


class Record:
    """A result that grows. Rows that were measured are kept and written, marked incomplete, whatever ends the run.

    Args:
        benchmark: its name.
        devices: those of the run.
        allocator, effort: as the record says them.
        json_file, html_file: where it goes.
        more: further fields.
    """

    def __init__(
        self, benchmark: str, devices: Sequence[Any], allocator: str, effort: Any, json_file: Path | None,
        html_file: Path | None, **more: Any,
    ) -> None:  # fmt: skip
        facts = {device.name: package("machine").describe(device) for device in devices}
        first = next(iter(facts.values()))
        self.json_file, self.html_file = json_file, html_file
        self.result = {
            "benchmark": benchmark, "machine": first, "machines": facts, "device": ",".join(facts),
            "date": first["date"], "allocator": allocator, **more, "effort": vars(effort), "complete": True,
            "roofline": [], "rows": [],
        }  # fmt: skip
        gpu = next((own["gpu"] for own in facts.values() if "gpu" in own), None)
        if gpu:
            self.result["gpu"] = gpu
        self._lost: list[str] = []

    @contextlib.contextmanager
    def kept(self) -> Iterator[Record]:
        """At the end the record is written and shown; also where the run breaks off."""
        try:
            with _termination_raises():
                yield self
        except BaseException as error:
            if self.result["rows"]:
                words = {KeyboardInterrupt: "interrupted", SystemExit: "terminated"}
                self._stopped(words.get(type(error)) or f"{type(error).__name__}: {_line(error)}")
                self._write()
            raise
        if self._lost:
            self._stopped("; ".join(self._lost))
        count = len(self.result["rows"])
        if count or not self._lost:
            self._write()
            show(self.result)
        if self._lost:
            kept = (
                f"{count} rows measured before are kept, marked incomplete" if count else "no row was measured before"
            )
            raise click.ClickException(f"bench: {'; '.join(self._lost)}; {kept}")

    def measure(self, jobs: Iterable[Jobs]) -> None:
        """Do the jobs, given as device, list of the record, and work. A device that is lost ends its own jobs only."""
        from tqdm import tqdm

        jobs, lost = list(jobs), package("devices").Lost
        gone = set()
        with tqdm(total=sum(len(work) for _, _, work in jobs), desc="bench", unit="case", leave=False) as bar:
            for device, field, work in jobs:
                for label, function in work:
                    bar.set_postfix_str(f"{device.name} {label}", refresh=True)
                    if device.name not in gone:
                        try:
                            self.result[field] += package("run").guarded(device, function)
                        except lost as error:
                            gone.add(device.name)
                            self._lost.append(str(error))
                    bar.update()

    def _stopped(self, reason: str) -> None:
        self.result |= {"complete": False, "stopped": reason}

    def _write(self) -> None:
        if self.json_file is not None:
            package("report").write(self.json_file.resolve(), self.result)
        if self.html_file is not None:
            package("page").write(self.html_file.resolve(), self.result)


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


@contextlib.contextmanager
def _termination_raises() -> Iterator[None]:
    """What a batch system sends before it kills ends the block as an exception does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def roofline_jobs(device: Any, counts: Sequence[int], dtypes: Sequence[torch.dtype], effort: Any, quick: bool) -> Jobs:
    """The measurement that comes before all others."""
    roofline = package("roofline")
    work = [
        (f"roofline, {count} threads", lambda count=count: roofline.rows(device, count, dtypes, effort, quick))
        for count in counts
    ]
    return device, "roofline", work


def kernel_jobs(
    record: Record, device: Any, counts: Sequence[int], cases: Sequence[Any], peers: Sequence[str], effort: Any
) -> Jobs:
    """Cases of one family, under the roofs that the record holds by then."""
    run, roofline = package("run"), package("roofline")

    def rows(case: Any, count: int) -> list[dict[str, Any]]:
        roofs = roofline.roofs(record.result["roofline"], device.name, count)
        return run.rows(case, peers, count, effort, device, roofs)

    work = [
        (f"{case.label}, {count} threads", lambda case=case, count=count: rows(case, count))
        for count in counts
        for case in cases
    ]
    return device, "rows", work


def product_jobs(device: Any, counts: Sequence[int], cases: Sequence[Any], peers: Sequence[str], effort: Any) -> Jobs:
    """Products with curvature matrices."""
    products = package("products")

    def rows(case: Any, count: int) -> list[dict[str, Any]]:
        with device.active():
            return [{**row, "device": device.name} for row in products.rows(case, peers, count, effort, device.place)]

    work = [
        (f"{case.label}, {count} threads", lambda case=case, count=count: rows(case, count))
        for count in counts
        for case in cases
    ]
    return device, "rows", work


def show(result: dict[str, Any]) -> None:
    """The tables of a record, family by family, with the machine's line."""
    report, machine, sections = package("report"), package("machine"), package("sections")
    shown = [(f"bench {section.title}", *section.table) for section in sections.of(result)]
    if result.get("roofline"):
        shown.insert(0, ("bench roofline", *sections.roofline_table(result)))
    if result.get("audited"):
        shown.append(("bench: GPU kernels that were audited, not run", *sections.audited_table(result)))
    machines = result.get("machines") or {result.get("device", "cpu"): result["machine"]}
    notes = [machine.line(facts) for facts in machines.values()] + [f"allocator {result.get('allocator', 'default')}"]
    notes += filter(None, [machine.busy(result["machine"])])
    missing = {row["peer"]: row["unsupported"] for row in result["rows"] if "unsupported" in row}
    notes += [f"{peer}: no form of some cases: {reason}" for peer, reason in missing.items()]
    if not result.get("complete", True):
        notes.append(f"incomplete: {result['stopped']}")
    for number, (title, head, lines) in enumerate(shown):
        report.show(title, head, lines, notes if number == len(shown) - 1 else [], click.echo)

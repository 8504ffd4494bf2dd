# SPDX-License-Identifier: Apache-2.0
"""``make matrix``: one wheel under several Pythons and several torch, its op tests green in each.

Usage: matrix.py WHEEL --pythons NAMES --torches VERSIONS --tests PATHS [--record FILE [--page PAGE]]. Each pair gets an
environment of its own, which goes when it is done. The record keeps what finished: a second run goes on from there,
unless the wheel has changed. A page's table is drawn from the record. Exits with 1 where a pair is not green.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from build_tools import same_libraries  # noqa: E402

#: What the op tests import beside torch.
NEEDS = ("numpy", "scipy", "hypothesis", "pytest", "pytest-xdist")
#: What a page's table stands between.
MARKS = ("<!-- matrix: start -->\n", "<!-- matrix: end -->")
_COUNTS = re.compile(r"(\d+) (passed|failed|errors?|skipped)")


class MatrixError(Exception):
    """What stands in the way, in one line."""


def sha256(path: Path) -> str:
    """Of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def counts(output: str) -> dict[str, int]:
    """How many tests passed, failed (errors included) and were skipped, from pytest's last line that tells."""
    found = {"passed": 0, "failed": 0, "skipped": 0}
    told = [line for line in output.splitlines() if _COUNTS.search(line)]
    for number, what in _COUNTS.findall(told[-1]) if told else ():
        found["failed" if what.startswith("error") else what] += int(number)
    return found


def read(path: Path, wheel: Path) -> dict[str, Any]:
    """The record, empty where there is none or another wheel's."""
    fresh = {"wheel": wheel.name, "sha256": sha256(wheel), "pairs": []}
    if not path.is_file():
        return fresh
    kept = json.loads(path.read_text(encoding="utf-8"))
    return kept if kept.get("sha256") == fresh["sha256"] else fresh


def write(path: Path, text: str) -> None:
    """Aside, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".new")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def table(record: dict[str, Any]) -> str:
    """The record as a page shows it: a row for each Python, a column for each torch."""
    pairs = {(p["python"], p["torch"]): p for p in record["pairs"]}
    pythons, torches = (list(dict.fromkeys(key[i] for key in pairs)) for i in range(2))
    rows = [["Python", *(f"torch {torch}" for torch in torches)], ["---"] * (len(torches) + 1)]
    rows += [[python, *(_cell(pairs.get((python, torch))) for torch in torches)] for python in pythons]
    lines = "".join("| " + " | ".join(row) + " |\n" for row in rows)
    days = [p["date"] for p in record["pairs"]]
    when = " to ".join(sorted({min(days), max(days)}))
    return f"`{record['wheel']}`, {when}:\n\n{lines}"


def _cell(pair: dict[str, Any] | None) -> str:
    if pair is None:
        return "not run"
    said = f"{pair['passed']} passed, {pair['failed']} failed"
    return said if pair["same_libraries"] else f"{said}, other libraries"


def inserted(page: str, record: dict[str, Any], name: str) -> str:
    """The text of a page with the table of a record between MARKS. Raises MatrixError where they are missing."""
    before, start, rest = page.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not start or not end:
        raise MatrixError(f"{name} must hold the lines {MARKS[0].strip()} and {MARKS[1]}")
    return f"{before}{start}\n{table(record)}\n{end}{after}"


def interpreter(name: str) -> str:
    """The path of a Python by its name or path."""
    found = shutil.which(name)
    if found is None:
        raise MatrixError(f"PYTHONS must name installed Pythons, got {name!r}")
    # A version manager's stand-in may be on PATH for a Python that is not switched on.
    started = subprocess.run([found, "-c", ""], capture_output=True, text=True, check=False)
    if started.returncode != 0:
        said = next(iter(started.stderr.strip().splitlines()), f"status {started.returncode}")
        raise MatrixError(f"PYTHONS must name Pythons that start, got {name!r}: {said}")
    return found


def pair(wheel: Path, python: str, torch: str, tests: Sequence[str], folder: Path, workers: int) -> dict[str, Any]:
    """One environment: made, tested, told, removed."""
    shutil.rmtree(folder, ignore_errors=True)
    start = time.monotonic()
    try:
        _call([python, "-m", "venv", str(folder / "env")])
        inside = str(folder / "env" / "bin" / "python")
        install = [inside, "-m", "pip", "--disable-pip-version-check", "--quiet", "install", "--no-cache-dir"]
        _call([*install, f"torch=={torch}", *NEEDS])
        _call([*install, "--no-deps", str(wheel)])
        there = same_libraries.report(inside)
        same = same_libraries.compare(str(wheel), there)
        # A copy, so that the source tree cannot be imported; some tests read the kernels' sources.
        for name in ("tests", "csrc"):
            shutil.copytree(ROOT / name, folder / name)
        shutil.copy(ROOT / "pyproject.toml", folder)
        command = [inside, "-m", "pytest", "-q", "-m", "not triton", "-n", str(workers), *tests]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        told = counts(done.stdout)
        green = same and done.returncode == 0 and told["passed"] > 0
        if not green:
            print("\n".join((done.stdout + done.stderr).splitlines()[-30:]), file=sys.stderr)
        return {
            "python": there["python"],
            "torch": there["torch"],
            "same_libraries": same,
            **told,
            "green": green,
            "seconds": round(time.monotonic() - start),
            "date": datetime.date.today().isoformat(),
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        why = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "no message")
        raise MatrixError(f"{' '.join(command[:4])} failed: {why}")


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="matrix")
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--pythons", required=True)
    parser.add_argument("--torches", required=True)
    parser.add_argument("--tests", required=True)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--page", type=Path)
    given = parser.parse_args(words)
    status = 0
    try:
        if not given.wheel.is_file():
            raise MatrixError(f"the wheel must exist, got {given.wheel}")
        if given.page and not given.record:
            raise MatrixError("a page is drawn from a record: --record must be given with --page")
        pythons = [(name, interpreter(name)) for name in given.pythons.split()]
        record = read(given.record, given.wheel) if given.record else {"pairs": []}
        done = {(p["asked"]["python"], p["asked"]["torch"]): p for p in record["pairs"] if p["green"]}
        for name, python in pythons:
            for torch in given.torches.split():
                asked = {"python": Path(name).name, "torch": torch}
                found = done.get(tuple(asked.values()))
                if found is None:
                    folder, workers = ROOT / "build" / "matrix", len(os.sched_getaffinity(0))
                    found = {"asked": asked, **pair(given.wheel, python, torch, given.tests.split(), folder, workers)}
                    record["pairs"] = [p for p in record["pairs"] if p["asked"] != asked] + [found]
                    if given.record:
                        write(given.record, json.dumps(record, indent=1) + "\n")
                print(
                    f"Python {found['python']}, torch {found['torch']}: {found['passed']} passed, {found['failed']}"
                    f" failed, {found['skipped']} skipped, {'the same' if found['same_libraries'] else 'OTHER'}"
                    f" libraries, {found['seconds']} s",
                    flush=True,
                )
                status |= not found["green"]
        if given.page:
            write(given.page, inserted(given.page.read_text(encoding="utf-8"), record, given.page.name))
    except (MatrixError, OSError, ValueError) as error:
        print(f"fastflat: {error}", file=sys.stderr)
        return 2
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

# SPDX-License-Identifier: Apache-2.0
"""Runs the examples one after another, makes one record of theirs, and draws the table of README.md from it.

    python examples/record.py --quick              a look at each; no file changes but those in build/examples
    python examples/record.py                      benchmarks/results/examples-<machine>.json and the table
    python examples/record.py minilm_torchao       this one again, the others as they lie in build/examples

Each runs in a process of its own, on one thread.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import comparison

from fastflat.benchmarks import figures, machine, report

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
NAMES = ("resnet_brevitas", "transformer_block", "efficientnet_lsq", "crepe_torch_ao", "minilm_torchao")


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("names", nargs="*", metavar="EXAMPLE", help=f"of {', '.join(NAMES)} (default: all)")
    flags.add_argument("--quick", action="store_true", help="few steps, and no record")
    options = flags.parse_args()
    unknown = [name for name in options.names if name not in NAMES]
    if unknown:
        flags.error(f"EXAMPLE must be one of {', '.join(NAMES)}, got {unknown[0]}")
    kept = ROOT / "build" / "examples"
    kept.mkdir(parents=True, exist_ok=True)
    failed = [name for name in options.names or NAMES if not ran(name, kept, options.quick)]
    if failed:
        sys.exit(f"record: {', '.join(failed)} failed, for the reasons above; the others are done")
    if not options.quick:
        missing = [name for name in NAMES if not (kept / f"{name}.json").is_file()]
        if missing:
            sys.exit(f"record: every example must have run, got none of {', '.join(missing)}; name them")
        write([report.read(kept / f"{name}.json") for name in NAMES])


def ran(name: str, kept: Path, quick: bool) -> bool:
    """Whether an example ended well."""
    command = [sys.executable, str(HERE / f"{name}.py")]
    command += ["--quick"] if quick else ["--json", str(kept / f"{name}.json")]
    print(f"\n== {name}", flush=True)
    return subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode == 0


def write(records: list[dict[str, Any]]) -> None:
    """One record and its table. The machine is as the busiest of the runs found it."""
    facts = max((record["machine"] for record in records), key=lambda found: found["load"] or 0)
    target = ROOT / "benchmarks" / "results" / f"examples-{machine.slug(facts)}.json"
    comparison.write(target, [row for record in records for row in record["rows"]], facts)
    page = HERE / "README.md"
    source = target.relative_to(ROOT).as_posix()
    report.write_text(page, figures.insert(page.read_text(), "examples", source, table(report.read(target))))
    print(f"wrote {source} and the table of examples/README.md")


def table(result: dict[str, Any]) -> str:
    """A line for each example and form that is accelerated."""
    by: dict[str, dict[str, dict[str, Any]]] = {}
    for row in result["rows"]:
        by.setdefault(row["network"], {})[row["peer"]] = row
    head = ["example", "peer", "accelerated", "no quantizers", "faster", "of the most", "measured", "before", "after"]
    head += ["bit-equal losses"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, forms in by.items():
        theirs = forms["theirs"]
        for peer, row in forms.items():
            if "speedup" not in row:
                continue
            label = f"`{name}`" + (", its SAM too" if peer == "fastflat-sam" else "")
            cells = [label, *(report.seconds(form["seconds"]) for form in (theirs, row, forms["fp32"]))]
            cells += [f"{row['speedup']:.2f} x", f"{row['of_cap']:.0%}", row["measured"]]
            cells += [" / ".join(f"{form[when]:.3g}" for form in (theirs, row)) for when in ("before", "after")]
            lines.append("| " + " | ".join([*cells, f"{row['equal_losses']} of {row['steps']}"]) + " |")
    return "\n".join([f"Machine: {machine.line(result['machine'])}.", "", *lines])


if __name__ == "__main__":
    main()

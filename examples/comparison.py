# SPDX-License-Identifier: Apache-2.0
"""What the examples share: their flags, and the measurement of one training loop over several forms of a network."""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastflat.benchmarks import machine, measure, report, run

#: The forms that are compared, by the names of ``fastflat bench accelerate``.
FORMS = {
    "theirs": "peer",
    "fastflat": "accelerated",
    "fastflat-sam": "and its SAM",
    "fp32": "no quantizers",
}


def options(text: str, *, steps: int, quick: int = 4) -> argparse.Namespace:
    """The flags that every example has; with ``--quick`` few steps unless ``--steps`` says how many."""
    flags = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--steps", type=_positive, help=f"training steps (default: {steps}, with --quick {quick})")
    flags.add_argument("--quick", action="store_true", help="a look: few steps, little data, timings that say little")
    flags.add_argument("--json", type=_in_a_folder, metavar="FILE", help="write the numbers to this file, too")
    flags.add_argument("--threads", type=_positive, default=1, help="of torch (default: %(default)s)")
    found = flags.parse_args()
    found.steps = found.steps or (quick if found.quick else steps)
    torch.set_num_threads(found.threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", module=r"(?!fastflat)")  # what the peers have to say of themselves
    return found


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _in_a_folder(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise argparse.ArgumentTypeError(f"must name a file in an existing folder, got {text!r}")
    return path


def compare(
    forms: dict[str, tuple[nn.Module, Iterator[float]]],
    evaluate: Callable[[nn.Module], float],
    options: argparse.Namespace,
    *,
    measured: str,
    optimizer: str,
    batch: int,
) -> list[dict[str, Any]]:
    """Train all forms, a step of each in turn, in an order that rotates; print the table, write the record.

    Args:
        forms: for each name of :data:`FORMS` a network and its training loop, which yields the loss of each step. Each
            draws random numbers as if it ran alone.
        evaluate: what is measured of a network before the first step and after the last.
        options: those of :func:`options`.
        measured: what that is, in words.
        optimizer: its name in the record.
        batch: samples in a step.

    Returns:
        The rows of the record. With T, A and N the seconds of a step of the peer's, accelerated and without
        quantizers: ``speedup`` is T/A and ``of_cap`` N/A, medians over the steps; the first step, which allocates
        optimizer states, is left out where there are more.
    """
    facts = machine.describe(torch.device("cpu"))
    before = {name: evaluate(model) for name, (model, _) in forms.items()}
    taken, losses, after = _trained(forms, evaluate, options.steps)
    timings = {name: _timing(seconds[1:] or seconds) for name, seconds in taken.items()}
    case = {
        "family": "step", "device": "cpu", "threads": options.threads, "network": _example(),
        "mode": "eager", "optimizer": optimizer, "batch": batch, "measured": measured,
    }  # fmt: skip
    rows = []
    for name, timing in timings.items():
        row = {**case, "peer": name, **run.timed(timing), "samples_per_second": batch / timing.median}
        row |= {"overhead": None if name == "fp32" else timing.over(timings["fp32"]) - 1, "of_identity": None}
        row |= {"before": before[name], "after": after[name], "loss": losses[name][-1], "steps": options.steps}
        if name not in ("fp32", "theirs"):
            pairs = list(zip(losses["theirs"], losses[name], strict=True))
            row |= {"speedup": timings["theirs"].over(timing), "of_cap": timings["fp32"].over(timing)}
            row |= {"equal_losses": sum(a == b for a, b in pairs)}
            row |= {"apart": max(abs(a - b) / max(abs(a), 1e-30) for a, b in pairs)}
        rows.append(row)
    print("\n".join(table(rows)))
    print(machine.line(facts), machine.busy(facts) or "", sep="\n")
    if options.json:
        write(options.json, rows, facts)
    return rows


def _trained(forms: dict[str, tuple[nn.Module, Iterator[float]]], evaluate: Callable, steps: int) -> tuple:
    """Seconds and losses of every step, and what is measured at the end."""
    names = list(forms)
    taken: dict[str, list[float]] = {name: [] for name in names}
    losses: dict[str, list[float]] = {name: [] for name in names}
    drawn = dict.fromkeys(names, torch.get_rng_state())
    for step in range(steps):
        turn = step % len(names)
        for name in names[turn:] + names[:turn]:
            torch.set_rng_state(drawn[name])
            start = time.perf_counter()
            losses[name].append(next(forms[name][1]))
            taken[name].append(time.perf_counter() - start)
            if not math.isfinite(losses[name][-1]):
                sys.exit(f"{_example()}: losses must be finite, got {losses[name][-1]} in step {step + 1} of {name}")
            drawn[name] = torch.get_rng_state()
    return taken, losses, {name: evaluate(model) for name, (model, _) in forms.items()}


def _example() -> str:
    return Path(sys.argv[0]).stem


def _timing(seconds: list[float]) -> measure.Timing:
    q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return measure.Timing(median, q1, q3, min(seconds), 1, tuple(seconds))


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows of one example as lines of text."""
    by = {row["peer"]: row for row in rows}
    first = rows[0]
    lines = [f"{first['network']}: {first['steps']} steps of {first['batch']} samples, {first['threads']} threads"]
    lines.append(" " * 28 + "".join(f"{FORMS[name]:>16}" for name in by))
    shown = {
        "a step": lambda row: report.seconds(row["seconds"]),
        f"{first['measured']}, before": lambda row: f"{row['before']:.4g}",
        f"{first['measured']}, after": lambda row: f"{row['after']:.4g}",
        "loss of the last step": lambda row: f"{row['loss']:.8g}",
    }
    lines += [f"{label:28}" + "".join(f"{text(row):>16}" for row in rows) for label, text in shown.items()]
    share = by["theirs"]["overhead"] / (1 + by["theirs"]["overhead"])
    lines.append(f"quantizers take {share:.0%} of the peer's step; without them it is {1 / (1 - share):.2f} x as fast")
    for row in rows:
        if "speedup" in row:
            lines.append(
                f"{FORMS[row['peer']]}: {row['speedup']:.2f} x as fast, {row['of_cap']:.0%} of the speed without any;"
                f" losses equal in every bit in {row['equal_losses']} of {row['steps']} steps"
                f" (largest relative difference {row['apart']:.1e})"
            )
    return lines


def write(path: Path, rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """A record of ``fastflat bench`` with these rows."""
    rounds = [row["rounds"] for row in rows]
    record = {
        "benchmark": "examples", "machine": facts, "device": "cpu", "date": facts["date"], "allocator": "default",
        "effort": {"seconds": 0.0, "rounds": [min(rounds), max(rounds)], "block": 0.0}, "complete": True, "rows": rows,
    }  # fmt: skip
    report.write(path, record)

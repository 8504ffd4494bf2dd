# SPDX-License-Identifier: Apache-2.0
"""Committed limits of every kernel: ``benchmarks/budgets/<arch>.json``.

A file of an architecture holds ``{"toolchain": {...}, "kernels": {name: {"registers", "shared", "wide"}}}``. Registers
are limits rounded up to the 8 in which hardware allots them; ``wide`` lists the streams that are accessed 16 bytes at
a time and must stay so. No entry allows spills, forbidden instructions or a narrow stream.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from fastflat.audit._facts import Facts

#: Registers are allotted to a thread in steps of this many.
_STEP = 8


def folder(root: Path | None) -> Path | None:
    """Where budgets are: in the checkout, or installed with the benchmarks; None if they are not there."""
    package = Path(__file__).resolve().parents[1]
    for place in ([root / "benchmarks"] if root else []) + [package / "benchmarks"]:
        if (place / "budgets").is_dir():
            return place / "budgets"
    return None


def read(path: Path) -> dict:
    """A budget file, or an empty one if it does not exist. Raises ValueError if it holds something else."""
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name}: not a budget file: {error}") from None


def write(path: Path, content: dict) -> None:
    """Writes a budget file with one line for each kernel, so that a change is a line of a diff."""
    kernels = [f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(content["kernels"].items())]
    head = {key: value for key, value in content.items() if key != "kernels"}
    body = json.dumps(head, indent=2)[:-2] + ',\n  "kernels": {\n' + ",\n".join(kernels) + "\n  }\n}\n"
    part = path.with_suffix(".part")
    part.write_text(body)
    os.replace(part, path)


def entry(facts: Facts) -> dict:
    """The limits that these facts just keep."""
    registers = -(-facts.registers // _STEP) * _STEP
    return {"registers": registers, "shared": facts.shared, "wide": facts.wide}


def failures(facts: Facts, budget: dict) -> list[str]:
    """Broken rules and broken limits of one kernel, one line each."""
    lines = facts.failures()
    limit = budget.get("kernels", {}).get(facts.name)
    if limit is None:
        return [*lines, f"not in the budget of {facts.arch}"]
    for what in ("registers", "shared"):
        if getattr(facts, what) > limit[what]:
            lines.append(f"{getattr(facts, what)} {what}, budget {limit[what]}")
    lines += [
        f"{stream} is no longer accessed 16 bytes at a time" for stream in limit["wide"] if stream not in facts.wide
    ]
    return lines


def forgotten(found: list[Facts], languages: set[str], budget: dict) -> list[str]:
    """Kernels of the budget that were not among those compiled."""
    names = {facts.name for facts in found}
    return [name for name in budget.get("kernels", {}) if name not in names and name.split("/", 1)[0] in languages]

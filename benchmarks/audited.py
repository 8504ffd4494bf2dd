# SPDX-License-Identifier: Apache-2.0
"""Kernels for GPUs that no run has measured: what the audit knows of them, and the time below which they cannot be.

A row's bound is the longer of two times: that of the bytes of the op table at the bandwidth of the GPU's data sheet,
and that of the declared operations at its rate of fp32. It is no measurement and says so.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .cases import Case, name_of
from .roofline import Roofs

MARK = "audited, not run"
BUDGETS = Path(__file__).with_name("budgets")


@dataclasses.dataclass(frozen=True)
class Sheet:
    """A GPU by its maker's data sheet: bytes a second of memory, operations a second in fp32 outside tensor cores."""

    name: str
    memory: float
    arithmetic: float


#: One GPU for each architecture with a budget.
SHEETS = {
    "sm_80": Sheet("A100 SXM 80 GB", 2.039e12, 19.5e12),
    "sm_90": Sheet("H100 SXM", 3.35e12, 67e12),
    "sm_100": Sheet("B200", 8.0e12, 75e12),
    "sm_120": Sheet("GeForce RTX 5090", 1.792e12, 104.8e12),
}


def kernels(folder: Path = BUDGETS) -> dict[str, dict[tuple[str, str], list[dict[str, Any]]]]:
    """Limits of the audited kernels by architecture, language and family; empty without budgets."""
    found: dict[str, dict[tuple[str, str], list[dict[str, Any]]]] = {}
    for path in sorted(folder.glob("sm_*.json"), key=lambda path: int(path.stem[3:])):
        by_family = found.setdefault(path.stem, {})
        for name, limits in json.loads(path.read_text())["kernels"].items():
            language, family = name.split("/")[:2]
            by_family.setdefault((language, family), []).append(limits)
    return found


def rows(
    cases: Mapping[str, Sequence[Case]], measured: Iterable[str] = (), folder: Path = BUDGETS
) -> list[dict[str, Any]]:
    """A row for each case and architecture whose kernels are in the budget, but for architectures that were
    ``measured`` in this run."""
    found = []
    for arch, audited in kernels(folder).items():
        if arch in set(measured) or arch not in SHEETS:
            continue
        sheet = SHEETS[arch]
        roofs = Roofs(sheet.memory, {"fp32": sheet.arithmetic})
        for family, of_family in cases.items():
            limits = {
                language: audited[language, family] for language in ("cuda", "triton") if (language, family) in audited
            }
            if not limits:
                continue
            every = [limit for own in limits.values() for limit in own]
            found += [
                {
                    "status": MARK,
                    "arch": arch,
                    "gpu": sheet.name,
                    "family": family,
                    "languages": list(limits),
                    "kernels": len(every),
                    "registers": max(limit["registers"] for limit in every),
                    "dtype": name_of(case.dtype),
                    "granularity": case.granularity,
                    "passes": case.passes,
                    "elements": case.elements,
                    "bytes": case.bytes,
                    "operations": case.operations,
                    "bound_seconds": roofs.least(case.bytes, case.operations, name_of(case.dtype)),
                }
                for case in of_family
            ]
    return found

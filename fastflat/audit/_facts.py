# SPDX-License-Identifier: Apache-2.0
"""What the audit knows about one compiled kernel, and the rules that hold whatever the budget says."""

from __future__ import annotations

import dataclasses

from fastflat.audit._ptx import FORBIDDEN

#: Bytes of the widest access that every supported GPU has.
WIDE = 16


@dataclasses.dataclass
class Facts:
    """One kernel for one architecture.

    Attributes:
        name: source, kernel and variant; the key of the budget.
        family: op family, the file stem.
        language: ``"triton"`` or ``"cuda"``.
        arch: ``"sm_90"``.
        registers, local, shared: see :class:`fastflat.audit._machine.Usage`.
        forbidden: forbidden PTX instructions and how often each occurs.
        wide: streams that are accessed 16 bytes at a time, as ``load x_ptr``.
        narrow: streams that must be and are not, with what was found.
    """

    name: str
    family: str
    language: str
    arch: str
    registers: int
    local: int
    shared: int
    forbidden: dict[str, int]
    wide: list[str]
    narrow: dict[str, str]

    def failures(self) -> list[str]:
        """Broken rules, one line each."""
        lines = []
        if self.local:
            lines.append(f"{self.local} bytes of local memory a thread: registers are spilled")
        for opcode, count in sorted(self.forbidden.items()):
            reason = next(why for pattern, why in FORBIDDEN.items() if pattern in opcode)
            lines.append(f"{count} x {opcode}: {reason}")
        lines += [f"{stream} is not accessed {WIDE} bytes at a time: {found}" for stream, found in self.narrow.items()]
        return lines


def streams(kernel, required: dict[str, int], names: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """Which streams of a PtxKernel are wide, and which of the required ones are not.

    ``required``: bytes a thread must move by wide accesses alone, by ``"load NAME"`` or ``"store NAME"``: then what is
    narrower beside them serves the ragged end. ``names``: names of the bases that PTX calls ``param N``.
    """
    moved = {}
    for kind in ("load", "store"):
        for base, count in kernel.bytes_by_base(kind, WIDE).items():
            moved[f"{kind} {names.get(base, base)}"] = count
    narrow = {}
    for stream, wanted in required.items():
        if moved.get(stream, 0) < wanted:
            found = {a.bytes for a in kernel.accesses if f"{a.kind} {names.get(a.base, a.base)}" == stream}
            widths = ", ".join(map(str, sorted(found, reverse=True))) or "no"
            narrow[stream] = f"{moved.get(stream, 0)} of {wanted} bytes a thread are; accesses of {widths} bytes"
    return sorted(moved), narrow

# SPDX-License-Identifier: Apache-2.0
"""Reads PTX: which instructions a kernel uses and how wide it reads and writes each of its pointer arguments."""

from __future__ import annotations

import collections
import dataclasses
import re

#: Instructions that would give other bits than the other backends, with the reason.
FORBIDDEN = {
    "div.full": "approximate division",
    ".approx": "approximate arithmetic",
    ".ftz": "flushes subnormals to zero",
    "fma.": "contracted a*b+c: one rounding instead of two",
}

_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(")
_STATEMENT = re.compile(r"(?:@!?%\w+\s+)?([a-z][\w.:]*)\s+(.*)", re.DOTALL)
_REGISTER = re.compile(r"%\w+")
_WIDTH = re.compile(r"\.(?:v([248])\.)?[a-z]+(\d+)$")
_PARAMETER = re.compile(r"_param_(\d+)(?:\s*\+\s*(\d+))?")
_ENTRY_OF_TABLE = re.compile(r"\[\s*(%\w+)(?:\s*\+\s*(-?\d+))?\s*\]")


@dataclasses.dataclass(frozen=True)
class Access:
    """Global accesses of one form: ``base`` is the argument the address comes from, "" when it is not known."""

    kind: str
    base: str
    bytes: int


@dataclasses.dataclass
class PtxKernel:
    """One ``.entry``. ``accesses`` counts instructions; ``forbidden`` counts uses by instruction."""

    name: str
    accesses: dict[Access, int]
    forbidden: dict[str, int]

    def bytes_by_base(self, kind: str, at_least: int = 16) -> dict[str, int]:
        """Bytes a thread moves for each base by accesses of at least that width, loops counted once."""
        moved: dict[str, int] = collections.Counter()
        for access, count in self.accesses.items():
            if access.kind == kind and access.bytes >= at_least:
                moved[access.base] += access.bytes * count
        return dict(moved)


def parse(text: str) -> list[PtxKernel]:
    """All kernels of a PTX file."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*|^\s*\.loc[^\n]*", "", text, flags=re.DOTALL | re.MULTILINE)
    # Debug sections and device functions follow or precede entries; an entry's body is its own pair of braces.
    return [_kernel(match[1], _body(text, match.end())) for match in _ENTRY.finditer(text)]


def _body(text: str, start: int) -> str:
    begin = text.index("{", start)
    depth = 0
    for brace in re.finditer(r"[{}]", text[begin:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[begin + 1 : begin + brace.start()]
    raise ValueError("PTX ends inside a kernel")


def _kernel(name: str, body: str) -> PtxKernel:
    sources: dict[str, set[str]] = collections.defaultdict(set)
    tables: dict[str, tuple[str, int]] = {}
    touched, forbidden = [], collections.Counter()
    for statement in body.split(";"):
        # Labels and braces of inner scopes stand before the instruction.
        match = _STATEMENT.search(re.sub(r"^\s*(?:[$\w]+:\s*|\{(?!\s*%)|\}\s*)*", "", statement))
        if match is None:
            continue
        opcode, operands = match[1], match[2]
        if opcode.startswith("."):
            continue
        for pattern in FORBIDDEN:
            if pattern in opcode if pattern.startswith(".") else opcode.startswith(pattern):
                forbidden[opcode] += 1
        if opcode.startswith(("ld.global", "st.global", "atom.global", "red.global")):
            address = re.search(r"\[\s*(%\w+)", operands)
            touched.append(("load" if opcode[0] == "l" else "store", address[1] if address else "", _bytes(opcode)))
        elif not opcode.startswith(("ld.global", "ld.shared", "st.")):
            _trace(sources, opcode, operands, tables)
    accesses = collections.Counter(Access(kind, _base(sources, reg), width) for kind, reg, width in touched)
    return PtxKernel(name, dict(accesses), dict(forbidden))


def _bytes(opcode: str) -> int:
    width = _WIDTH.search(opcode)
    if width is None:
        raise ValueError(f"PTX access without a width: {opcode}")
    return int(width[1] or 1) * int(width[2]) // 8


def _trace(
    sources: dict[str, set[str]], opcode: str, operands: str, tables: dict[str, tuple[str, int]] | None = None
) -> None:
    """Notes where an address may come from: through additions, conversions and moves, not through products.

    ``tables`` has the registers that point into an argument, with the argument and the constant part of the offset:
    arrays of pointers inside one are told apart by it."""
    tables = {} if tables is None else tables
    if opcode.startswith("ld.param"):
        parameter = _PARAMETER.search(operands)
        if parameter is None:
            entry = _ENTRY_OF_TABLE.search(operands)
            if entry and entry[1] in tables:
                argument, offset = tables[entry[1]]
                at = offset + int(entry[2] or 0)
                sources[_REGISTER.search(operands)[0]].add(f"param {argument}+{at}")
            return  # else the result of a called function
        for offset, register in enumerate(_REGISTER.findall(operands.split("[")[0])):
            # Members of a vector load lie 8 bytes apart: only 64-bit ones can be pointers.
            at = int(parameter[2] or 0) + 8 * offset
            sources[register].add(f"param {parameter[1]}" + (f"+{at}" if at else ""))
        return
    parts = [part.strip() for part in operands.split(",")]
    _follow(tables, opcode, parts)
    if opcode.startswith(("mad", "fma")):
        parts = [parts[0], parts[-1]]
    elif not opcode.startswith(("add", "sub", "or", "mov", "cvta", "selp")):
        return
    for part in parts[1:]:
        if part.startswith("%"):
            sources[parts[0]].add(part)


def _follow(tables: dict[str, tuple[str, int]], opcode: str, parts: list[str]) -> None:
    """Keeps ``tables`` through moves and sums; products and what is taken away are indices."""
    if opcode.startswith("mov") and (argument := _PARAMETER.search(parts[1])):
        tables[parts[0]] = (argument[1], 0)
    elif opcode.startswith(("mov", "add.s64", "sub.s64")):
        known = [tables[part] for part in (parts[1:2] if opcode.startswith("sub") else parts[1:]) if part in tables]
        if known:
            constant = sum(int(part) for part in parts[1:] if part.lstrip("-").isdigit())
            tables[parts[0]] = (known[0][0], known[0][1] + (-constant if opcode.startswith("sub") else constant))
    elif opcode.startswith("mad") and parts[-1] in tables:
        tables[parts[0]] = tables[parts[-1]]


def _base(sources: dict[str, set[str]], register: str) -> str:
    """The one argument that an address register leads back to."""
    seen, todo, found = set(), [register], set()
    while todo:
        at = todo.pop()
        if at in seen:
            continue
        seen.add(at)
        if at.startswith("param"):
            found.add(at)
        else:
            todo.extend(sources.get(at, ()))
    return found.pop() if len(found) == 1 else " or ".join(sorted(found))

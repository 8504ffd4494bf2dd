# SPDX-License-Identifier: Apache-2.0
"""The parts of a record in the order in which the terminal and the page show them, each with its table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from . import report

Table = tuple[list[str], list[list[str]]]
#: Families whose rows are steps of optimizers, of networks, products with matrices; the others are kernels.
OPTIMIZERS, NETWORKS, PRODUCTS = ("sharpness", "descent"), ("step",), ("curvature",)


@dataclasses.dataclass(frozen=True)
class Section:
    """Rows of one family on one device."""

    title: str
    family: str
    device: str
    rows: list[dict[str, Any]]
    table: Table


def of(result: dict[str, Any]) -> Iterator[Section]:
    """Kernels, optimizers, networks, products; family by family, device by device."""
    rows = result["rows"]
    many = len({device_of(row, result) for row in rows}) > 1
    families = list(dict.fromkeys(family_of(row, result) for row in rows))
    later = [*OPTIMIZERS, *NETWORKS, *PRODUCTS]
    families.sort(key=lambda family: later.index(family) + 1 if family in later else 0)
    for family in families:
        of_family = [row for row in rows if family_of(row, result) == family]
        for device in dict.fromkeys(device_of(row, result) for row in of_family):
            own = [row for row in of_family if device_of(row, result) == device]
            title = f"{family} on {device}" if many else family
            yield Section(title, family, device, own, _table(family)({**result, "rows": own}))


def family_of(row: dict[str, Any], result: dict[str, Any]) -> str:
    """The first records of training steps name no family."""
    return row.get("family") or str(result.get("benchmark", "rows"))


def device_of(row: dict[str, Any], result: dict[str, Any]) -> str:
    """Records of one device name it once."""
    return row.get("device") or str(result.get("device", "cpu"))


def _table(family: str) -> Callable[[dict[str, Any]], Table]:
    if family in OPTIMIZERS:
        return report.optimizer_table
    if family in NETWORKS:
        return report.step_table
    return report.curvature_table if family in PRODUCTS else report.quantize_table


def roofline_table(result: dict[str, Any]) -> Table:
    """Head and lines of what the devices can do."""
    lines = []
    for row in result.get("roofline", []):
        unit = "FLOP/s" if row["what"] == "gemm" else "B/s"
        spread = 100 * (row["q3"] - row["q1"]) / row["seconds"] / 2
        size = f"{row['size']} x {row['size']}" if row["what"] == "gemm" else f"{row['size'] >> 20} MiB an array"
        line = [row["device"], str(row["threads"]), row["what"], row["dtype"], size]
        lines.append([*line, f"{report.engineering(row['rate'])}{unit}", f"+-{spread:.0f} %"])
    return ["device", "threads", "roof", "type", "size", "rate", "spread"], lines


def audited_table(result: dict[str, Any]) -> Table:
    """Head and lines of kernels that have not run: the least traffic and operations, and the static bound by GPU."""
    rows = result.get("audited", [])
    gpus = list(dict.fromkeys(row["gpu"] for row in rows))
    cases: dict[tuple, dict[str, dict[str, Any]]] = {}
    for row in rows:
        key = tuple(row[field] for field in ("family", "granularity", "passes", "elements", "dtype"))
        cases.setdefault(key, {})[row["gpu"]] = row
    head = ["kernel", "case", "elements", "type", "compiled for", "bytes", "operations"]
    head += [f"{gpu}: not below" for gpu in gpus] + ["status"]
    lines = []
    for (family, granularity, passes, elements, dtype), by_gpu in cases.items():
        first = next(iter(by_gpu.values()))
        line = [family, f"{granularity} {passes}", report.elements(elements), dtype, ", ".join(first["languages"])]
        line += [f"{report.engineering(first['bytes'])}B", report.engineering(first["operations"]).strip()]
        line += [report.seconds(by_gpu[gpu]["bound_seconds"]) if gpu in by_gpu else "-" for gpu in gpus]
        lines.append([*line, str(first["status"])])
    return head, lines

# SPDX-License-Identifier: Apache-2.0
"""What the device can do, measured before anything else: memory by a copy and a triad, arithmetic by a product of
matrices of each type. A row's roofline is the longer of the two times that its bytes and its operations take at these
rates."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from . import measure, timers
from .cases import name_of
from .devices import Device
from .measure import Effort

#: Bytes of an array of copy and triad, beyond any last-level cache; side of the matrices.
ARRAY = {"cpu": 1 << 28, "cuda": 1 << 30}
SIDE = {"cpu": 2048, "cuda": 8192}
#: With --quick.
QUICK_ARRAY = {"cpu": 1 << 27, "cuda": 1 << 29}
QUICK_SIDE = {"cpu": 1024, "cuda": 4096}
#: The type in which the kernels compute on data of a type.
_COMPUTE = {"fp32": "fp32", "bf16": "fp32", "fp16": "fp32", "fp64": "fp64"}


@dataclasses.dataclass(frozen=True)
class Roofs:
    """Rates of a device at a number of threads: ``memory`` in bytes a second, ``arithmetic`` in operations a second by
    the name of a type."""

    memory: float
    arithmetic: dict[str, float]

    def least(self, moved: float, operations: float, dtype: str, memory: float = 0.0) -> float:
        """Seconds below which nothing that moves so many bytes and does so many operations can be.

        `memory` is a bandwidth that a copy of as many bytes reached: small data lies in caches, which are faster than
        memory.
        """
        rate = self.arithmetic.get(_COMPUTE.get(dtype, dtype), 0.0)
        return max(moved / max(self.memory, memory), operations / rate if rate else 0.0)


def rows(
    device: Device, threads: int, dtypes: Sequence[torch.dtype], effort: Effort, quick: bool = False
) -> list[dict[str, Any]]:
    """Copy and triad in fp32 and a product of square matrices in each type, in turns.

    A row holds ``what``, ``dtype``, ``device``, ``threads``, the median ``seconds`` with quartiles, and ``rate``: bytes
    or operations a second.
    """
    length = (QUICK_ARRAY if quick else ARRAY)[device.kind] // 4
    side = (QUICK_SIDE if quick else SIDE)[device.kind]
    kinds = [torch.float32, *(d for d in dict.fromkeys(dtypes) if d is not torch.float32)]
    with device.active(), measure.host_threads(threads, device), _exact_products():
        a, b = (torch.ones(length, device=device.place) for _ in range(2))
        c = torch.empty_like(a)
        calls = {("copy", "fp32"): lambda: c.copy_(a), ("triad", "fp32"): lambda: torch.add(a, b, alpha=0.5, out=c)}
        work = {("copy", "fp32"): 8 * length, ("triad", "fp32"): 12 * length}
        for dtype in kinds:
            calls["gemm", name_of(dtype)] = _product(side, dtype, device.place)
            work["gemm", name_of(dtype)] = 2 * side**3
        timings = measure.interleaved(calls, effort, timer=timers.of(device))
    found = []
    for key, timing in timings.items():
        what, dtype = key
        amount = {"size": side if what == "gemm" else 4 * length}
        amount["operations" if what == "gemm" else "bytes"] = work[key]
        found.append(
            {"what": what, "dtype": dtype, "device": device.name, "threads": threads, **amount,
             "seconds": timing.median, "q1": timing.q1, "q3": timing.q3, "best": timing.best,
             "rounds": timing.rounds, "rate": work[key] / timing.median}
        )  # fmt: skip
    return found


def roofs(measured: Sequence[dict[str, Any]], device: str, threads: int) -> Roofs | None:
    """The roofs among measured rows; None where this device was not measured with so many threads."""
    own = [row for row in measured if (row["device"], row["threads"]) == (device, threads)]
    if not own:
        return None
    memory = max(row["rate"] for row in own if row["what"] != "gemm")
    return Roofs(memory, {row["dtype"]: row["rate"] for row in own if row["what"] == "gemm"})


def _product(side: int, dtype: torch.dtype, place: torch.device):
    a, b = (torch.full((side, side), 0.5, dtype=dtype, device=place) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


@contextlib.contextmanager
def _exact_products():
    """fp32 products in fp32: no roof of TF32 above kernels that compute in fp32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)

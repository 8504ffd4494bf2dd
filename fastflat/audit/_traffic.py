# SPDX-License-Identifier: Apache-2.0
"""Bytes of global memory per element, by running the kernels on the CPU and counting what they touch.

CUDA kernels run in the emulator of ``tests/emulator``, whose accessors count. Triton kernels run in Triton's
interpreter, in a process of its own; each load and store that its mask lets through is counted. Scales, zero-points
and their gradients are parameters, not traffic.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import torch

from fastflat import _ops
from fastflat.audit import _calls

#: What a kernel may move beyond the least: partial sums and ragged ends.
SLACK = 1.05
#: Layouts: shape, axis, group. Large enough that partial sums do not count, small enough to interpret in seconds.
PLACES = {
    "tensor": ((1 << 15,), -1, 0),
    "rows": ((24, 1152), 0, 0),
    "images": ((64, 8, 8, 8), 1, 0),
    "columns": ((512, 64), 1, 0),
    "groups": ((32, 1024), -1, 32),
}
#: CUDA kernels give a small matrix more partial sums than its size would allow: measure a large one.
_LARGE = {"columns": ((1 << 16, 64), 1, 0)}
#: Arguments of Triton kernels that hold one value a scale, or a call, and are made on the way: they stay in the caches
#: like the op's own arguments of that size. The table of a list of tensors has a row of 88 bytes for each.
_PARAMETERS = ("scale_ptr", "about_ptr", "alpha_ptr", "k_ptr", "sigma", "tensors")
_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
#: Where Triton kernels are interpreted in fp32, too: tiles are those of bf16, beside which partial sums count for more.
_ALSO_FP32 = ("tensor", "columns")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes per element that an op moved on one layout, and the least possible."""

    name: str
    family: str
    language: str
    moved: float
    least: float

    def failures(self) -> list[str]:
        if self.moved <= SLACK * self.least:
            return []
        return [f"{self.moved:.3f} bytes an element, the least is {self.least:.3f} and {SLACK} times that the limit"]


def cases(places: dict, fp32: Iterable[str]) -> Iterator[tuple[str, str, tuple, float, torch.Tensor]]:
    """Name, op, arguments, least bytes per element, and x; on all `places` in bf16, on some of them in fp32."""
    torch.manual_seed(0)
    for type_name, dtype in _TYPES.items():
        for place, (shape, axis, group) in places.items():
            if dtype == torch.float32 and place not in fp32:
                continue
            x = torch.randn(shape).to(dtype)
            for op in _ops.OPS.values():
                for arguments, streams in _calls.of(op).measured(op.name, place, x, axis, group):
                    yield f"{op.name} {type_name} {place}", op.name, arguments, float(streams * x.element_size()), x


def emulated(root: Path) -> list[Traffic]:
    """CUDA kernels, through the emulator of the checkout at `root`."""
    build = _load("fastflat_emulator_build", root / "tests" / "emulator" / "build.py")
    shim = _load("fastflat_emulated", root / "tests" / "emulator" / "emulated.py")
    module = _load("fastflat_emulator", build.build("fastflat_emulator"))
    ops, found = shim.Emulated(module), []
    for name, op, arguments, least, x in cases({**PLACES, **_LARGE}, PLACES):
        module.take_counts()
        getattr(ops, op)(*arguments)
        counts = module.take_counts()
        moved = (counts["read"] + counts["written"]) / x.numel()
        found.append(Traffic(f"cuda/{name}", _ops.OPS[op].family, "cuda", moved, least))
    return found


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def interpreted() -> list[Traffic]:
    """Triton kernels, in the interpreter. Raises RuntimeError with its last words if it fails."""
    # The interpreter is chosen when triton is imported, so it needs a process that has not done that yet.
    here = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(here), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "from fastflat.audit import _traffic; _traffic.interpret()"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"fastflat audit: Triton's interpreter failed: {done.stderr.strip().splitlines()[-1]}")
    return [Traffic(**row) for row in json.loads(done.stdout)]


def interpret() -> None:
    """The other side of :func:`interpreted`: prints the measurements as JSON."""
    from triton.runtime import interpreter

    from fastflat.audit import _triton

    moved, parameters, given = 0, [], []

    def counting(method, position):
        def counted(self, pointers, *rest):
            nonlocal moved
            mask = rest[position].data.astype(bool)  # masks of constants come as integers
            addresses = pointers.data[mask] if pointers.data.shape == mask.shape else pointers.data
            first = int(addresses.flat[0]) if mask.any() else None
            if first is not None and not any(begin <= first < end for begin, end in parameters):
                moved += int(mask.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
            return method(self, pointers, *rest)

        return counted

    def launching(method):
        def launched(self, *args, **options):
            named = zip(self.arg_names, args, strict=False)
            small = [t for name, t in named if name in _PARAMETERS and isinstance(t, torch.Tensor)]
            parameters[:] = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in [*given, *small]]
            return method(self, *args, **options)

        return launched

    # Loads and stores without a mask come through here, too.
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    builder.create_masked_load = counting(builder.create_masked_load, 0)
    builder.create_masked_store = counting(builder.create_masked_store, 1)
    executor.__call__ = launching(executor.__call__)
    rows = []
    for name, op, arguments, least, x in cases(PLACES, _ALSO_FP32):
        moved = 0
        tensors = itertools.chain.from_iterable(a if isinstance(a, list) else [a] for a in arguments)
        given[:] = [t for t in tensors if isinstance(t, torch.Tensor) and t.numel() < x.numel()]
        getattr(_triton.family(_ops.OPS[op].family), op)(*arguments)
        rows.append(Traffic(f"triton/{name}", _ops.OPS[op].family, "triton", moved / x.numel(), least))
    print(json.dumps([dataclasses.asdict(row) for row in rows]))

# SPDX-License-Identifier: Apache-2.0
"""Compiles what the Triton launch functions launch, for any architecture and without a GPU.

The launch functions run on small host tensors while a recorder stands in for the launch itself: the audit sees the
very specialisations that users get, and a kernel that nothing launches is found.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch

from fastflat import _ops
from fastflat.audit import _calls, _machine, _ptx
from fastflat.audit._facts import Facts, streams

THREADS = 32
_INPUTS, _OUTPUTS = ("x_ptr", "gy_ptr", "tx_ptr"), ("y_ptr", "gx_ptr")
_LABELS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}

#: Data that reaches every way through the launch functions: shape, axis, group, and whether rows stay aligned.
PLACES = {
    "tensor": ((1 << 18,), -1, 0, True),
    "long rows": ((64, 4096), 0, 0, True),
    "rows": ((256, 1152), 0, 0, True),
    "short rows": ((512, 288), 0, 0, True),
    "groups": ((256, 1024), -1, 32, True),
    "images": ((128, 64, 14, 14), 1, 0, True),
    "columns": ((4096, 256), 1, 0, True),
    "odd rows": ((999, 37), 0, 0, False),
    "odd columns": ((999, 37), 1, 0, False),
}
#: Types compile alike but for width and conversion: fp16 like bf16, fp64 with twice the registers.
_FEW = {torch.float16: ("tensor", "columns"), torch.float64: ("tensor", "groups", "columns", "odd rows")}


@dataclasses.dataclass(frozen=True)
class Launch:
    """One recorded launch: the kernel with the types of its arguments and its compile-time constants."""

    family: str
    kernel: object
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    warps: int
    aligned: bool

    @property
    def name(self) -> str:
        types = dict(self.signature)
        data = [types[p].lstrip("*") for p in (*_INPUTS, *_OUTPUTS) if p in types]
        shown = {"i16": "bf16"} if self.family != "identity" else {}
        parts = [*dict.fromkeys(shown.get(t, t) for t in data)] + [f"{k}={v}" for k, v in self.constants]
        return f"triton/{self.family}/{self.kernel.__name__}[{' '.join(parts)}]"

    def required(self) -> dict[str, int]:
        """Bytes that each thread must move 16 at a time, by stream."""
        if not self.aligned:
            return {}
        constants, types = dict(self.constants), dict(self.signature)
        elements = constants.get("BLOCK") or constants.get("ROWS", 0) * constants.get("COLUMNS", 0)
        wanted = {}
        for kind, pointers in (("load", _INPUTS), ("store", _OUTPUTS)):
            for pointer in pointers:
                if pointer in types and not (pointer == "tx_ptr" and not constants["HAS_TX"]):
                    bits = int(types[pointer].lstrip("*fpi"))
                    wanted[f"{kind} {pointer}"] = elements * bits // 8 // (THREADS * self.warps)
        return wanted


def family(name: str) -> ModuleType:
    """The Triton module of an op family; from the checkout where fastflat is not installed."""
    package = "fastflat.triton_kernels"
    if package not in sys.modules and importlib.util.find_spec(package) is None:
        folder = checkout() / "triton_kernels" if checkout() else Path()
        if not (folder / "__init__.py").is_file():
            raise RuntimeError(f"fastflat audit: {package} is not installed; pip install --no-build-isolation -e .")
        spec = importlib.util.spec_from_file_location(
            package, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        sys.modules[package] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[package])
    return importlib.import_module(f"{package}.{name}")


def checkout() -> Path | None:
    """The source tree that this package runs from, or None in an installation."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / "csrc" / "math").is_dir() else None


@contextlib.contextmanager
def recorded(found: dict[Launch, None], name: str, aligned: bool) -> Iterator[None]:
    """Launches inside the block are noted in `found` and not executed."""
    from triton.runtime.jit import JITFunction, mangle_type

    def run(self, *args, grid, warmup, **options):
        parameters = self.params
        constants = tuple((p.name, a) for p, a in zip(parameters, args, strict=True) if p.is_constexpr)
        signature = tuple((p.name, mangle_type(a)) for p, a in zip(parameters, args, strict=True) if not p.is_constexpr)
        found[Launch(name, self, signature, constants, options["num_warps"], aligned)] = None

    with mock.patch.object(JITFunction, "run", run):
        yield


def launches() -> list[Launch]:
    """Every specialisation worth compiling, in a fixed order.

    Raises RuntimeError if a kernel of a family's modules is launched by none of them.
    """
    import triton

    if triton.knobs.runtime.interpret:
        raise RuntimeError("fastflat audit: TRITON_INTERPRET is set and Triton compiles nothing; unset it")
    found: dict[Launch, None] = {}
    for op in _ops.OPS.values():
        module = family(op.family)
        for place, (shape, axis, group, aligned) in PLACES.items():
            for dtype in _LABELS:
                if place not in _FEW.get(dtype, PLACES):
                    continue
                with recorded(found, op.family, aligned):
                    for arguments in _calls.of(op).compiled(op.name, place, shape, axis, group, dtype):
                        getattr(module, op.name)(*arguments)
    _complete(found)
    # An odd place may meet a specialisation that an aligned one also has: the stricter one counts.
    unique: dict[str, Launch] = {}
    for launch in sorted(found, key=lambda launch: launch.aligned):
        unique[launch.name] = launch
    return [unique[name] for name in sorted(unique)]


def _complete(found: dict[Launch, None]) -> None:
    from triton.runtime.jit import JITFunction

    launched = {launch.kernel.fn for launch in found}
    for name, module in list(sys.modules.items()):
        if not name.startswith("fastflat.triton_kernels"):
            continue
        for value in vars(module).values():
            if isinstance(value, JITFunction) and value.__name__.endswith("_kernel") and value.fn not in launched:
                raise RuntimeError(f"fastflat audit: {name}.{value.__name__} is launched by nothing that is audited")


def compile_launch(launch: Launch, arch: str) -> Facts:
    """Compiles one launch for ``arch`` and reads the result."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, constants, types = launch.kernel, dict(launch.constants), dict(launch.signature)
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types.get(name, "").startswith("*")},
    )
    options = {"num_warps": launch.warps, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", int(arch[3:]), 32), options=options)
    return facts(launch.name, launch.family, arch, compiled.asm, launch.required(), _runtime(launch))


def _runtime(launch: Launch) -> dict[str, str]:
    """Names of the arguments that PTX numbers: constants are no arguments."""
    return {f"param {i}": name for i, (name, _) in enumerate(launch.signature)}


def facts(name: str, family: str, arch: str, asm: dict, required: dict[str, int], names: dict[str, str]) -> Facts:
    """Facts of one kernel from the PTX and the cubin that Triton's compiler returns."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(asm["cubin"])
        (used,) = _machine.usage(cubin).values()
    (kernel,) = _ptx.parse(asm["ptx"])
    wide, narrow = streams(kernel, required, names)
    return Facts(name, family, "triton", arch, used.registers, used.local, used.shared, kernel.forbidden, wide, narrow)

# SPDX-License-Identifier: Apache-2.0
"""No timing of wrong results: the kernels in force against the reference, on a small battery."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor

import fastflat
from fastflat import QuantSpec
from fastflat.optim import BASES

from .cases import Data, bitplane, mixquant
from .peers import PEERS

_SPECS = (
    QuantSpec.lsq(bits=4),
    QuantSpec.lsq(bits=2, signed=False),
    QuantSpec.lsq(bits=4, axis=0),
    QuantSpec.lsq(bits=8, axis=1),
    QuantSpec.lsq(bits=4, group=32),
    QuantSpec.torch(bits=8),
    QuantSpec.torch(bits=4, axis=0),
    QuantSpec.lsq(bits=4, axis=0, noise="uniform"),
    QuantSpec.lsq(bits=4, axis=0, noise="normal"),
    QuantSpec.lsq(bits=4, noise="temper"),
    QuantSpec.lsq(bits=4, group=32, noise="bypass"),
    QuantSpec.lsq(bits=4, axis=1, rounding="stochastic"),
    QuantSpec.lsq(bits=8, axis=0, format="e4m3"),
    QuantSpec.lsq(bits=4, axis=0, format="e2m1"),
    QuantSpec.torchao(bits=4, axis=0),
    QuantSpec.brevitas(bits=4, axis=0, compute="input", estimator="lsq"),
    QuantSpec.modelopt(bits=4, axis=0),
)
#: These take their scale from the data.
_DYNAMIC = (
    QuantSpec(bits=4, axis=0, mask="none"),
    *(QuantSpec.mx(format, rule) for format, rule in (("e4m3", "floor"), ("e2m1", "even"), ("e5m2", "rceil"))),
    QuantSpec.nvfp4(),
)
#: Seed and offset of the draws, and how much of them.
_STATE, _NU, _A = (20240817, 5), 0.7, 0.3
_LISTS = ((), (3,), (33, 7), (1025,), (2, 3, 4, 5), (70001,))
_SHAPES = ((5, 32), (67, 96), (3, 4096))
_SPECIAL = (0.0, -0.0, 0.5, -0.5, 1e-40, 1e30, float("inf"), float("-inf"), float("nan"))
#: Sums of at most 4096 * 3 products of order one in fp32, in different orders.
_TOLERANCE = 1e-4


def mistakes(device: torch.device, dtypes: list[torch.dtype]) -> list[str]:
    """What the kernels in force compute otherwise than the reference: maps in any bit, sums beyond the tolerance."""
    found = []
    generator = torch.Generator().manual_seed(1)
    for spec, shape, dtype in itertools.product(_SPECS + _DYNAMIC, _SHAPES, dtypes):
        x = torch.randn(shape, generator=generator)
        x.view(-1)[: len(_SPECIAL)] = torch.tensor(_SPECIAL)
        gy = torch.randn(shape, generator=generator)
        scale = None
        if spec not in _DYNAMIC:
            scale = (0.2 + torch.rand(_scales(spec, shape), generator=generator)).to(device)
        arguments = (x.to(device, dtype), scale, gy.to(device, dtype), spec)
        with fastflat.backend("reference"):
            wanted = _passes(*arguments)
        got = _passes(*arguments)
        where = f"{_words(spec)}, {list(shape)}, {dtype}"
        for name, a, b in zip(("y", "dx"), got, wanted, strict=False):
            if not _same_bits(a, b):
                found.append(f"{name} of fake_quantize ({where})")
        if len(wanted) > 2 and not torch.allclose(got[2], wanted[2], _TOLERANCE, _TOLERANCE, equal_nan=True):
            found.append(f"dscale of fake_quantize ({where})")
    for case in [*mixquant.cases([2**12], dtypes), *bitplane.cases([2**12], dtypes)]:
        data = case.data(device)
        with fastflat.backend("reference"):
            wanted = _case_passes(data)
        for name, a, b in zip(("y", "dx", "dscale"), _case_passes(data), wanted, strict=True):
            # A scale is summed over; the second planes, in its place, are a map.
            sums = name == "dscale" and case.family == "mixquant"
            if not (torch.allclose(a, b, _TOLERANCE, _TOLERANCE) if sums else _same_bits(a, b)):
                found.append(f"{name} of {case.label}")
    return found


def step_mistakes(device: torch.device, dtypes: list[torch.dtype]) -> list[str]:
    """What steps of optimizers end in otherwise than with the reference, beyond the order of their sums."""
    found = []
    for dtype, base, storage in itertools.product(dtypes, BASES, ("backup", "swap", "master")):
        ends = []
        for name in ("reference", None):
            with fastflat.backend(name) if name else contextlib.nullcontext():
                ends.append(_steps(device, dtype, base, storage))
        tolerance = 1e-5 if dtype.itemsize >= 4 else 2**-7
        if not all(torch.allclose(a, b, tolerance, tolerance, equal_nan=True) for a, b in zip(*ends, strict=True)):
            found.append(f"weights after SAM over {base}, storage {storage}, {dtype}")
    return found


def _steps(device: torch.device, dtype: torch.dtype, base: str, storage: str) -> list[Tensor]:
    """Weights of awkward sizes after three steps."""
    generator = torch.Generator().manual_seed(2)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in _LISTS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what 16 bits lose
        opt = fastflat.optim.SAM(params, base, lr=0.01, rho=0.1, storage=storage)
        for second in (False, True) * 3:
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).to(device, dtype)
            opt.second_step() if second else opt.first_step(zero_grad=True)
    return [p.detach() for p in params]


def _case_passes(data: Data) -> tuple[Tensor, ...]:
    y = PEERS[data.case.family]["fastflat"](data)(data.x, data.scale)
    return (y.detach(), *torch.autograd.grad(y, (data.x, data.scale), data.gy))


def _scales(spec: QuantSpec, shape: tuple[int, int]) -> tuple[int, ...]:
    if spec.group is not None:
        return (shape[0], shape[1] // spec.group)
    return () if spec.axis is None else (shape[spec.axis],)


def _words(spec: QuantSpec) -> str:
    """The fields of a spec that are not the default."""
    usual = QuantSpec().to_dict()
    return ", ".join(f"{name} {value}" for name, value in spec.to_dict().items() if value != usual[name]) or "8 bits"


def _passes(x: Tensor, scale: Tensor | None, gy: Tensor, spec: QuantSpec) -> tuple[Tensor, ...]:
    """y, dx and, where it trains, the gradient of the scale."""
    x = x.clone().requires_grad_()
    if scale is None:
        y = fastflat.fake_quantize_dynamic(x, spec=spec)[0]
        return (y.detach(), *torch.autograd.grad(y, x, gy))
    amounts = {}
    if spec.draws:
        amounts["state"] = torch.tensor(_STATE, device=x.device)
    if spec.noise != "none":
        amounts["nu"] = _NU
    if spec.noise == "temper":
        amounts["a"] = _A
    inputs = (x,)
    if spec.trains_scale:
        scale = scale.clone().requires_grad_()
        inputs = (x, scale)
    y = fastflat.fake_quantize(x, scale, spec=spec, **amounts)
    return (y.detach(), *torch.autograd.grad(y, inputs, gy))


def _same_bits(a: Tensor, b: Tensor) -> bool:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    same = a.contiguous().view(integer) == b.contiguous().view(integer)
    return a.shape == b.shape and a.dtype == b.dtype and bool((same | (a.isnan() & b.isnan())).all())


def tests_are_red(tests: Path) -> str | None:
    """Run a test file of a checkout; its last line if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", str(tests)],
        cwd=tests.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = (done.stdout + done.stderr).strip().splitlines()
    return None if done.returncode == 0 else (lines[-1] if lines else f"pytest ended with {done.returncode}")

# SPDX-License-Identifier: Apache-2.0
"""No timing of wrong results: the kernels in force against the reference, on a small battery."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

import fastflat
from fastflat import QuantSpec

_SPECS = (
    QuantSpec.lsq(bits=4),
    QuantSpec.lsq(bits=2, signed=False),
    QuantSpec.lsq(bits=4, axis=0),
    QuantSpec.lsq(bits=8, axis=1),
    QuantSpec.lsq(bits=4, group=32),
    QuantSpec.torch(bits=8),
    QuantSpec.torch(bits=4, axis=0),
)
_SHAPES = ((5, 32), (67, 96), (3, 4096))
_SPECIAL = (0.0, -0.0, 0.5, -0.5, 1e-40, 1e30, float("inf"), float("-inf"), float("nan"))
#: Sums of at most 4096 * 3 products of order one in fp32, in different orders.
_TOLERANCE = 1e-4


def mistakes(device: torch.device, dtypes: list[torch.dtype]) -> list[str]:
    """What the kernels in force compute otherwise than the reference: maps in any bit, sums beyond the tolerance."""
    found = []
    generator = torch.Generator().manual_seed(1)
    for spec, shape, dtype in itertools.product(_SPECS, _SHAPES, dtypes):
        x = torch.randn(shape, generator=generator)
        x.view(-1)[: len(_SPECIAL)] = torch.tensor(_SPECIAL)
        gy = torch.randn(shape, generator=generator)
        scale = 0.2 + torch.rand(_scales(spec, shape), generator=generator)
        arguments = (x.to(device, dtype), scale.to(device), gy.to(device, dtype), spec)
        with fastflat.backend("reference"):
            wanted = _passes(*arguments)
        got = _passes(*arguments)
        where = f"{spec.bits} bits, axis {spec.axis}, group {spec.group}, {list(shape)}, {dtype}"
        for name, a, b in zip(("y", "dx"), got, wanted, strict=False):
            if not _same_bits(a, b):
                found.append(f"{name} of fake_quantize ({where})")
        if len(wanted) > 2 and not torch.allclose(got[2], wanted[2], _TOLERANCE, _TOLERANCE, equal_nan=True):
            found.append(f"dscale of fake_quantize ({where})")
    return found


def _scales(spec: QuantSpec, shape: tuple[int, int]) -> tuple[int, ...]:
    if spec.group is not None:
        return (shape[0], shape[1] // spec.group)
    return () if spec.axis is None else (shape[spec.axis],)


def _passes(x: Tensor, scale: Tensor, gy: Tensor, spec: QuantSpec) -> tuple[Tensor, ...]:
    x = x.clone().requires_grad_()
    inputs = (x,)
    if spec.estimator == "lsq":
        scale = scale.clone().requires_grad_()
        inputs = (x, scale)
    y = fastflat.fake_quantize(x, scale, spec=spec)
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

# SPDX-License-Identifier: Apache-2.0
"""Data of the tests of the compressors family, and how its results are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastflat._ops import compute_dtype
from fastflat._ops.compressors import code_bytes
from fastflat.backends import reference

from .comparison import assert_same_bits

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OPS = ("compressors_units", "compressors_encode_", "compressors_decode_", "compressors_topk_")
#: Nothing, less than a byte of codes, a byte, blocks with and without a rest, several axes.
SHAPES = ((0,), (1,), (7,), (8,), (3, 171), (1100,), (2, 5, 3))
STATE = torch.tensor([1234567, -1])
#: Norm, levels and clip of the methods: sign, QSGD in 2, 4 and 8 bits, TernGrad, QSGD with the largest.
METHODS = ((0, 0, 0.0), (1, 1, 0.0), (1, 7, 0.0), (1, 100, 0.0), (2, 1, 1.5), (2, 15, 0.0))
BUCKETS = (5, 64, 1 << 20)


class Problem:
    """Arguments of every op for one shape; `special` puts NaN, infinities, zeros of both signs, equals and denormals
    among them."""

    def __init__(self, shape, dtype: torch.dtype, special: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.g = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        self.residual = torch.randn(shape, generator=generator, dtype=torch.float64).to(compute_dtype(dtype))
        if special and self.g.numel() > 20:
            flat, tiny = self.g.view(-1), torch.finfo(dtype).tiny / 4
            for i, value in enumerate((0.0, -0.0, float("nan"), float("inf"), float("-inf"), 2.0, -2.0, 2.0, tiny)):
                flat[i + 1] = value
            self.residual.view(-1)[:10] = 0

    def calls(self, op: str) -> Iterator[tuple]:
        g, n = self.g, self.g.numel()
        for error in (None, self.residual):
            if op == "compressors_topk_":
                for k in sorted({0, min(n, 1), n // 3, n}):
                    yield g, error, k
                continue
            for norm, levels, clip in METHODS:
                for bucket in BUCKETS:
                    if op == "compressors_units":
                        yield g, error, norm, levels, bucket, clip
                        continue
                    units = reference.compressors_units(g, error, norm, levels, bucket, clip)
                    if op == "compressors_encode_":
                        yield g, error, units, STATE if levels else None, levels, bucket
                    else:
                        shape = (3, code_bytes(n, levels))
                        codes = torch.arange(shape[0] * shape[1]).view(shape).mul(37).to(torch.uint8)
                        yield self.residual.to(g.dtype), codes, units.expand(3, -1), levels, bucket, 0.3, error is None


def own(arguments: tuple) -> tuple:
    """The arguments with copies of the tensors, which an op may write."""
    return tuple(a.clone() if isinstance(a, Tensor) else a for a in arguments)


def as_tuple(results) -> tuple[Tensor, ...]:
    return () if results is None else (results,) if isinstance(results, Tensor) else tuple(results)


def check(op: str, call: Callable, shape, dtype: torch.dtype, special: bool = False) -> None:
    """`call` against the reference, in what it gives and in what it writes: bits, but for units, which are sums."""
    for arguments in Problem(shape, dtype, special).calls(op):
        ours, theirs = own(arguments), own(arguments)
        found, wanted = as_tuple(call(*ours)), as_tuple(getattr(reference, op)(*theirs))
        pairs = [*zip(found, wanted, strict=True), *zip(ours, theirs, strict=True)]
        for got, want in pairs:
            if not isinstance(got, Tensor):
                continue
            assert (got.shape, got.dtype, got.is_contiguous()) == (want.shape, want.dtype, True)
            if op == "compressors_units":
                # The sums of at most 1100 terms in fp32 against those in fp64; the largest is exact.
                error = {torch.float64: 1e-13}.get(dtype, 0.0 if arguments[2] == 2 and not arguments[5] else 3e-6)
                torch.testing.assert_close(got, want, rtol=error, atol=0, equal_nan=True)
            elif got.numel():
                assert_same_bits(got, want) if got.is_floating_point() else torch.testing.assert_close(got, want)


def _g() -> Tensor:
    return torch.zeros(2, 20)


def _codes(*shape) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


_U, _E = torch.ones(4), "compressors_encode_"
#: Op, arguments, what is said.
REFUSED = (
    ("compressors_units", lambda: (_g().int(), None, 0, 0, 10, 0.0), "g must be float32, bfloat16"),
    ("compressors_units", lambda: (_g(), _g()[:1], 0, 0, 10, 0.0), "error must be contiguous, of the size of g"),
    ("compressors_units", lambda: (_g(), _g().double(), 0, 0, 10, 0.0), "error must be float32"),
    ("compressors_units", lambda: (_g(), None, 3, 0, 10, 0.0), "norm must be 0, 1 or 2"),
    ("compressors_units", lambda: (_g(), None, 0, 0, 0, 0.0), "bucket must be positive"),
    (_E, lambda: (_g(), None, _U, None, 128, 10), "levels must lie in [0, 127]"),
    (_E, lambda: (_g(), None, _U[1:], None, 0, 10), "units must have 4 values, got 3"),
    (_E, lambda: (_g(), None, _U, None, 1, 10), "state must be an int64 tensor of 2 values"),
    ("compressors_decode_", lambda: (_g(), _codes(1, 4), _U, 0, 10, 1.0, False), "codes must be uint8 of shape"),
    ("compressors_decode_", lambda: (_g(), _codes(2, 5), _U, 0, 10, 1.0, False), "units must have 8 values, got 4"),
    ("compressors_decode_", lambda: (_g().t(), _codes(1, 5), _U, 0, 10, 1.0, False), "out must be contiguous"),
    ("compressors_topk_", lambda: (_g(), None, 41), "k must lie in [0, numel]"),
)

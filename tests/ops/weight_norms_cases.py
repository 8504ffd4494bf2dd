# SPDX-License-Identifier: Apache-2.0
"""Data of the tests of the weight_norms family, and how its results are compared. Imported by tests of several
folders."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastflat._ops import compute_dtype
from fastflat.backends import reference

from .comparison import assert_same_bits

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OPS = ("weight_norms_reduce", "weight_norms_reduce_bwd", "weight_norms_saturate", "weight_norms_saturate_bwd")
#: Nothing, one element, short and long rows, more rows than parts of a sum.
SHAPES = ((0, 3), (1, 1), (3, 5), (130, 7), (5, 1203))
#: Results that are maps, by op.
MAPS = {"weight_norms_reduce_bwd": (0,), "weight_norms_saturate": (0,), "weight_norms_saturate_bwd": (0,)}


class Problem:
    """Arguments of every op for one shape; `special` strews in ties of the largest, a constant row, NaN, infinities."""

    def __init__(self, shape, dtype: torch.dtype, special: bool = False) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.compute = compute_dtype(dtype)
        self.w, self.g = self.draw(*shape).to(dtype), self.draw(*shape).to(dtype)
        rows, columns = shape
        if special and rows > 2 and columns > 4:
            self.w[0] = 0.5
            self.w[1, :2] = torch.tensor([5.0, -5.0])
            self.w[2, 0], self.w[2, 1], self.w[2, 2] = 0.0, -0.0, float("nan")
        self.grads = [self.draw(*s).to(self.compute) for s in ((3, rows), (rows,), (columns,), ())]
        self.alpha = torch.tensor(0.8, dtype=self.compute)

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def calls(self, op: str) -> Iterator[tuple]:
        if op == "weight_norms_reduce":
            yield (self.w,)
        elif op == "weight_norms_reduce_bwd":
            moments, _, _, absmax = reference.weight_norms_reduce(self.w)
            yield *self.grads, self.w, moments, absmax
        elif op == "weight_norms_saturate":
            yield self.w, self.alpha
        else:
            yield self.g, self.w, self.alpha


def as_tuple(results) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def check(op: str, call: Callable, shape, dtype: torch.dtype, special: bool = False) -> None:
    """`call` against the reference: bits of maps, sums to their order; the third moment loses most of its digits."""
    for arguments in Problem(shape, dtype, special).calls(op):
        found, wanted = as_tuple(call(*arguments)), as_tuple(getattr(reference, op)(*arguments))
        for i, (got, want) in enumerate(zip(found, wanted, strict=True)):
            assert (got.dtype, got.shape) == (want.dtype, want.shape)
            if i in MAPS.get(op, ()):
                assert not got.numel() or assert_same_bits(got, want) is None
            else:
                error = 1e-12 if dtype == torch.float64 else 2e-5
                torch.testing.assert_close(got, want, rtol=error, atol=error, equal_nan=True)


def _w() -> Tensor:
    return torch.zeros(2, 3)


#: Op, arguments, what is said.
REFUSED = (
    ("weight_norms_reduce", lambda: (_w()[0],), "w must have shape [O, I]"),
    ("weight_norms_reduce", lambda: (_w().int(),), "w must be float32, bfloat16"),
    (
        "weight_norms_reduce_bwd",
        lambda: (torch.zeros(3, 2), torch.zeros(3), torch.zeros(3), torch.zeros(()), _w(), torch.zeros(3, 2), _w()[0]),
        "g_row must have 2 values, got 3",
    ),
    ("weight_norms_saturate", lambda: (_w(), _w()[0]), "alpha must have 1 values, got 3"),
    ("weight_norms_saturate", lambda: (_w(), torch.zeros((), dtype=torch.float64)), "alpha must be float32"),
    ("weight_norms_saturate_bwd", lambda: (_w()[1:], _w(), torch.zeros(())), "gy must have 6 values, got 3"),
)

# SPDX-License-Identifier: Apache-2.0
"""Data of the tests of the inputs family, and how its results are compared. Imported by tests of several folders."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastflat.backends import reference

from .comparison import assert_same_bits

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OPS = ("inputs_noise", "inputs_pgd_step")
#: Nothing, one element, short samples, samples across blocks, several axes.
SHAPES = ((0, 3), (3, 0), (1, 1), (300, 2), (5, 3, 7), (2, 1100), (7,))
STATE = torch.tensor([1234567, -1])


class Problem:
    """Arguments of every op for one shape; `special` puts NaN, infinities and zeros of both signs among them."""

    def __init__(self, shape, dtype: torch.dtype, special: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw() -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.x0, self.g = draw().clamp(0, 1).to(dtype), draw().to(dtype)
        self.xa = (self.x0 + 0.05 * draw()).clamp(0, 1).to(dtype)
        self.active = torch.rand(shape[0], generator=generator) > 0.4
        if special and self.g.numel() > 6:
            for i, value in enumerate((0.0, -0.0, float("nan"), float("inf"), float("-inf"))):
                self.g.view(-1)[i] = value
            self.xa.view(-1)[5] = float("nan")

    def calls(self, op: str) -> Iterator[tuple]:
        if op == "inputs_noise":
            for k, law, keep in ((3, 0, 1.0), (2, 1, 0.3), (1, 2, 1.0), (0, 1, 0.5)):
                yield self.xa, STATE, k, law, 0.5, keep
        else:
            for norm, active in ((0, self.active), (0, None), (1, self.active), (1, None)):
                yield self.xa, self.x0, self.g, active, 0.03, 0.1, norm, 0.0, 0.9


def as_tuple(results) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def check(op: str, call: Callable, shape, dtype: torch.dtype, special: bool = False) -> None:
    """`call` against the reference: bits, but for steps whose size follows from sums over a sample."""
    for arguments in Problem(shape, dtype, special).calls(op):
        found, wanted = as_tuple(call(*arguments)), as_tuple(getattr(reference, op)(*arguments))
        for got, want in zip(found, wanted, strict=True):
            assert got.is_contiguous()
            if op == "inputs_pgd_step" and arguments[6] == 1:
                assert torch.equal(got.isnan(), want.isnan())
                error = 1e-12 if dtype == torch.float64 else 1e-6 + 2 * torch.finfo(dtype).eps
                torch.testing.assert_close(got, want, rtol=0, atol=error, equal_nan=True)
            elif got.numel():
                assert_same_bits(got, want)
            else:
                assert got.shape == want.shape


def _x() -> Tensor:
    return torch.zeros(2, 3)


#: Op, arguments, what is said.
REFUSED = (
    ("inputs_noise", lambda: (torch.zeros(()), STATE, 1, 0, 1.0, 1.0), "x must have a batch axis"),
    ("inputs_noise", lambda: (_x(), STATE[:1], 1, 0, 1.0, 1.0), "state must be an int64 tensor of 2 values"),
    ("inputs_noise", lambda: (_x(), STATE, -1, 0, 1.0, 1.0), "K must be non-negative"),
    ("inputs_noise", lambda: (_x(), STATE, 1, 3, 1.0, 1.0), "law must be 0, 1 or 2"),
    ("inputs_noise", lambda: (_x().int(), STATE, 1, 0, 1.0, 1.0), "x must be float32, bfloat16"),
)
STEP_REFUSED = (
    ("inputs_pgd_step", lambda: (_x(), _x()[1:], _x(), None, 1.0, 1.0, 0, 0.0, 1.0), "x0 must have the shape of x"),
    ("inputs_pgd_step", lambda: (_x(), _x(), _x().half(), None, 1.0, 1.0, 0, 0.0, 1.0), "g must have the dtype of xa"),
    ("inputs_pgd_step", lambda: (_x(), _x(), _x(), _x(), 1.0, 1.0, 0, 0.0, 1.0), "active must be a bool tensor"),
    ("inputs_pgd_step", lambda: (_x(), _x(), _x(), None, 1.0, 1.0, 2, 0.0, 1.0), "norm must be 0 or 1"),
)

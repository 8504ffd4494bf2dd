# SPDX-License-Identifier: Apache-2.0
"""Data of the tests of the logits family, and how its results are compared. Imported by tests of several folders."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastflat._ops import compute_dtype
from fastflat.backends import reference

INF, NAN = float("inf"), float("nan")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OPS = (
    *("logits_divergence", "logits_divergence_bwd", "logits_loss", "logits_loss_bwd"),
    *("logits_stats", "logits_scan"),
)
#: K, R, C: nothing, one class, rows around registers, lanes and tiles, more rows than a tile.
SHAPES = ((2, 0, 3), (2, 3, 0), (1, 1, 1), (3, 5, 7), (2, 300, 10), (1, 9, 64), (2, 3, 130), (2, 2, 1003))
#: Ops whose results follow from their arguments element by element, sums of more than two terms apart.
MAPS = ("logits_divergence_bwd", "logits_loss_bwd")
IGNORED = -100


class Problem:
    """Arguments of every op for one shape; `special` strews in masks, huge logits, infinities, NaN and bad labels."""

    def __init__(self, shape, dtype: torch.dtype, seed: int = 0, special: bool = False) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.shape, self.dtype, self.compute = tuple(shape), dtype, compute_dtype(dtype)
        k, r, c = self.shape
        self.z0, self.z = self.draw(r, c).mul(3), self.draw(k, r, c).mul(3)
        self.y = torch.randint(max(c, 1), (r,), generator=self.generator)
        if r > 2:
            self.y[1] = IGNORED
        of_classes = [self.draw(c).to(self.compute) for _ in range(4)]
        self.classes = (of_classes[0].abs() + 0.5, of_classes[1], of_classes[2].abs(), of_classes[3].abs())
        self.g, self.t = self.draw(r).to(self.compute), torch.linspace(0, 2, k + 1, dtype=self.compute)
        if special and self.z.numel() and c > 4:
            self.z0[:, 1] = self.z[:, :, 1] = -INF
            self.z0[r // 2, 3] = 6e4
            self.z[0, 0] = -6e4
            self.y[:: max(r // 3, 1)] = 1  # impossible classes
            self.y[r - 1] = 2
            if r > 4:
                self.z[0, 1, 2] = NAN
                self.z0[2, 4] = INF
                self.z0[3] = -INF
                self.y[4] = c + 5
                self.g[3] = 0.0

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def calls(self, op: str) -> Iterator[tuple]:
        none = (None,) * 4
        if op == "logits_divergence":
            yield from ((self.z0, self.z, js) for js in (False, True))
        elif op == "logits_divergence_bwd":
            for js in (False, True):
                yield self.g, self.z0, self.z, *reference.logits_divergence(self.z0, self.z, js), js
        elif op == "logits_loss":
            yield self.z0, self.y, *self.classes, 3.0, IGNORED
            yield self.z0, self.y, *none, 1.0, IGNORED
            yield self.z0, self.y, None, self.classes[1], None, self.classes[3], 0.5, 2
        elif op == "logits_loss_bwd":
            for classes, s in ((self.classes, 3.0), (none, 1.0)):
                _, weight, norm = reference.logits_loss(self.z0, self.y, *classes, s, IGNORED)
                yield self.g * weight, self.z0, self.y, *classes[:3], norm, s
        elif op == "logits_stats":
            yield self.z0, self.y, IGNORED
        else:
            yield self.z0, self.z[0], self.y, self.t, IGNORED


def as_tuple(results) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def results(shape, dtype: torch.dtype) -> list[Tensor]:
    """Of every op through the dispatcher, NaN made a number."""
    data = Problem(shape, dtype)
    found = (r for op in OPS for a in data.calls(op) for r in as_tuple(getattr(torch.ops.fastflat, op)(*a)))
    return [r.nan_to_num(7e3) for r in found]


def tolerance(dtype: torch.dtype) -> float:
    """Of results that follow from sums: the terms have the same bits, their order may differ, and log p of a class
    carries the error of the sum, which the largest logits here magnify by less than 30."""
    return 1e-13 if dtype == torch.float64 else 2e-5


def assert_close(op: str, got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert got.is_contiguous()
    assert torch.equal(got.isnan(), want.isnan()), f"{op}: NaN at {(got.isnan() != want.isnan()).nonzero()[:3]}"
    infinite = want.isinf()
    assert torch.equal(got[infinite], want[infinite])
    got, want = (t.double().masked_fill(infinite, 0.0).nan_to_num(0.0) for t in (got, want))
    if op in MAPS:
        assert torch.equal(got, want), f"{op}: {(got - want).abs().max()}"
        return
    error = (got - want).abs() - tolerance(dtype) * (1 + want.abs())
    assert not (error > 0).any(), f"{op}: off by {error.max()}"


def check(op: str, call: Callable, shape, dtype: torch.dtype, special: bool = False) -> None:
    """`call` against the reference."""
    for arguments in Problem(shape, dtype, special=special).calls(op):
        found, wanted = as_tuple(call(*arguments)), as_tuple(getattr(reference, op)(*arguments))
        for got, want in zip(found, wanted, strict=True):
            assert_close(op, got, want, dtype)


def _logits() -> Tensor:
    return torch.zeros(2, 3)


def _labels() -> Tensor:
    return torch.zeros(2, dtype=torch.int64)


def _row() -> Tensor:
    return torch.zeros(2)


#: Op, arguments, what is said.
REFUSED = (
    ("logits_divergence", lambda: (_logits(), _logits(), False), "z must have shape [K, B, C]"),
    (
        "logits_divergence",
        lambda: (_logits(), torch.zeros(1, 3, 3), False),
        "z0 must have shape [B, C] for z of [K, B, C]",
    ),
    (
        "logits_divergence",
        lambda: (_logits().double(), _logits()[None].bfloat16(), False),
        "z0 must have the dtype of the logits",
    ),
    (
        "logits_divergence_bwd",
        lambda: (_row(), _logits(), _logits()[None], torch.zeros(1, 2), torch.zeros(2, 2, 2), True),
        "divergence must have shape [K, B], of js [K+1, B]",
    ),
    ("logits_loss", lambda: (_logits(), _row(), *(None,) * 4, 1.0, 0), "y must be int64"),
    ("logits_loss", lambda: (_logits(), _labels()[:1], *(None,) * 4, 1.0, 0), "y must have shape [N]"),
    ("logits_loss", lambda: (_logits(), _labels(), _row(), *(None,) * 3, 1.0, 0), "mult must have shape [C]"),
    ("logits_loss", lambda: (_logits().int(), _labels(), *(None,) * 4, 1.0, 0), "z must be float32, bfloat16"),
    (
        "logits_loss_bwd",
        lambda: (_row().double(), _logits(), _labels(), *(None,) * 3, torch.zeros(2, 2), 1.0),
        "g must be float32",
    ),
    (
        "logits_loss_bwd",
        lambda: (_row(), _logits(), _labels(), *(None,) * 3, _row(), 1.0),
        "norm must have shape [N, 2]",
    ),
    ("logits_stats", lambda: (_logits()[0], _labels(), 0), "z must have shape [N, C]"),
    ("logits_scan", lambda: (_logits()[:, 1:], _logits(), _labels(), _row(), 0), "a must have the shape of b"),
    ("logits_scan", lambda: (_logits(), _logits(), _labels(), _logits(), 0), "t must have shape [K]"),
)

# SPDX-License-Identifier: Apache-2.0
"""Data of the tests of the tangents family, and how results are compared. Imported by tests of several folders."""

from __future__ import annotations

import torch
from torch import Tensor

from fastflat._ops import OPS, compute_dtype

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
#: [O, C, I]: nothing, no channels, channels last, few of them, short and odd runs, runs about as long as a tile.
SHAPES = (
    *((0, 3, 2), (1, 1, 1), (1, 1, 1003), (37, 64, 1), (1001, 3, 1), (3, 700, 1), (2, 5, 4), (70, 3, 4), (3, 600, 4)),
    *((5, 7, 49), (4, 64, 49), (1, 300, 32), (2, 3, 1025), (9, 1, 130)),
)
#: Longer than a piece of a sum, with few tangents.
LONG = ((1, 1, 140001), (2, 3, 70001), (3001, 64, 1), (31, 80, 49), (1, 4100, 32))
SPECIAL = (0.0, -0.0, 1e-40, 60000.0, -60000.0, float("inf"), float("-inf"), float("nan"))
KINDS = (1, 2, 3, 4, 5, 6)
#: Names of the terms of a call beside its tangents: e element-wise, c a number a channel.
TERMS = (
    *("t0", "t0 p0:e", "t0 p0:c", "t1 p1:e", "t0 t1", "t0 t1 p1:e", "t0 p0:e t1 p1:c", "t0 p0:c t1 p1:e", "f0"),
    *("t0 shift", "t0 mask", "t0 f0 mask", "t0 p0:c f0 shift", "t0 p0:e f0 f1", "f0 shift mask", "f0 f1"),
    "t0 p0:c t1 p1:e f0 f1 shift mask",
)
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def draw(shape, dtype: torch.dtype, seed: int, special: bool = False) -> Tensor:
    """Normal data; with `special`, about every eighth element is one that arithmetic gets wrong."""
    generator = torch.Generator().manual_seed(1000 * seed + len(shape))
    t = torch.randn(shape, generator=generator, dtype=torch.float64)
    if special and t.numel():
        values = torch.tensor(SPECIAL, dtype=torch.float64)
        drawn = torch.randint(8 * len(values), t.shape, generator=generator)
        t = torch.where(drawn < len(values), values[drawn % len(values)], t)
    return t.to(dtype)


def combination(terms: str, count: int, shape, dtype: torch.dtype, kind: int = 0, special: bool = False) -> tuple:
    """Arguments of tangents_combine."""
    wide, (outer, channels, inner) = compute_dtype(dtype), shape
    given = dict(word.partition(":")[::2] for word in terms.split())

    def of(name, size, of_type=dtype):
        return draw(size, of_type, sum(map(ord, name)), special)

    def primal(name):
        if name not in given:
            return None
        return of(name, (channels,), wide) if given[name] == "c" else of(name, (outer, channels, inner))

    def tangent(name):
        return of(name, (count, outer, channels, inner)) if name in given else None

    def numbers(name, present):
        return of(name, (count, channels), wide) if present else None

    return (
        *(tangent("t0"), primal("p0"), tangent("t1"), primal("p1")),
        *(primal("f0"), numbers("r0", "f0" in given), primal("f1"), numbers("r1", "f1" in given)),
        *(numbers("shift", "shift" in given), primal("mask"), kind),
    )


def activation(kind: int, tangents: str, count: int, shape, dtype: torch.dtype, special: bool = False) -> tuple:
    """Arguments of tangents_combine for an activation, with t0, t1 or both."""
    terms = tangents + " p0" + (" p1" if "t1" in tangents else "")
    return combination(terms, count, shape, dtype, kind, special)


def summation(terms: str, count: int, shape, dtype: torch.dtype, special: bool = False) -> tuple:
    """Arguments of tangents_sums; `terms` of p0, t1 (with p1), mask, total."""
    t0, p0, t1, p1, *_, mask, _ = combination(
        "t0 " + terms.replace("t1", "t1 p1"), count, shape, dtype, special=special
    )
    return t0, p0, t1, p1, mask, "total" in terms


SUMS = ("p0", "total", "mask", "p0 total", "p0 t1", "p0 mask", "p0 t1 mask total", "")


def bytes_of(name: str):
    return OPS[name].bytes_moved


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    assert (got.dtype, got.shape, got.stride()) == (want.dtype, want.shape, want.stride())
    nan = want.isnan()
    assert torch.equal(got.isnan(), nan)
    integer = _INTEGERS[got.element_size()]
    assert torch.equal(got.masked_fill(nan, 0).view(integer), want.masked_fill(nan, 0).view(integer))


def check_combine(combine, reference, arguments: tuple) -> None:
    assert_same_bits(combine(*arguments), reference(*arguments))


def check_sums(sums, reference, arguments: tuple) -> None:
    """Sums within 1e-5 (fp64: 1e-13) of the sum of the magnitudes of the terms; what is not finite is alike."""
    t0, p0, t1, p1, _, total = arguments
    got, want = sums(*arguments), reference(*arguments)
    assert_same_bits(got[0], want[0])
    magnitudes = reference(*(t if t is None else t.abs() for t in (t0, p0, t1, p1)), None, total)
    tolerance = 1e-13 if t0.dtype == torch.float64 else 1e-5
    for g, w, m in zip(got[1:], want[1:], magnitudes[1:], strict=True):
        assert (g.dtype, g.shape, g.stride()) == (w.dtype, w.shape, w.stride())
        # Where terms come near the end of the range fp32 sums may pass it.
        finite = w.isfinite() & (m < 1e37)
        assert torch.equal(g[~w.isfinite() & m.isnan()].isnan(), w[~w.isfinite() & m.isnan()].isnan())
        assert ((g - w).abs()[finite] <= tolerance * m[finite]).all()


def _combine(**change):
    names = ("t0", "p0", "t1", "p1", "f0", "r0", "f1", "r1", "shift", "mask")
    right = {"t0": torch.ones(2, 3, 4, 5), "kind": 0}
    return lambda: tuple({**dict.fromkeys(names), **right, **change}[name] for name in (*names, "kind"))


def _sums(**change):
    right = {"t0": torch.ones(2, 3, 4, 5), "p0": torch.ones(3, 4, 5), "total": False}
    names = ("t0", "p0", "t1", "p1", "mask", "total")
    return lambda: tuple({**dict.fromkeys(names), **right, **change}[name] for name in names)


_PRIMAL, _TANGENT = torch.ones(3, 4, 5), torch.ones(2, 3, 4, 5)
#: Calls that would read or write what is not theirs: op, arguments, words of the error.
REFUSED = (
    ("tangents_combine", _combine(t0=None, shift=torch.ones(2, 4)), "t0, t1 or f0 with r0 must be given"),
    ("tangents_combine", _combine(t0=torch.ones(2, 3)), "t0 must have shape [K, O, C, I], got [2, 3]"),
    ("tangents_combine", _combine(t0=_TANGENT.int()), "t0 must be float32, bfloat16, float16 or float64"),
    ("tangents_combine", _combine(t0=_TANGENT.mT), "t0 must be contiguous; call .contiguous()"),
    ("tangents_combine", _combine(t1=_TANGENT[1:]), "t1 must have shape [K=2, O=3, C=4, I=5], got [1, 3, 4, 5]"),
    ("tangents_combine", _combine(p0=torch.ones(5)), "p0 must have shape [C=4], got [5]"),
    ("tangents_combine", _combine(p0=_PRIMAL[0]), "p0 must have shape [O=3, C=4, I=5], got [4, 5]"),
    ("tangents_combine", _combine(p0=_PRIMAL.half()), "p0 must have the dtype of t0"),
    ("tangents_combine", _combine(p0=torch.ones(4).double()), "p0 must be float32 (float64 beside float64 tangents)"),
    ("tangents_combine", _combine(p1=_PRIMAL), "p0 and p1 must be given with t0 and t1"),
    ("tangents_combine", _combine(f0=_PRIMAL), "f0 and r0, f1 and r1 must be given together"),
    ("tangents_combine", _combine(shift=torch.ones(4, 2)), "shift must have shape [K=2, C=4], got [4, 2]"),
    ("tangents_combine", _combine(mask=_TANGENT), "mask must have shape [O=3, C=4, I=5], got [2, 3, 4, 5]"),
    ("tangents_combine", _combine(kind=7), "kind must be in [0, 6], got 7"),
    ("tangents_combine", _combine(kind=3), "p0 and t0 or t1 must be given for an activation"),
    ("tangents_combine", _combine(kind=3, p0=_PRIMAL, t1=_TANGENT), "t1 and p1 must be given together for an"),
    ("tangents_combine", _combine(kind=6, p0=_PRIMAL, t1=_TANGENT, p1=_PRIMAL), "t1 must be absent for relu"),
    ("tangents_combine", _combine(kind=1, p0=torch.ones(4)), "p0 must have shape [O=3, C=4, I=5], got [4]"),
    ("tangents_sums", _sums(t1=_TANGENT), "t1 and p1 must be given together, and with p0"),
    ("tangents_sums", _sums(p0=torch.ones(4)), "p0 must have shape [O=3, C=4, I=5], got [4]"),
    ("tangents_sums", _sums(mask=_PRIMAL.bool()), "mask must have the dtype of t0"),
)

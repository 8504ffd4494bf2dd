# SPDX-License-Identifier: Apache-2.0
"""Data of the tests of the vectors family, and how its sums are compared. Imported by tests of several folders."""

from __future__ import annotations

import torch
from torch import Tensor

#: Storage of the basis (or the probes) and of the vectors.
STORAGES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.float32),
    "fp64": (torch.float64, torch.float64),
}
#: Of a basis, of vectors.
COUNTS = ((0, 1), (1, 0), (1, 1), (2, 1), (5, 3), (9, 1), (7, 17), (37, 2))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
STATES = ((0, 0), (5, 7), (-3, 2**45 + 9), (2**63 - 1, -1))
SPECIAL = (0.0, -0.0, 1e-40, 3e38, -3e38, float("inf"), float("-inf"), float("nan"))


def rows(count: int, n: int, dtype: torch.dtype, seed: int, special: bool = False) -> Tensor:
    """Normal data; with `special`, about every eighth element is one that arithmetic gets wrong."""
    generator = torch.Generator().manual_seed(1000 * seed + count)
    t = torch.randn(count, n, generator=generator, dtype=torch.float64)
    if special and t.numel():
        values = torch.tensor(SPECIAL, dtype=torch.float64)
        drawn = torch.randint(8 * len(values), t.shape, generator=generator)
        t = torch.where(drawn < len(values), values[drawn % len(values)], t)
    return t.to(dtype)


def problem(storage: str, counts: tuple[int, int], n: int, seed: int = 0, special: bool = False):
    """Basis, vectors, factors."""
    of_q, of_w = STORAGES[storage]
    j, k = counts
    factors = rows(j, k, torch.float64, seed + 2, special)
    return rows(j, n, of_q, seed, special), rows(k, n, of_w, seed + 1, special), factors


def starts(n: int, pieces: int = 5) -> list[int]:
    """Places of slices of many sizes, among them an empty one."""
    places = sorted({0, n // 7, n // 7, n // 3, n // 3 + 1, n // 2 + 3, n - 1, n} & set(range(n + 1)))
    return [*places[:pieces], *places[:pieces][-1:], n]


def assert_close_sums(got: Tensor, want: Tensor, terms: Tensor) -> None:
    """Within 1e-12 of the sum of the magnitudes of the terms; what is not finite is alike."""
    assert (got.dtype, got.shape, got.stride()) == (want.dtype, want.shape, want.stride())
    finite = want.isfinite()
    assert torch.equal(got[~finite].nan_to_num(7.0), want[~finite].nan_to_num(7.0))
    assert torch.equal(got[~finite].isnan(), want[~finite].isnan())
    assert ((got - want).abs()[finite] <= 1e-12 * terms[finite]).all()


def terms_of_dots(q: Tensor, w: Tensor) -> Tensor:
    return q.double().abs() @ w.double().abs().T


def check_dot(dot, reference, storage: str, counts: tuple[int, int], n: int, special: bool = False) -> None:
    q, w, _ = problem(storage, counts, n, special=special)
    assert_close_sums(dot(q, w), reference(q, w), terms_of_dots(q, w))


def check_subtract(subtract, reference, storage: str, counts: tuple[int, int], n: int, special: bool = False) -> None:
    q, w, c = problem(storage, counts, n, special=special)
    got, want = w.clone(), w.clone()
    squares, wanted = subtract(got, q, c), reference(want, q, c)
    assert got.dtype == want.dtype
    nan = want.isnan()
    assert torch.equal(got.isnan(), nan)
    integer = {4: torch.int32, 8: torch.int64}[got.element_size()]
    assert torch.equal(got.masked_fill(nan, 0).view(integer), want.masked_fill(nan, 0).view(integer))
    assert_close_sums(squares, wanted, wanted)


def check_signs(rademacher, reference, dtype: torch.dtype, state: tuple[int, int], k: int, n: int) -> None:
    args = (torch.tensor(state), k, n, dtype)
    got, want = rademacher(*args), reference(*args)
    assert (got.dtype, got.shape, got.stride()) == (want.dtype, want.shape, want.stride())
    assert torch.equal(got, want)


def check_quadratic(quadratic, reference, storage: str, k: int, n: int, places: list[int]) -> None:
    v, hv, _ = problem(storage, (k, k), n)
    terms = reference(v.abs(), hv.abs(), places)
    assert_close_sums(quadratic(v, hv, places), reference(v, hv, places), terms)


def _rows_and(**change):
    right = {"q": torch.ones(2, 6), "w": torch.ones(3, 6), "c": torch.ones(2, 3, dtype=torch.float64)}
    return {**right, **change}


def _dot(**change):
    return lambda: tuple(_rows_and(**change)[name] for name in ("q", "w"))


def _subtract(**change):
    return lambda: tuple(_rows_and(**change)[name] for name in ("w", "q", "c"))


def _overlapping():
    basis = torch.ones(4, 6)
    return basis[1:3], basis[:2], torch.ones(2, 2, dtype=torch.float64)


def _quadratic(v=(2, 6), hv=(2, 6), places=(0, 6), dtype=torch.float32):
    return lambda: (torch.ones(v, dtype=dtype), torch.ones(hv), list(places))


#: Calls that would read or write what is not theirs: op, arguments, words of the error.
REFUSED = (
    ("vectors_dot", _dot(q=torch.ones(6)), "q must have two axes [K, n], got 1"),
    ("vectors_dot", _dot(w=torch.ones(6, 3).t()), "w must be contiguous; call .contiguous()"),
    ("vectors_dot", _dot(q=torch.ones(2, 5)), "q must have rows as long as those of w, 6, got 5"),
    ("vectors_dot", _dot(w=torch.ones(3, 6).half()), "w must be float32 or float64"),
    ("vectors_dot", _dot(w=torch.ones(3, 6).double()), "q must have the dtype of w, or bfloat16 beside float32"),
    ("vectors_dot", _dot(q=torch.ones(2, 6).int()), "q must be float32, bfloat16, float16 or float64"),
    ("vectors_subtract_", _subtract(c=torch.ones(2, 3)), "c must be contiguous float64"),
    ("vectors_subtract_", _subtract(c=torch.ones(3, 2).double()), "c must have shape [J=2, K=3]"),
    ("vectors_subtract_", _overlapping, "w must not share memory with q"),
    ("vectors_rademacher", lambda: (torch.ones(2), 1, 1, torch.float32), "state must be a contiguous int64 tensor"),
    ("vectors_rademacher", lambda: (torch.tensor([1, 2]), -1, 1, torch.float32), "k and n must not be negative"),
    ("vectors_rademacher", lambda: (torch.tensor([1, 2]), 2**40, 2**40, torch.float32), "k n must fit 63 bits"),
    ("vectors_rademacher", lambda: (torch.tensor([1, 2]), 1, 1, torch.int32), "dtype must be float32, bfloat16"),
    ("vectors_quadratic", _quadratic(hv=(3, 6)), "v must have as many rows as hv, 3, got 2"),
    ("vectors_quadratic", _quadratic(places=()), "starts must hold T + 1 places, got none"),
    ("vectors_quadratic", _quadratic(places=(0, 4, 3)), "starts must not decrease and lie in [0, 6], got 3 at 2"),
    ("vectors_quadratic", _quadratic(places=(0, 7)), "starts must not decrease and lie in [0, 6], got 7 at 1"),
    ("vectors_quadratic", _quadratic(places=(-1, 6)), "starts must not decrease and lie in [0, 6], got -1 at 0"),
)

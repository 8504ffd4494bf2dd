# SPDX-License-Identifier: Apache-2.0
"""The vectors family: the compiled CPU kernels against the reference, and the reference against formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastflat  # noqa: F401
from fastflat import _ops
from fastflat.backends import reference

from . import instruction_sets
from . import vector_cases as cases

DOT, SUBTRACT = _ops.callable_of("vectors_dot"), _ops.callable_of("vectors_subtract_")
RADEMACHER, QUADRATIC = _ops.callable_of("vectors_rademacher"), _ops.callable_of("vectors_quadratic")
#: Nothing, around the lanes of a sum and the tiles of a row.
LENGTHS = (0, 1, 7, 16, 33, 1003, 4097)
#: More than a tile, more than a piece of a sum; with few numbers, since the reference takes its time.
LONG = (32768, 65537, 140001)
SHAPES = [(counts, n) for counts in cases.COUNTS for n in LENGTHS]
SHAPES += [(counts, n) for counts in ((1, 1), (2, 1), (9, 1), (5, 3)) for n in LONG]


@pytest.mark.parametrize("storage", cases.STORAGES)
@pytest.mark.parametrize(("counts", "n"), SHAPES, ids=str)
def test_dot(compiled, storage, counts, n):
    cases.check_dot(DOT, reference.vectors_dot, storage, counts, n)


@pytest.mark.parametrize("storage", cases.STORAGES)
@pytest.mark.parametrize(("counts", "n"), SHAPES, ids=str)
def test_subtract_has_the_bits_of_the_reference(compiled, storage, counts, n):
    cases.check_subtract(SUBTRACT, reference.vectors_subtract_, storage, counts, n)


@settings(max_examples=60, deadline=None)
@given(
    storage=st.sampled_from(sorted(cases.STORAGES)),
    counts=st.tuples(st.integers(0, 11), st.integers(0, 19)),
    n=st.integers(0, 300),
    special=st.booleans(),
)
def test_any_shape(storage, counts, n, special):
    cases.check_dot(DOT, reference.vectors_dot, storage, counts, n, special)
    cases.check_subtract(SUBTRACT, reference.vectors_subtract_, storage, counts, n, special)


@pytest.mark.parametrize("storage", cases.STORAGES)
def test_reference_agrees_with_exact_sums(storage):
    q, w, c = cases.problem(storage, (3, 2), 2000)
    dots = reference.vectors_dot(q, w)
    for j in range(3):
        for k in range(2):
            x, y = q[j].double().tolist(), w[k].double().tolist()
            exact = math.fsum(map(float.__mul__, x, y))
            assert abs(dots[j, k].item() - exact) <= 1e-12 * math.fsum(abs(a * b) for a, b in zip(x, y, strict=True))
    left = w.clone()
    squares = reference.vectors_subtract_(left, q, c)
    exact = w.double() - c.T @ q.double()
    # A rounding of product and difference each term, of numbers below 50.
    torch.testing.assert_close(left.double(), exact, rtol=0, atol=3 * 50 * torch.finfo(w.dtype).eps)
    torch.testing.assert_close(squares, (left.double() ** 2).sum(1))


def test_sums_overflow_nothing_and_see_what_is_not_finite(on_backend):
    big = torch.full((1, 1000), 3e38)
    assert DOT(big, big).item() == pytest.approx(9e79, rel=1e-6)
    tiny = torch.full((1, 1000), 1e-40)
    assert DOT(tiny, tiny).item() == pytest.approx(1e-77, rel=1e-3)
    none = torch.zeros(1, 1, dtype=torch.float64)
    assert SUBTRACT(big.clone(), big, none).item() == pytest.approx(9e79, rel=1e-6)
    for bad in (math.inf, -math.inf, math.nan):
        w = torch.ones(1, 1000)
        w[0, 997] = bad
        assert not DOT(torch.ones(1, 1000), w).isfinite()
        assert not QUADRATIC(w, torch.ones(1, 1000), [0, 500, 1000]).isfinite()[0, 1]


def test_subtract_without_a_basis_leaves_every_bit(on_backend):
    w = torch.tensor([[-0.0, 0.0, 1e-45, math.inf, math.nan]])
    before = w.clone()
    SUBTRACT(w, torch.empty(0, 5), torch.empty(0, 1, dtype=torch.float64))
    assert torch.equal(w.view(torch.int32), before.view(torch.int32))


def test_two_passes_of_gram_schmidt_make_orthogonal_vectors(on_backend):
    basis = torch.linalg.qr(cases.rows(6, 5000, torch.float64, 1).T)[0].T.float().contiguous()
    w = cases.rows(2, 5000, torch.float32, 2)
    for _ in range(2):
        squares = SUBTRACT(w, basis, DOT(basis, w))
    assert DOT(basis, w).abs().max() <= 1e-6 * squares.sqrt().min()


def test_step_of_the_lanczos_recurrence(on_backend):
    """w - alpha q[1] - beta q[0] with both numbers in a tensor of the device, and the next beta from the result."""
    q, w = (torch.nn.functional.normalize(cases.rows(k, 3001, torch.float32, k)) for k in (2, 1))
    beta, alpha = torch.tensor(0.7, dtype=torch.float64), DOT(q[1:], w)
    expected = w.double() - beta * q[:1].double() - alpha * q[1:].double()
    squares = SUBTRACT(w, q, torch.cat([beta.view(1, 1), alpha]))
    torch.testing.assert_close(w.double(), expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(squares, expected.square().sum(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("state", cases.STATES, ids=str)
def test_signs(compiled, dtype, state):
    for k, n in ((0, 3), (3, 0), (1, 1), (3, 127), (17, 1003), (1, 65537), (2, 40001)):
        cases.check_signs(RADEMACHER, reference.vectors_rademacher, dtype, state, k, n)


def test_signs_are_the_bits_of_the_words(on_backend):
    state = torch.tensor([5, 7])
    words = torch.stack(reference_words(state, 3), 1).flatten().tolist()
    wanted = [-1.0 if words[i // 32] >> i % 32 & 1 else 1.0 for i in range(3 * 128)]
    assert RADEMACHER(state, 2, 192, torch.float32).flatten().tolist() == wanted


def reference_words(state, blocks):
    return reference.vectors._noise.words(state, blocks)


def test_signs_are_fair_and_independent_of_their_neighbours(on_backend):
    n = 1 << 18
    y = RADEMACHER(torch.tensor([11, 3]), 1, n, torch.float64)[0]
    for lag in (1, 32, 128):
        assert abs((y[lag:] * y[:-lag]).mean()) < 5 / math.sqrt(n)
    assert abs(y.mean()) < 5 / math.sqrt(n)
    other = RADEMACHER(torch.tensor([11, 4]), 1, n, torch.float64)[0]
    assert abs((y * other).mean()) < 5 / math.sqrt(n)


@settings(max_examples=40, deadline=None)
@given(
    storage=st.sampled_from(sorted(cases.STORAGES)),
    k=st.integers(0, 4),
    n=st.integers(0, 3000),
    data=st.data(),
)
def test_quadratic(storage, k, n, data):
    places = sorted(data.draw(st.lists(st.integers(0, n), min_size=1, max_size=9)))
    cases.check_quadratic(QUADRATIC, reference.vectors_quadratic, storage, k, n, places)


@pytest.mark.parametrize("storage", cases.STORAGES)
def test_quadratic_of_long_slices(compiled, storage):
    n = 140001
    cases.check_quadratic(QUADRATIC, reference.vectors_quadratic, storage, 3, n, cases.starts(n))


@pytest.mark.parametrize("storage", cases.STORAGES)
@pytest.mark.parametrize("counts", [(9, 1), (5, 3)], ids=str)
@pytest.mark.parametrize("n", [65537, 300001])
def test_sums_do_not_depend_on_threads(compiled, storage, counts, n):
    q, w, c = cases.problem(storage, counts, n)

    def results():
        left = w.clone()
        return DOT(q, w), SUBTRACT(left, q, c), left, QUADRATIC(q[: len(w)], w, cases.starts(n))

    before = torch.get_num_threads()
    expected = results()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(results(), expected, strict=True))
    finally:
        torch.set_num_threads(before)


DIGEST = """
import hashlib, sys
import torch
import fastflat
from fastflat import _ops
from tests.ops import vector_cases as cases
found = hashlib.sha256()
assert fastflat.backends()["cpu"] == "available"
for storage in cases.STORAGES:
    for counts in (*cases.COUNTS, (4, 8)):
        q, w, c = cases.problem(storage, counts, 40007)
        found.update(_ops.callable_of("vectors_dot")(q, w).numpy().tobytes())
        found.update(_ops.callable_of("vectors_subtract_")(w, q, c).numpy().tobytes())
        found.update(w.numpy().tobytes())
    v, hv, _ = cases.problem(storage, (2, 2), 40007)
    found.update(_ops.callable_of("vectors_quadratic")(v, hv, cases.starts(40007)).numpy().tobytes())
for dtype in cases.DTYPES:
    y = _ops.callable_of("vectors_rademacher")(torch.tensor([5, 7]), 3, 4001, dtype)
    found.update(y.double().numpy().tobytes())
print(found.hexdigest())
"""


def test_bits_do_not_depend_on_the_instruction_set(compiled):
    assert len(instruction_sets.outputs(DIGEST)) == 1


@pytest.mark.parametrize(("name", "arguments", "message"), cases.REFUSED, ids=[text for *_, text in cases.REFUSED])
def test_raw_ops_refuse_what_would_corrupt_memory(compiled, name, arguments, message):
    with pytest.raises(RuntimeError) as raised:
        _ops.callable_of(name)(*arguments())
    assert f"fastflat::{name}: {message}" in str(raised.value)


def test_raw_ops_have_no_derivative():
    w = torch.ones(1, 3, requires_grad=True)
    with pytest.raises(NotImplementedError, match="vectors_dot: a raw op has no derivative"):
        DOT(torch.ones(2, 3), w)
    with pytest.raises(NotImplementedError, match="vectors_quadratic: a raw op has no derivative"):
        QUADRATIC(w, torch.ones(1, 3), [0, 3])


@pytest.mark.parametrize("storage", cases.STORAGES)
def test_opcheck(storage):
    tests = ("test_schema", "test_faketensor")
    q, w, c = cases.problem(storage, (3, 2), 40)
    ops = torch.ops.fastflat
    torch.library.opcheck(ops.vectors_dot.default, (q, w), test_utils=tests)
    torch.library.opcheck(ops.vectors_subtract_.default, (w, q, c), test_utils=tests)
    torch.library.opcheck(ops.vectors_quadratic.default, (q[:2], w, [0, 9, 40]), test_utils=tests)
    state = torch.tensor([1, 2])
    torch.library.opcheck(ops.vectors_rademacher.default, (state, 2, 5, torch.float16), test_utils=tests)


@pytest.mark.parametrize("storage", cases.STORAGES)
def test_bytes_of_the_op_table(storage):
    q, w, c = cases.problem(storage, (3, 2), 40)
    sizes = {name: op.bytes_moved for name, op in _ops.OPS.items()}
    assert sizes["vectors_dot"](q, w) == q.nbytes + w.nbytes + 8 * 6
    assert sizes["vectors_subtract_"](w, q, c) == q.nbytes + 2 * w.nbytes + 8 * 6 + 8 * 2
    assert sizes["vectors_rademacher"](torch.tensor([1, 2]), 2, 40, q.dtype) == 80 * q.element_size()
    assert sizes["vectors_quadratic"](q[:2], w, [4, 9, 24]) == 40 * (q.element_size() + w.element_size()) + 8 * 4

# SPDX-License-Identifier: Apache-2.0
"""The tangents family: the compiled CPU kernels against the reference, and the reference against derivatives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastflat  # noqa: F401
from fastflat import _ops
from fastflat.backends import reference

from . import instruction_sets
from . import tangent_cases as cases

COMBINE, SUMS = _ops.callable_of("tangents_combine"), _ops.callable_of("tangents_sums")


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("shape", cases.SHAPES, ids=str)
def test_combine_has_the_bits_of_the_reference(compiled, dtype, shape):
    for i, terms in enumerate(cases.TERMS):
        count = (0, 1, 3, 8, 17)[(i + sum(shape)) % 5] if shape[0] * shape[1] * shape[2] > 5 else 3
        cases.check_combine(COMBINE, reference.tangents_combine, cases.combination(terms, count, shape, dtype))
    for i, kind in enumerate(cases.KINDS):
        tangents = ("t0", "t1", "t0 t1")[i % 3] if kind != 6 else "t0"
        arguments = cases.activation(kind, tangents, 3, shape, dtype)
        cases.check_combine(COMBINE, reference.tangents_combine, arguments)


@settings(max_examples=80, deadline=None)
@given(
    dtype=st.sampled_from(cases.DTYPES),
    count=st.sampled_from((0, 1, 3, 8, 17)),
    shape=st.tuples(st.integers(0, 9), st.integers(0, 9), st.sampled_from((0, 1, 2, 4, 7, 49, 300))),
    terms=st.sampled_from(cases.TERMS),
    kind=st.sampled_from(cases.KINDS),
    sums=st.sampled_from(cases.SUMS),
    special=st.booleans(),
)
def test_any_shape(dtype, count, shape, terms, kind, sums, special):
    arguments = cases.combination(terms, count, shape, dtype, special=special)
    cases.check_combine(COMBINE, reference.tangents_combine, arguments)
    arguments = cases.activation(kind, "t0" if kind == 6 else "t0 t1", count, shape, dtype, special)
    cases.check_combine(COMBINE, reference.tangents_combine, arguments)
    cases.check_sums(SUMS, reference.tangents_sums, cases.summation(sums, count, shape, dtype, special))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("shape", cases.SHAPES, ids=str)
def test_sums(compiled, dtype, shape):
    for i, terms in enumerate(cases.SUMS):
        count = (0, 1, 3, 8, 17)[(i + sum(shape)) % 5]
        cases.check_sums(SUMS, reference.tangents_sums, cases.summation(terms, count, shape, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", cases.LONG, ids=str)
def test_long(compiled, dtype, shape):
    cases.check_sums(SUMS, reference.tangents_sums, cases.summation("p0 t1 mask total", 2, shape, dtype))
    arguments = cases.combination("t0 p0:c f0 shift mask", 2, shape, dtype)
    cases.check_combine(COMBINE, reference.tangents_combine, arguments)


def test_many_tangents(compiled):
    for shape in ((3, 5, 1), (1, 1, 70)):
        arguments = cases.combination("t0 p0:e f0 shift", 3000, shape, torch.float32)
        cases.check_combine(COMBINE, reference.tangents_combine, arguments)
        cases.check_sums(SUMS, reference.tangents_sums, cases.summation("p0 total", 3000, shape, torch.float32))


def _phi(kind):
    functional = torch.nn.functional
    return {
        1: torch.sigmoid,
        2: torch.tanh,
        3: functional.silu,
        4: functional.gelu,
        5: lambda z: functional.gelu(z, approximate="tanh"),
        6: torch.relu,
    }[kind]


@pytest.mark.parametrize("kind", cases.KINDS)
def test_activations_give_the_tangent_of_the_backward(on_backend, kind):
    """In fp64, to what torch differentiates itself: t0 along g, t1 along the input z."""
    z, g, tz, tg = (cases.draw((1, 1, 500), torch.float64, seed) * 3 for seed in range(4))
    phi = _phi(kind)

    def gradient(z, g):
        return torch.func.vjp(phi, z)[1](g)[0]

    slope, tangent = gradient(z, tg), torch.func.jvp(gradient, (z, g), (tz, tg))[1]
    seen = phi(z) if kind in (1, 2) else z  # the output for those two, and so its tangent
    of_seen = gradient(z, tz) if kind in (1, 2) else tz
    rest = (None,) * 6
    got = COMBINE(tg[None], seen, None, None, *rest, kind)
    torch.testing.assert_close(got[0], slope, rtol=1e-12, atol=1e-13)
    if kind != 6:
        # y (1 - y) g differentiates to g (1 - 2 y) along y.
        got = COMBINE(tg[None], seen, of_seen[None], g, *rest, kind)
        torch.testing.assert_close(got[0], tangent, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_activations_at_the_ends(on_backend, dtype):
    """Limits at infinity, NaN where the input is."""
    ends = torch.tensor([float("-inf"), -1e4, 1e4, float("inf"), float("nan")], dtype=dtype).view(1, 1, 5)
    one, rest = torch.ones(1, 1, 1, 5, dtype=dtype), (None,) * 6
    for kind in sorted(set(cases.KINDS) - {1, 2, 6}):
        slope = COMBINE(one, ends, None, None, *rest, kind).flatten()
        bend = COMBINE(None, ends, one, one[0], *rest, kind).flatten()
        assert slope[:4].tolist() == [0, 0, 1, 1]
        assert bend[:4].tolist() == [0, 0, 0, 0]
        assert slope[4].isnan()
        assert bend[4].isnan()
    assert COMBINE(one, ends, None, None, *rest, 6).flatten().tolist() == [0, 0, 1, 1, 1]


def test_reference_sums_are_the_formula():
    t0, p0, t1, p1, mask, total = cases.summation("p0 t1 mask total", 3, (4, 5, 6), torch.float64)
    mapped, dots, totals = reference.tangents_sums(t0, p0, t1, p1, mask, total)
    assert torch.equal(mapped, t0 * mask)
    torch.testing.assert_close(dots, torch.einsum("koci,oci->kc", t0, p0) + torch.einsum("koci,oci->kc", t1, p1))
    torch.testing.assert_close(totals, t0.sum((1, 3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", cases.LONG[:3], ids=str)
def test_bits_do_not_depend_on_threads(compiled, dtype, shape):
    summed = cases.summation("p0 mask total", 5, shape, dtype)
    combined = cases.combination("t0 p0:c f0 shift", 5, shape, dtype)

    def results():
        return [*SUMS(*summed), COMBINE(*combined)]

    before = torch.get_num_threads()
    expected = results()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(results(), expected, strict=True))
    finally:
        torch.set_num_threads(before)


DIGEST = """
import hashlib
import torch
import fastflat
from fastflat import _ops
from tests.ops import tangent_cases as cases
found = hashlib.sha256()
assert fastflat.backends()["cpu"] == "available"
combine, sums = _ops.callable_of("tangents_combine"), _ops.callable_of("tangents_sums")
for dtype in cases.DTYPES:
    for shape in cases.SHAPES:
        results = list(sums(*cases.summation("p0 t1 mask total", 3, shape, dtype)))
        results.append(combine(*cases.combination("t0 p0:c t1 p1:e f0 f1 shift mask", 3, shape, dtype)))
        for kind in cases.KINDS:
            results.append(combine(*cases.activation(kind, "t0" if kind == 6 else "t0 t1", 2, shape, dtype)))
        for t in results:
            found.update(t.double().numpy().tobytes())
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
    t = torch.ones(1, 1, 1, 3, requires_grad=True)
    with pytest.raises(NotImplementedError, match="tangents_combine: a raw op has no derivative"):
        COMBINE(t, *[None] * 9, 0)
    with pytest.raises(NotImplementedError, match="tangents_sums: a raw op has no derivative"):
        SUMS(t, None, None, None, None, True)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_opcheck(dtype):
    tests, ops = ("test_schema", "test_faketensor"), torch.ops.fastflat
    for terms in ("t0 p0:c t1 p1:e f0 f1 shift mask", "f0 shift"):
        arguments = cases.combination(terms, 3, (2, 3, 4), dtype)
        torch.library.opcheck(ops.tangents_combine.default, arguments, test_utils=tests)
    for terms in ("p0 t1 mask total", "total"):
        torch.library.opcheck(ops.tangents_sums.default, cases.summation(terms, 3, (2, 3, 4), dtype), test_utils=tests)


def test_bytes_of_the_op_table():
    """fp32: 8 + 12 K for an activation's backward, 4 + 4 K where only a scale has a tangent."""
    n, count = 24, 5
    of = {name: op.bytes_moved for name, op in _ops.OPS.items()}
    combine, sums = of["tangents_combine"], of["tangents_sums"]
    shape, dtype = (2, 1, 12), torch.float32
    assert combine(*cases.activation(3, "t0 t1", count, shape, dtype)) == n * (8 + 12 * count)
    assert combine(*cases.activation(3, "t0", count, shape, dtype)) == n * (4 + 8 * count)
    assert combine(*cases.combination("f0", count, shape, dtype)) == n * (4 + 4 * count) + 4 * count
    assert sums(*cases.summation("p0 mask total", count, shape, dtype)) == n * (8 + 8 * count) + 8 * count
    assert sums(*cases.summation("total", count, shape, dtype)) == n * 4 * count + 4 * count

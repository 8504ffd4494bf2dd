# SPDX-License-Identifier: Apache-2.0
"""The row_tangents family: the compiled CPU kernels against the reference, and the reference against autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import jvp

import fastflat  # noqa: F401
from fastflat import _ops
from fastflat.backends import reference

from . import instruction_sets
from . import row_tangents_cases as cases

#: Rows longer than a tile and than the runs of a sum; few rows, which threads share by tangents.
LONG = ((2, 3, 5000), (17, 1, 4097), (1, 2, 50257))


def op(name):
    return _ops.callable_of(name)


def check(name, *rest, **options):
    cases.check(name, op(name), getattr(reference, name), *rest, **options)


@pytest.mark.parametrize("name", cases.OPS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("shape", cases.SHAPES, ids=str)
def test_against_the_reference(compiled, name, dtype, shape):
    check(name, shape, dtype)


@pytest.mark.parametrize("name", cases.OPS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("shape", LONG, ids=str)
def test_long_rows(compiled, name, dtype, shape):
    check(name, shape, dtype, every=False)


def test_a_million_classes(compiled):
    check("row_tangents_softmax", (2, 1, 10**6), torch.float32, every=False)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(cases.OPS),
    shape=st.tuples(st.integers(0, 17), st.integers(0, 40), st.integers(0, 90)),
    dtype=st.sampled_from(cases.DTYPES),
    special=st.booleans(),
)
def test_any_shape(name, shape, dtype, special):
    check(name, shape, dtype, special=special, every=False)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_norm_is_what_autograd_has(on_backend, centered, affine):
    """Forward, statistics and backward along tangents of input, weight, bias and incoming gradient."""
    k, r, d, eps = 3, 4, 9, 1e-3
    data = cases.Problem((k, r, d), torch.float64)
    x, weight, bias = data.normal * 2 + 1, data.weight, data.draw(d)
    along = (data.x, data.along_weight, data.along_bias)

    def forward(x, weight, bias):
        mean = x.mean(1, keepdim=True) if centered else torch.zeros_like(x[:, :1])
        inv = ((x - mean).square().mean(1, keepdim=True) + eps).rsqrt()
        normal = (x - mean) * inv
        y = normal * weight + bias if affine else normal
        return y, mean.squeeze(1), inv.squeeze(1), normal

    def backward(x, weight, grad):
        _, _, inv, normal = forward(x, weight, bias)
        h = grad * weight if affine else grad
        a = h.mean(1, keepdim=True) if centered else 0.0
        return inv[:, None] * (h - a - normal * (h * normal).mean(1, keepdim=True))

    _, _, inv, normal = forward(x, weight, bias)
    chosen = along if affine else (along[0], None, None)
    got = op("row_tangents_norm")(chosen[0], normal, inv, weight if affine else None, chosen[1], chosen[2], centered)
    wanted = [jvp(forward, (x, weight, bias), tuple(t[i] for t in along))[1] for i in range(k)]
    for number, result in enumerate(got):
        torch.testing.assert_close(result, torch.stack([w[number] for w in wanted]))
    got_bwd = op("row_tangents_norm_bwd")(
        data.g, along[0], got[1], got[2], chosen[1], normal, data.grad, inv, weight if affine else None, centered
    )
    tangents = (along[0], along[1], data.g)
    for i in range(k):
        wanted_bwd = jvp(backward, (x, weight, data.grad), tuple(t[i] for t in tangents))[1]
        torch.testing.assert_close(got_bwd[i], wanted_bwd)


def test_softmax_and_its_backward_are_what_autograd_has(on_backend):
    data = cases.Problem((3, 4, 9), torch.float64)

    def backward(z, grad):
        p = z.softmax(1)
        return p * (grad - (p * grad).sum(1, keepdim=True))

    z = data.normal
    p = z.softmax(1)
    along = op("row_tangents_softmax")(data.t, p, None, False)
    got = op("row_tangents_softmax_bwd")(data.g, along, p, data.grad)
    for i in range(3):
        torch.testing.assert_close(along[i], jvp(lambda z: z.softmax(1), (z,), (data.t[i],))[1])
        torch.testing.assert_close(got[i], jvp(backward, (z, data.grad), (data.t[i], data.g[i]))[1])


def test_cross_entropy_is_what_autograd_has(on_backend):
    data = cases.Problem((3, 5, 9), torch.float64)
    z, target, factor = data.normal, torch.tensor([0, 8, 3, 3, 1]), data.of_row
    found = op("row_tangents_softmax")(data.t, z.log_softmax(1), factor, True)

    def gradient(z):
        return torch.func.grad(
            lambda z: (torch.nn.functional.cross_entropy(z, target, reduction="none") * factor).sum()
        )(z)

    for i in range(3):
        torch.testing.assert_close(found[i], jvp(gradient, (z,), (data.t[i],))[1])


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_impossible_classes_and_rows_without_weight(on_backend, dtype):
    data = cases.Problem((3, 4, 40), dtype)
    data.log[:, 7:20] = float("-inf")
    data.of_row[1] = 0.0
    out = op("row_tangents_softmax")(data.t, data.log, data.of_row, True)
    assert out.isfinite().all()
    assert (out[:, :, 7:20] == 0).all()
    assert (out[:, 1] == 0).all()
    data.t[2, 1, 30] = float("nan")
    assert op("row_tangents_softmax")(data.t, data.log, data.of_row, True)[2, 1].isnan().all()


@pytest.mark.parametrize("name", cases.OPS)
def test_nan_keeps_to_its_row_of_its_tangent(on_backend, name):
    data = cases.Problem((3, 4, 40), torch.float32)
    for tensor in (data.x, data.g, data.t):
        tensor[1, 2, 33] = float("nan")
    for arguments in data.calls(name, every=False):
        out = cases.as_tuple(op(name)(*arguments))[0]
        assert out[1, 2].isnan().all()
        out[1, 2] = 0.0
        assert out.isfinite().all()


def test_statistics_without_a_tangent_of_the_input_are_zero(on_backend):
    data = cases.Problem((2, 3, 5), torch.bfloat16)
    out, mean, scale = op("row_tangents_norm")(None, data.normal, data.inv, None, None, data.along_bias, True)
    assert torch.equal(out, data.along_bias[:, None].expand(2, 3, 5))
    assert mean.dtype == scale.dtype == torch.float32
    assert not mean.any()
    assert not scale.any()


def results(shape, dtype):
    data = cases.Problem(shape, dtype)
    return [r for name in cases.OPS for a in data.calls(name, every=False) for r in cases.as_tuple(op(name)(*a))]


@pytest.mark.parametrize("shape", [(3, 4000, 10), (5, 1, 20001), (2, 60, 1000)], ids=str)
def test_bits_do_not_depend_on_threads(compiled, shape):
    before = torch.get_num_threads()
    expected = results(shape, torch.float32)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(results(shape, torch.float32), expected, strict=True))
    finally:
        torch.set_num_threads(before)


DIGEST = """
import hashlib
import fastflat
from tests.ops import row_tangents_cases as cases
from tests.ops.test_row_tangents import results
found = hashlib.sha256()
assert fastflat.backends()["cpu"] == "available"
for dtype in cases.DTYPES:
    for shape in (*cases.SHAPES, (2, 3, 5003)):
        for result in results(shape, dtype):
            found.update(result.double().numpy().tobytes())
print(found.hexdigest())
"""


def test_bits_do_not_depend_on_the_instruction_set(compiled):
    assert len(instruction_sets.outputs(DIGEST)) == 1


@pytest.mark.parametrize(("name", "arguments", "message"), cases.REFUSED, ids=[text for *_, text in cases.REFUSED])
def test_raw_ops_refuse_what_would_corrupt_memory(compiled, name, arguments, message):
    with pytest.raises(RuntimeError) as raised:
        op(name)(*arguments())
    assert f"fastflat::{name}: {message}" in str(raised.value)


@pytest.mark.parametrize("name", cases.OPS)
def test_raw_ops_have_no_derivative(name):
    data = cases.Problem((2, 3, 4), torch.float32)
    arguments = next(data.calls(name, every=False))
    arguments[0].requires_grad_()
    with pytest.raises(NotImplementedError, match=f"{name}: a raw op has no derivative"):
        op(name)(*arguments)


@pytest.mark.parametrize("name", cases.OPS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_opcheck(name, dtype):
    for arguments in cases.Problem((2, 3, 4), dtype).calls(name, every=False):
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(getattr(torch.ops.fastflat, name).default, arguments, test_utils=tests)


def test_all_absent_is_an_error_of_the_fake_kernel_too():
    with pytest.raises(ValueError, match="g, along must not all be None"):
        reference.row_tangents_softmax_bwd(None, None, torch.ones(1, 1), torch.ones(1, 1))


@pytest.mark.parametrize("name", cases.OPS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_bytes_of_the_op_table(name, dtype):
    """Every tensor once."""
    for arguments in cases.Problem((2, 3, 4), dtype).calls(name):
        found = cases.as_tuple(getattr(reference, name)(*arguments))
        tensors = [a for a in (*arguments, *found) if isinstance(a, torch.Tensor)]
        assert _ops.OPS[name].bytes_moved(*arguments) == sum(t.nbytes for t in tensors)

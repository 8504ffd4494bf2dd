# SPDX-License-Identifier: Apache-2.0
"""The weight_norms family: the compiled CPU kernels against the reference, the public functions against torch's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, hessian, jvp, vmap

import fastflat
from fastflat import _ops
from fastflat.backends import reference

from . import weight_norms_cases as cases


def op(name):
    return _ops.callable_of(name)


@pytest.mark.parametrize("name", cases.OPS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_against_the_reference(compiled, name, dtype):
    for shape in (*cases.SHAPES, (2, 9001)):
        cases.check(name, op(name), shape, dtype)
        cases.check(name, op(name), shape, dtype, special=True)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(cases.OPS),
    shape=st.tuples(st.integers(0, 80), st.integers(1, 150)),
    dtype=st.sampled_from(cases.DTYPES),
)
def test_any_shape(name, shape, dtype):
    cases.check(name, op(name), shape, dtype)


def test_bits_do_not_depend_on_threads(compiled):
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            data = cases.Problem((301, 700), torch.float32)
            found.append([r for name in cases.OPS for a in data.calls(name) for r in cases.as_tuple(op(name)(*a))])
        # The gradient of a reduction is that of the reference's sums, which torch may form in another order.
        assert all(torch.equal(a, b) for a, b in zip(found[0][:4] + found[0][5:], found[1][:4] + found[1][5:]))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("name", "arguments", "message"), cases.REFUSED, ids=[text for *_, text in cases.REFUSED])
def test_raw_ops_refuse_what_would_corrupt_memory(compiled, name, arguments, message):
    with pytest.raises(RuntimeError) as raised:
        op(name)(*arguments())
    assert f"fastflat::{name}: {message}" in str(raised.value)


@pytest.mark.parametrize("name", cases.OPS)
def test_the_schema_holds(name):
    for dtype in cases.DTYPES[:3]:
        for arguments in cases.Problem((3, 4), dtype).calls(name):
            tests = ("test_schema", "test_faketensor")
            torch.library.opcheck(getattr(torch.ops.fastflat, name).default, arguments, test_utils=tests)
            found = cases.as_tuple(getattr(reference, name)(*arguments))
            tensors = [a for a in (*arguments, *found) if isinstance(a, torch.Tensor)]
            assert _ops.OPS[name].bytes_moved(*arguments) == sum(t.nbytes for t in tensors)


def formulas(w):
    w = w.flatten(1)
    d = w - w.mean(1, keepdim=True)
    var = d.square().mean(1)
    size = w.abs()
    return w.mean(1), var, d.pow(3).mean(1) / var**1.5, size.sum(1), size.sum(0), size.max()


def test_reductions_are_their_formulas(on_backend):
    w = torch.randn(17, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    found, wanted = fastflat.weight_reduce(w), formulas(w)
    assert found._fields == ("mean", "var", "skew", "row_l1", "col_l1", "absmax")
    torch.testing.assert_close(tuple(found), wanted)
    torch.testing.assert_close(found.row_l1.max(), torch.linalg.matrix_norm(w.flatten(1), float("inf")))
    weights = [torch.randn_like(t) for t in wanted]
    ours, theirs = (
        torch.autograd.grad(sum((t * v).sum() for t, v in zip(values, weights, strict=True)), w)[0]
        for values in (found, wanted)
    )
    torch.testing.assert_close(ours, theirs)


def test_reductions_at_their_ends(on_backend):
    w = torch.zeros(2, 4, requires_grad=True)
    found = fastflat.weight_reduce(w)
    assert not any(t.any() for t in found)
    (gw,) = torch.autograd.grad(sum(t.sum() for t in found), w)
    torch.testing.assert_close(gw, torch.full_like(w, 0.25))
    symmetric = torch.tensor([[1.0, -1.0, 3.0, -3.0]])
    found = fastflat.weight_reduce(symmetric)
    assert found.mean == found.skew == 0
    tied = torch.tensor([[2.0, -2.0], [1.0, 0.0]], requires_grad=True)
    (gw,) = torch.autograd.grad(fastflat.weight_reduce(tied).absmax, tied)
    assert gw.tolist() == [[0.5, -0.5], [0.0, 0.0]]


def test_symmetry_regulariser_of_any_order(on_backend):
    """The regulariser of SymReg: gradient, Hessian and transforms."""
    w = torch.randn(3, 5, dtype=torch.float64)

    def regulariser(w, reduce=fastflat.weight_reduce):
        found = reduce(w)
        return (found[0].square() + 0.3 * found[2].square()).sum() + found[1].sum() + found[3].max() + found[4].max()

    leaf = w.clone().requires_grad_()
    assert torch.autograd.gradcheck(regulariser, leaf, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(regulariser, leaf)
    for transform in (
        lambda f: grad(f)(w),
        lambda f: hessian(f)(w),
        lambda f: jvp(f, (w,), (w.cos(),)),
        lambda f: vmap(f)(torch.stack([w, w.sin()])),
    ):
        torch.testing.assert_close(transform(regulariser), transform(lambda w: regulariser(w, formulas)))
    compiled = torch.compile(regulariser, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(leaf), leaf)[0], grad(regulariser)(w))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saturation_is_its_formula(on_backend, dtype):
    w = (torch.randn(500, dtype=torch.float64) * 3).to(dtype).requires_grad_()
    alpha = torch.tensor(1.3, dtype=dtype, requires_grad=True)
    error = 1e-6 if dtype == torch.float32 else 1e-14
    ours, theirs = fastflat.saturate(w, alpha), alpha * torch.tanh(w / alpha)
    torch.testing.assert_close(ours, theirs, rtol=error, atol=error)
    assert ours.abs().max() <= alpha
    found, wanted = (torch.autograd.grad(y.square().sum(), (w, alpha)) for y in (ours, theirs))
    torch.testing.assert_close(found, wanted, rtol=1e3 * error, atol=10 * error)


def test_saturation_far_from_its_bound_changes_nothing(on_backend):
    w = torch.randn(100) * 1e-3
    for alpha in (1e2, 1e6):
        torch.testing.assert_close(fastflat.saturate(w, torch.tensor(alpha)), w, rtol=3e-7, atol=0)
    assert fastflat.saturate(torch.tensor([float("nan"), float("inf")]), torch.tensor(0.5)).tolist()[1] == 0.5


def test_saturation_has_every_derivative(on_backend):
    w, alpha = torch.randn(3, 4, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    leaves = (w.clone().requires_grad_(), alpha.clone().requires_grad_())
    assert torch.autograd.gradcheck(fastflat.saturate, leaves, check_forward_ad=True, atol=1e-4)
    assert torch.autograd.gradgradcheck(fastflat.saturate, leaves)
    compiled = torch.compile(fastflat.saturate, fullgraph=True, backend="aot_eager")
    found = [torch.autograd.grad(f(*leaves).sum(), leaves) for f in (compiled, fastflat.saturate)]
    torch.testing.assert_close(*found)


W = torch.ones(2, 3)
BAD = (
    (lambda: fastflat.weight_reduce([1.0]), TypeError, "weight_reduce: w must be a tensor, got list"),
    (lambda: fastflat.weight_reduce(W[0]), ValueError, r"w must have shape \[O, I, ...\] and an element, got \[3\]"),
    (lambda: fastflat.weight_reduce(W[:, :0]), ValueError, r"and an element, got \[2, 0\]"),
    (lambda: fastflat.weight_reduce(W.int()), ValueError, "w must be float32, bfloat16, float16 or float64"),
    (lambda: fastflat.saturate(W, 0.5), TypeError, r"alpha must be a tensor, got float; write torch.tensor\(0.5\)"),
    (lambda: fastflat.saturate(W, W[0]), ValueError, r"alpha must have shape \[\], got \[3\]"),
    (lambda: fastflat.saturate(W, torch.ones((), dtype=torch.int64)), ValueError, "alpha must be torch.float32"),
)


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_input_is_one_line(call, kind, message):
    with pytest.raises(kind, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)

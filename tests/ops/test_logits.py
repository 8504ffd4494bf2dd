# SPDX-License-Identifier: Apache-2.0
"""The logits family: the compiled CPU kernels against the reference, and the public functions against torch's own."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import fastflat
from fastflat import _checks, _ops
from fastflat.backends import reference

from . import instruction_sets
from . import logits_cases as cases


def op(name):
    return _ops.callable_of(name)


@pytest.mark.parametrize("name", cases.OPS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_against_the_reference(compiled, name, dtype):
    for shape in (*cases.SHAPES, (2, 1, 5000)):
        cases.check(name, op(name), shape, dtype)
        cases.check(name, op(name), shape, dtype, special=True)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(cases.OPS),
    shape=st.tuples(st.integers(1, 5), st.integers(0, 40), st.integers(0, 90)),
    dtype=st.sampled_from(cases.DTYPES),
    special=st.booleans(),
)
def test_any_shape(name, shape, dtype, special):
    cases.check(name, op(name), shape, dtype, special=special)


@pytest.mark.parametrize("shape", [(1, 9000, 10), (1, 90, 1000)], ids=str)
def test_bits_do_not_depend_on_threads(compiled, shape):
    before = torch.get_num_threads()
    expected = cases.results(shape, torch.float32)
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(cases.results(shape, torch.float32), expected, strict=True))
    finally:
        torch.set_num_threads(before)


DIGEST = """
import hashlib
import fastflat
from tests.ops import logits_cases as cases
found = hashlib.sha256()
assert fastflat.backends()["cpu"] == "available"
for dtype in cases.DTYPES[::2]:
    for shape in cases.SHAPES[3:]:
        for result in cases.results(shape, dtype):
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
def test_the_schema_holds(name):
    for dtype in cases.DTYPES:
        for arguments in cases.Problem((2, 3, 4), dtype).calls(name):
            tests = ("test_schema", "test_faketensor")
            torch.library.opcheck(getattr(torch.ops.fastflat, name).default, arguments, test_utils=tests)
            found = cases.as_tuple(getattr(reference, name)(*arguments))
            tensors = [a for a in (*arguments, *found) if isinstance(a, torch.Tensor)]
            assert _ops.OPS[name].bytes_moved(*arguments) == sum(t.nbytes for t in tensors)
    arguments = next(cases.Problem((2, 3, 4), torch.float32).calls(name))
    arguments[0].requires_grad_()
    with pytest.raises(NotImplementedError, match=f"{name}: a raw op has no derivative"):
        op(name)(*arguments)


# Against torch ------------------------------------------------------------------------------------------------------


def both(z0, z):
    return z0.log_softmax(-1), z.log_softmax(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_divergences_are_those_of_torch(on_backend, dtype):
    data = cases.Problem((3, 17, 40), dtype)
    log_p, log_q = both(data.z0, data.z)
    kl = F.kl_div(log_q, log_p.expand_as(log_q), reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(fastflat.softmax_kl(data.z0, data.z), kl.mean(0))
    weight = data.g.abs()
    torch.testing.assert_close(fastflat.softmax_kl(data.z0, data.z[1], weight), weight * kl[1])
    every = torch.cat([log_p[None], log_q])
    mean = every.exp().mean(0).log().expand_as(every)
    js = F.kl_div(mean, every, reduction="none", log_target=True).sum(-1).mean(0)
    torch.testing.assert_close(fastflat.softmax_js(data.z0, data.z, weight), weight * js)


def test_divergences_at_their_ends(on_backend):
    z = torch.tensor([[100.0, 0.0], [3e38, -3e38], [1.0, 2.0]])
    assert fastflat.softmax_kl(z, z).abs().max() < 1e-6
    assert fastflat.softmax_js(z, z).abs().max() < 1e-6
    apart = fastflat.softmax_js(z[:1], torch.stack([z[:1].flip(1)] * 1))
    torch.testing.assert_close(apart, torch.tensor([math.log(2)]))
    torch.testing.assert_close(fastflat.softmax_kl(z[:1], z[:1].flip(1)), torch.tensor([100.0]))
    shifted = fastflat.softmax_kl(z[2:], z[2:] + 4096.0)
    assert shifted.abs().max() < 1e-6, "a common shift costs no digits"
    assert fastflat.softmax_kl(torch.zeros(2, 1), torch.ones(3, 2, 1)).tolist() == [0.0, 0.0]
    assert fastflat.softmax_kl(torch.zeros(0, 5), torch.ones(3, 0, 5)).shape == (0,)


def test_impossible_classes(on_backend):
    data = cases.Problem((3, 6, 9), torch.float32)
    kept = [0, 2, 3, 5, 8]
    z0, z = (torch.full_like(t, -math.inf) for t in (data.z0, data.z))
    z0[:, kept], z[:, :, kept] = data.z0[:, kept], data.z[:, :, kept]
    for function in (fastflat.softmax_kl, fastflat.softmax_js):
        leaves = [t.clone().requires_grad_() for t in (z0, z)]
        small = [t.clone().requires_grad_() for t in (data.z0[:, kept], data.z[:, :, kept])]
        torch.testing.assert_close(function(*leaves), function(*small))
        found = torch.autograd.grad(function(*leaves).sum(), leaves)
        wanted = torch.autograd.grad(function(*small).sum(), small)
        for got, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(got[..., kept], want)
            got[..., kept] = 0.0
            assert not got.any()
    z[0, 0, kept[0]] = -math.inf
    assert fastflat.softmax_kl(z0, z)[0] == math.inf
    assert fastflat.softmax_js(z0, z).isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_plain_loss_is_cross_entropy(on_backend, reduction, dtype):
    data = cases.Problem((1, 33, 12), dtype)
    weight = data.classes[3]
    for given_ in (None, weight):
        z = data.z0.clone().requires_grad_()
        ours = fastflat.rebalanced_ce(z, data.y, class_weight=given_, reduction=reduction)
        theirs = F.cross_entropy(z, data.y, given_, reduction=reduction)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), z)[0] for loss in (ours, theirs)))


def test_rebalanced_losses_are_their_formulas(on_backend):
    data = cases.Problem((1, 40, 10), torch.float64)
    z, y = data.z0, data.y.clamp(min=0)
    mult, add, margin, weight = data.classes
    ldam = 30 * (z - margin * F.one_hot(y, 10))
    torch.testing.assert_close(
        fastflat.rebalanced_ce(z, y, margin=margin, s=30, class_weight=weight), F.cross_entropy(ldam, y, weight)
    )
    torch.testing.assert_close(fastflat.rebalanced_ce(z, y, mult=mult, add=add), F.cross_entropy(z * mult + add, y))
    masked = add.clone()
    masked[3] = -math.inf
    torch.testing.assert_close(
        fastflat.rebalanced_ce(z, y, add=masked, reduction="none"),
        F.cross_entropy(z + masked, y, reduction="none"),
    )


def test_labels_that_are_no_class(on_backend, monkeypatch):
    z = torch.randn(4, 3, requires_grad=True)
    y = torch.tensor([0, 7, -100, -1])
    loss = fastflat.rebalanced_ce(z, y, reduction="none")
    assert loss.isnan().tolist() == [False, True, False, True]
    assert loss[2] == 0
    (gz,) = torch.autograd.grad(loss.sum(), z)
    assert gz[0].isfinite().all()
    assert not gz[2].any()
    assert fastflat.rebalanced_ce(z, torch.full((4,), -100)).isnan()
    assert fastflat.affine_logit_scan(z.detach(), z.detach(), torch.full((4,), -100), torch.ones(1)).isnan()
    monkeypatch.setattr(_checks, "VALUES_WANTED", True)
    with pytest.raises(ValueError, match=r"rebalanced_ce: y must lie in \[0, 2\], got 7"):
        fastflat.rebalanced_ce(z, y)


@pytest.mark.parametrize("classes", [1, 2, 11, 600])
def test_statistics_are_their_formulas(on_backend, classes):
    generator, rows = torch.Generator().manual_seed(1), 50 if classes < 100 else 5
    z = torch.randn(rows, classes, generator=generator, dtype=torch.float64) * 4
    y = torch.randint(classes, (rows,), generator=generator)
    y[3] = -100
    found = fastflat.softmax_stats(z, y)
    p, label = z.softmax(1), y.clamp(min=0)
    of_label = p.gather(1, label[:, None]).squeeze(1)
    other = p.scatter(1, label[:, None], 0.0).amax(1)
    wanted = [F.cross_entropy(z, y, reduction="none"), of_label, other - of_label, 2 * (p * (1 - p)).amax(1)]
    for got, want in zip(found[:3], wanted[:3], strict=True):
        assert got[3] == 0
        torch.testing.assert_close(got, want.masked_fill(y == -100, 0.0))
    torch.testing.assert_close(found.curvature, wanted[3])
    largest = torch.linalg.eigvalsh(torch.diag_embed(p) - p[:, :, None] * p[:, None])[:, -1]
    assert (found.curvature >= largest - 1e-12).all()


@pytest.mark.parametrize("shape", [(37, 10), (5, 300)])
def test_a_scan_is_a_loss_at_each_step(on_backend, shape):
    data = cases.Problem((2, *shape), torch.float64)
    t = torch.linspace(-1, 3, 9, dtype=torch.float64)
    wanted = torch.stack([F.cross_entropy(data.z0 - step * data.z[0], data.y) for step in t])
    torch.testing.assert_close(fastflat.affine_logit_scan(data.z0, data.z[0], data.y, t), wanted)


def test_16_bits_have_losses_in_32(on_backend):
    data = cases.Problem((2, 6, 9), torch.bfloat16)
    assert fastflat.softmax_kl(data.z0, data.z).dtype == torch.float32
    z0 = data.z0.clone().requires_grad_()
    loss = fastflat.rebalanced_ce(z0, data.y, mult=data.classes[0].bfloat16())
    assert loss.dtype == torch.float32
    assert torch.autograd.grad(loss, z0)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strided_logits_are_read_as_they_are(on_backend, dtype):
    data = cases.Problem((3, 6, 9), dtype)
    z0, z = data.z0.t().contiguous().t(), data.z.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert torch.equal(fastflat.softmax_js(z0, z), fastflat.softmax_js(data.z0, data.z))
    assert torch.equal(fastflat.rebalanced_ce(z0, data.y), fastflat.rebalanced_ce(data.z0, data.y))


Z, Y = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
REFUSED = (
    (lambda: fastflat.softmax_kl([1.0], Z), TypeError, "softmax_kl: z0 must be a tensor, got list"),
    (lambda: fastflat.softmax_kl(Z.int(), Z), ValueError, "z0 must be float32, bfloat16, float16 or float64"),
    (lambda: fastflat.softmax_js(Z[0], Z), ValueError, r"softmax_js: z0 must have shape \[B, C\], got \[3\]"),
    (lambda: fastflat.softmax_kl(Z, Z[:, :2]), ValueError, r"z must have shape \[K, B=4, C=3\] with K >= 1"),
    (lambda: fastflat.softmax_kl(Z, Z.new_zeros(0, 4, 3)), ValueError, r"with K >= 1, or that of z0, got \[0, 4, 3\]"),
    (lambda: fastflat.softmax_kl(Z, Z.double()), ValueError, r"z must have the dtype of z0 \(torch.float32\)"),
    (lambda: fastflat.softmax_kl(Z, Z, Z), ValueError, r"weight must have shape \[B=4\], got \[4, 3\]"),
    (lambda: fastflat.softmax_kl(Z, Z, 2.0), TypeError, "weight must be a tensor, got float"),
    (lambda: fastflat.rebalanced_ce(Z, Y.int()), ValueError, "y must be int64, got torch.int32; write y.long()"),
    (lambda: fastflat.rebalanced_ce(Z, Y[:3]), ValueError, r"y must have shape \[N=4\], got \[3\]"),
    (lambda: fastflat.rebalanced_ce(Z[:, :0], Y), ValueError, r"z must have shape \[N, C\] with C >= 1"),
    (lambda: fastflat.rebalanced_ce(Z, Y, add=Z[0, :2]), ValueError, r"add must have shape \[C=3\], got \[2\]"),
    (lambda: fastflat.rebalanced_ce(Z, Y, mult=Z[0].half()), ValueError, "mult must be torch.float32, got"),
    (lambda: fastflat.rebalanced_ce(Z, Y, s="x"), TypeError, "s must be a number, got str"),
    (lambda: fastflat.rebalanced_ce(Z, Y, s=math.nan), ValueError, "s must be finite, got nan"),
    (lambda: fastflat.rebalanced_ce(Z, Y, reduction="avg"), ValueError, "reduction must be one of none, mean, sum"),
    (lambda: fastflat.rebalanced_ce(Z, Y, ignore_index=1.0), TypeError, "ignore_index must be an int, got float"),
    (lambda: fastflat.softmax_stats(Z, None), TypeError, "softmax_stats: y must be a tensor, got NoneType"),
    (lambda: fastflat.affine_logit_scan(Z, Z[:2], Y, Z[0]), ValueError, r"b must have the shape of a, \[4, 3\]"),
    (lambda: fastflat.affine_logit_scan(Z, Z, Y, Z), ValueError, r"t must have shape \[K\], got \[4, 3\]"),
    (lambda: fastflat.affine_logit_scan(Z, Z, Y, [0.0]), TypeError, "t must be a tensor, got list"),
)


@pytest.mark.parametrize(("call", "kind", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_bad_input_is_one_line(call, kind, message):
    with pytest.raises(kind, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)

# SPDX-License-Identifier: Apache-2.0
"""The inputs family: the compiled CPU kernels against the reference, and what the public functions promise."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, jvp, vmap

import fastflat
from fastflat import _ops
from fastflat.backends import reference

from . import inputs_cases as cases


def op(name):
    return _ops.callable_of(name)


@pytest.mark.parametrize("name", cases.OPS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_against_the_reference(compiled, name, dtype):
    for shape in cases.SHAPES:
        cases.check(name, op(name), shape, dtype)
        cases.check(name, op(name), shape, dtype, special=True)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(cases.OPS),
    shape=st.tuples(st.integers(0, 9), st.integers(0, 700)),
    dtype=st.sampled_from(cases.DTYPES),
)
def test_any_shape(name, shape, dtype):
    cases.check(name, op(name), shape, dtype)


def test_bits_do_not_depend_on_threads(compiled):
    before, x = torch.get_num_threads(), torch.randn(70, 999)
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            noisy = op("inputs_noise")(x, cases.STATE, 2, 1, 1.0, 0.5)[0]
            steps = [op("inputs_pgd_step")(x, noisy[0], noisy[1], None, 0.1, 0.2, norm, -1.0, 1.0) for norm in (0, 1)]
            found.append([noisy, *steps])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    finally:
        torch.set_num_threads(before)


REFUSED = (*cases.REFUSED, *cases.STEP_REFUSED)


@pytest.mark.parametrize(("name", "arguments", "message"), REFUSED, ids=[text for *_, text in REFUSED])
def test_raw_ops_refuse_what_would_corrupt_memory(compiled, name, arguments, message):
    with pytest.raises(RuntimeError) as raised:
        op(name)(*arguments())
    assert f"fastflat::{name}: {message}" in str(raised.value)


@pytest.mark.parametrize("name", cases.OPS)
def test_the_schema_holds(name):
    for dtype in cases.DTYPES[:3]:
        for arguments in cases.Problem((2, 3, 4), dtype).calls(name):
            tests = ("test_schema", "test_faketensor")
            torch.library.opcheck(getattr(torch.ops.fastflat, name).default, arguments, test_utils=tests)
            found = cases.as_tuple(getattr(reference, name)(*arguments))
            tensors = [a for a in (*arguments, *found) if isinstance(a, torch.Tensor)]
            assert _ops.OPS[name].bytes_moved(*arguments) == sum(t.nbytes for t in tensors)


# Noise ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("law", "mean", "square"), [("const", 1, 1), ("uniform", 1 / 2, 1 / 3), ("exp", 1, 2)])
def test_noise_has_its_law(on_backend, law, mean, square):
    x = torch.zeros(4000, 50)
    state = torch.tensor([5, 7])
    noisy = fastflat.noise_batch(x, 2, law=law, smax=0.5, state=state)
    sigma = op("inputs_noise")(x, state, 2, {"const": 0, "uniform": 1, "exp": 2}[law], 0.5, 1.0)[1]
    xi = noisy / sigma[..., None]
    assert abs(xi.mean()) < 0.01
    assert abs(xi.square().mean() - 1) < 0.02
    assert abs(xi.pow(4).mean() - 3) < 0.1
    assert abs(sigma.mean() / 0.5 - mean) < 0.04
    assert abs(sigma.square().mean() / 0.25 - square) < 0.12
    assert abs((xi[0] * xi[1]).mean()) < 0.01, "copies are independent"
    if law == "uniform":
        assert sigma.max() < 0.5
        assert abs(torch.corrcoef(sigma)[0, 1]) < 0.06


def test_masked_elements_stay(on_backend):
    x, state = torch.randn(100, 300), torch.tensor([5, 8])
    noisy = fastflat.noise_batch(x, 3, law="const", smax=1.0, keep_prob=0.2, state=state)
    kept = noisy != x
    assert abs(kept.double().mean() - 0.2) < 0.01
    full = fastflat.noise_batch(x, 3, law="const", smax=1.0, state=state)
    assert torch.equal(noisy[kept], full[kept]), "the mask decides where, not what"
    assert abs(((noisy - x)[kept]).square().mean() - 1) < 0.05
    for keep_prob, smax in ((0.0, 1.0), (1.0, 0.0)):
        assert torch.equal(fastflat.noise_batch(x, 2, smax=smax, keep_prob=keep_prob), x.expand(2, *x.shape))


def test_noise_follows_the_generator(on_backend):
    x = torch.randn(8, 5)

    def draw(**options):
        return fastflat.noise_batch(x, 2, smax=1.0, **options)

    torch.manual_seed(3)
    first = draw()
    assert not torch.equal(first, draw())
    torch.manual_seed(3)
    assert torch.equal(first, draw())
    a, b = (draw(generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(a, b)


def test_noise_lets_every_gradient_through(on_backend):
    x, state = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), torch.tensor([1, 2])

    def noisy(x):
        return fastflat.noise_batch(x, 3, smax=0.5, keep_prob=0.5, state=state)

    assert torch.autograd.gradcheck(noisy, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: noisy(x).square(), x)
    point = x.detach()
    torch.testing.assert_close(grad(lambda x: noisy(x).square().sum())(point), 2 * noisy(point).sum(0))
    assert torch.equal(jvp(noisy, (point,), (point,))[1], point.expand(3, 4, 3))
    batch = vmap(noisy)(torch.stack([point, point]))
    assert torch.equal(batch[0], batch[1])
    compiled = torch.compile(noisy, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), noisy(x))
    assert torch.equal(torch.autograd.grad(compiled(x).sum(), x)[0], torch.full_like(x, 3.0))


# Steps ---------------------------------------------------------------------------------------------------------------


def test_a_step_is_its_formula(on_backend):
    data = cases.Problem((20, 3, 4, 4), torch.float64)
    xa, x0, g, active = data.xa, data.x0, data.g, data.active
    linf = (x0 + (xa + 0.03 * g.sign() - x0).clamp(-0.1, 0.1)).clamp(0, 1)
    rows = active[:, None, None, None]
    found = fastflat.pgd_step(xa, x0, g, step=0.03, eps=0.1, active=active)
    torch.testing.assert_close(found, torch.where(rows, linf, xa))
    length = g.flatten(1).norm(dim=1)[:, None, None, None]
    moved = xa + 0.3 * g / length - x0
    distance = moved.flatten(1).norm(dim=1)[:, None, None, None]
    l2 = (x0 + moved * (0.2 / distance).clamp(max=1)).clamp(0, 1)
    torch.testing.assert_close(fastflat.pgd_step(xa, x0, g, step=0.3, eps=0.2, norm="l2"), l2)


def test_a_step_where_there_is_no_gradient(on_backend):
    x = torch.rand(2, 5)
    for norm in ("linf", "l2"):
        assert torch.equal(fastflat.pgd_step(x, x, torch.zeros_like(x), step=0.1, eps=0.2, norm=norm), x)
    g = torch.ones_like(x)
    g[1, 2] = math.nan
    assert fastflat.pgd_step(x, x, g, step=0.1, eps=0.2).isnan().sum() == 1
    assert fastflat.pgd_step(x, x, g, step=0.1, eps=0.2, norm="l2")[1].isnan().all()
    assert fastflat.pgd_step(x, x, g, step=0.1, eps=0.2, active=torch.tensor([True, False])).isfinite().all()


def test_attack_of_a_linear_model_reaches_the_corner(on_backend):
    w, x = torch.randn(30), torch.rand(6, 30) * 0.4 + 0.3
    xa = x
    for _ in range(10):
        xa = fastflat.pgd_step(xa, x, w.expand_as(x).contiguous(), step=0.02, eps=0.1)
    torch.testing.assert_close(xa, x + 0.1 * w.sign())


X = torch.zeros(4, 3)
BAD = (
    (lambda: fastflat.noise_batch([1.0], smax=1.0), TypeError, "noise_batch: x must be a tensor, got list"),
    (lambda: fastflat.noise_batch(X[0, 0], smax=1.0), ValueError, "x must have a batch axis, got a scalar"),
    (lambda: fastflat.noise_batch(X, 0, smax=1.0), ValueError, "K must be 1 or more, got 0"),
    (lambda: fastflat.noise_batch(X, 1.5, smax=1.0), TypeError, "K must be an int, got float"),
    (lambda: fastflat.noise_batch(X, smax=1.0, law="normal"), ValueError, "law must be one of const, uniform, exp"),
    (lambda: fastflat.noise_batch(X, smax=-1.0), ValueError, r"smax must lie in \[0.0, inf\], got -1.0"),
    (lambda: fastflat.noise_batch(X, smax=math.nan), ValueError, "smax must lie in"),
    (lambda: fastflat.noise_batch(X, smax=math.inf), ValueError, "smax must be finite"),
    (lambda: fastflat.noise_batch(X, smax=1.0, keep_prob=2), ValueError, r"keep_prob must lie in \[0.0, 1.0\], got 2"),
    (lambda: fastflat.noise_batch(X, smax=1.0, state=X), ValueError, r"state must be int64 of shape \[2\]"),
    (lambda: fastflat.pgd_step(X, X[1:], X, step=1.0, eps=1.0), ValueError, r"x0 must have the shape of xa, \[4, 3\]"),
    (lambda: fastflat.pgd_step(X, X, X.double(), step=1.0, eps=1.0), ValueError, "g must have the dtype of xa"),
    (lambda: fastflat.pgd_step(X, X, X, step="a", eps=1.0), TypeError, "step must be a number, got str"),
    (lambda: fastflat.pgd_step(X, X, X, step=1.0, eps=-1.0), ValueError, "eps must lie in"),
    (lambda: fastflat.pgd_step(X, X, X, step=1.0, eps=1.0, lo=2.0), ValueError, r"lo must not exceed hi \(1.0\)"),
    (lambda: fastflat.pgd_step(X, X, X, step=1.0, eps=1.0, norm="l1"), ValueError, "norm must be one of linf, l2"),
    (lambda: fastflat.pgd_step(X, X, X, step=1.0, eps=1.0, active=X[:, 0]), ValueError, "active must be bool of shape"),
    (
        lambda: fastflat.pgd_step(X.clone().requires_grad_(), X, X, step=1.0, eps=1.0),
        ValueError,
        "xa must need no gradient, got one that does; write xa.detach()",
    ),
    (
        lambda: grad(lambda x: fastflat.pgd_step(x, X, X, step=1.0, eps=1.0).sum())(X),
        NotImplementedError,
        "pgd_step: a step has no derivative",
    ),
)


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_input_is_one_line(call, kind, message):
    with pytest.raises(kind, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)

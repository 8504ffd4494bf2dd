# SPDX-License-Identifier: Apache-2.0
"""The compressors family: the compiled CPU kernels against the reference, and what the public functions promise."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastflat
from fastflat import _ops
from fastflat.backends import reference

from . import compressors_cases as cases

METHODS = ("sign", "qsgd", "terngrad")


def op(name):
    return _ops.callable_of(name)


@pytest.mark.parametrize("name", cases.OPS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_against_the_reference(compiled, name, dtype):
    for shape in cases.SHAPES:
        cases.check(name, op(name), shape, dtype)
    cases.check(name, op(name), (3, 171), dtype, special=True)


@settings(max_examples=25, deadline=None)
@given(name=st.sampled_from(cases.OPS), n=st.integers(0, 1600), dtype=st.sampled_from(cases.DTYPES))
def test_any_size(name, n, dtype):
    cases.check(name, op(name), (n,), dtype, special=n % 2 == 0)


def test_any_layout(compiled):
    x = torch.randn(40, 30)
    for g in (
        x.t(),
        x[:, ::2],
        torch.randn(1200 + 1)[1:],
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    ):
        for method in METHODS:
            found, wanted = (fastflat.compress(t, method, state=state(method)) for t in (g, g.contiguous()))
            assert torch.equal(found.codes, wanted.codes)
        assert torch.equal(fastflat.compress_topk(g, 7).indices, fastflat.compress_topk(g.contiguous(), 7).indices)


def test_bits_do_not_depend_on_threads(compiled):
    before, g, found = torch.get_num_threads(), torch.randn(200_003), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results = []
            for method in METHODS:
                error = torch.full_like(g, 0.1)
                sent = fastflat.compress(g, method, error=error, state=state(method))
                results += [*sent[:2], error, fastflat.decompress(sent)]
            error = torch.full_like(g, 0.1)
            results += [*fastflat.compress_topk(g, 2000, error=error)[:2], error]
            found.append(results)
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("name", "arguments", "message"), cases.REFUSED, ids=[text for *_, text in cases.REFUSED])
def test_raw_ops_refuse_what_would_corrupt_memory(compiled, name, arguments, message):
    with pytest.raises(RuntimeError) as raised:
        op(name)(*arguments())
    assert f"fastflat::{name}: {message}" in str(raised.value)


@pytest.mark.parametrize("name", cases.OPS)
def test_the_schema_holds(name):
    for arguments in list(cases.Problem((2, 13), torch.bfloat16).calls(name))[::9]:
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(getattr(torch.ops.fastflat, name).default, cases.own(arguments), test_utils=tests)
        found = cases.as_tuple(getattr(reference, name)(*cases.own(arguments)))
        read = [a for a in arguments if isinstance(a, torch.Tensor)]
        written = {"compressors_encode_": arguments[1:2], "compressors_topk_": arguments[1:2]}.get(name, ())
        if name == "compressors_decode_" and arguments[-1]:
            written = arguments[:1]
        written = [a for a in written if a is not None]
        assert _ops.OPS[name].bytes_moved(*arguments) == sum(
            t.numel() * t.element_size() for t in (*read, *written, *found)
        )


# Closed forms --------------------------------------------------------------------------------------------------------


def state(method):
    return None if method == "sign" else torch.tensor([3, 4])


def test_sign_is_its_formula(on_backend):
    g = torch.tensor([3.0, -1.0, 0.0, -0.0, 2.0, -6.0, 0.5, -0.5, 5.0])
    error = torch.zeros(9)
    sent = fastflat.compress(g, "sign", error=error)
    assert sent.codes.tolist() == [0b01011101, 1]
    assert sent.units.item() == 2.0
    plus = torch.tensor([1.0, -1, 1, 1, 1, -1, 1, -1, 1]) * 2
    assert torch.equal(fastflat.decompress(sent), plus)
    assert torch.equal(error, g - plus)
    assert sent.nbytes == 2 + 4


@pytest.mark.parametrize(
    ("method", "options"),
    [("qsgd", {}), ("qsgd", {"levels": 1, "norm": "max"}), ("qsgd", {"levels": 100}), ("terngrad", {})],
)
def test_quantized_is_within_a_unit_and_unbiased(on_backend, method, options):
    g, draws = torch.randn(40, dtype=torch.float64), 3000
    sent = fastflat.compress(g.repeat(draws, 1), method, bucket=40, state=torch.tensor([1, 2]), **options)
    found, unit = fastflat.decompress(sent), sent.units[0]
    levels = options.get("levels", 7 if method == "qsgd" else 1)
    norm = g.norm() if method == "qsgd" and "norm" not in options else g.abs().max()
    torch.testing.assert_close(unit, norm / levels, rtol=1e-12, atol=0)
    torch.testing.assert_close((found / unit).round() * unit, found, rtol=1e-12, atol=0)
    assert ((found - g).abs() < unit).all()
    fraction = (g.abs() / unit) % 1
    deviation = unit * (fraction * (1 - fraction) / draws).sqrt()
    # 3.9 standard errors, beyond which one of 10^4 numbers lies, and the resolution of the draws.
    assert ((found.mean(0) - g).abs() <= 3.9 * deviation + unit * 2**-16).all()


def test_terngrad_clips(on_backend):
    g = torch.tensor([10.0, 1, -1, 1, -1, 1, -1, 1])
    size = g.square().mean().sqrt()
    error = torch.zeros(8)
    sent = fastflat.compress(g, "terngrad", clip=1.0, error=error)
    torch.testing.assert_close(sent.units[0], size)
    torch.testing.assert_close(error[0], g[0] - size)


@pytest.mark.parametrize("method", [*METHODS, "topk"])
def test_what_is_sent_and_what_is_left_are_all_gradients(on_backend, method):
    """Exactly: gradients and units are whole multiples of a power of two, and so is every sum."""
    error, total, sent_all = (torch.zeros(4, 2, dtype=torch.float64) for _ in range(3))
    for step in range(6):
        g = torch.randint(-8, 9, (4, 2)).double()
        g[0, 0] = 8.0
        total += g
        if method == "topk":
            decoded = fastflat.decompress_topk(fastflat.compress_topk(g, 2, error=error))
        else:
            options = {} if method == "sign" else {"state": torch.tensor([5, step])}
            options |= {"norm": "max", "levels": 4} if method == "qsgd" else {}
            decoded = fastflat.decompress(fastflat.compress(g, method, error=error, **options))
        sent_all += decoded
        assert torch.equal(sent_all + error, total)
    assert error.any()


def test_topk_takes_the_largest_and_of_equals_the_first(on_backend):
    g = torch.tensor([1.0, -3.0, 2.0, 3.0, -2.0, 0.0])
    error = torch.tensor([0.0, 0, 0, 0, 0, 0.5])
    sent = fastflat.compress_topk(g, 3, error=error)
    assert sent.indices.tolist() == [1, 2, 3]
    assert sent.values.tolist() == [-3.0, 2.0, 3.0]
    assert error.tolist() == [1.0, 0, 0, 0, -2.0, 0.5]
    assert fastflat.compress_topk(torch.tensor([1.0, math.nan, math.inf]), 1).indices.item() == 1
    half = torch.tensor([1.0, 0.1]).half()
    error = torch.tensor([2.0**-12, 0.0])
    assert fastflat.compress_topk(half, 1, error=error).values.item() == 1.0
    assert error[0] == 2.0**-12, "what rounding took stays"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_seen_and_leaves_the_error_as_it_was(on_backend, method, value):
    g, before = torch.randn(64), torch.randn(64)
    g[3] = value
    error = before.clone()
    sent = fastflat.compress(g, method, error=error, bucket=32)
    decoded = fastflat.decompress(sent)
    assert not decoded[:32].isfinite().any()
    assert decoded[32:].isfinite().all()
    assert torch.equal(error[:32], before[:32])
    assert not torch.equal(error[32:], before[32:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_workers_are_summed_in_order(on_backend, dtype):
    gradients = torch.randn(3, 100)
    for method in METHODS:
        each = [fastflat.compress(g, method) for g in gradients]
        both = each[0]._replace(codes=torch.stack([c.codes for c in each]), units=torch.stack([c.units for c in each]))
        mean = (fastflat.decompress(each[0]) + fastflat.decompress(each[1]) + fastflat.decompress(each[2])) * (1 / 3)
        out = torch.ones(100, dtype=dtype)
        assert fastflat.decompress(both, out, factor=1 / 3) is out
        assert torch.equal(out, mean.to(dtype))
        fastflat.decompress(both, out, factor=1 / 3, add=True)
        assert torch.equal(out, (mean.to(dtype).float() + mean).to(dtype))
    each = [fastflat.compress_topk(g, 9) for g in gradients]
    both = each[0]._replace(
        values=torch.stack([c.values for c in each]), indices=torch.stack([c.indices for c in each])
    )
    wanted = sum(fastflat.decompress_topk(c) for c in each)
    torch.testing.assert_close(fastflat.decompress_topk(both), wanted)


def test_codes_follow_the_generator(on_backend):
    g = torch.randn(500)

    def codes(**options):
        return fastflat.compress(g, "qsgd", **options).codes

    torch.manual_seed(3)
    first = codes()
    assert not torch.equal(first, codes())
    torch.manual_seed(3)
    assert torch.equal(first, codes())
    a, b = (codes(generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(a, b)


def test_compiled_as_in_eager():
    def both(g, error):
        return fastflat.decompress(fastflat.compress(g, "sign", error=error))

    g, a, b = torch.randn(33), torch.ones(33), torch.ones(33)
    assert torch.equal(torch.compile(both, fullgraph=True, backend="aot_eager")(g, a), both(g, b))
    assert torch.equal(a, b)


G = torch.zeros(4, 3)
C = fastflat.compress(G, "sign")
BAD = (
    (lambda: fastflat.compress([1.0]), TypeError, "compress: g must be a tensor, got list"),
    (lambda: fastflat.compress(G, "topk"), ValueError, "method must be one of sign, qsgd, terngrad, got 'topk'"),
    (lambda: fastflat.compress(G, "sign", levels=3), ValueError, "levels must be None unless method is qsgd, got 3"),
    (lambda: fastflat.compress(G, "qsgd", levels=0), ValueError, r"levels must lie in \[1, 127\], got 0"),
    (lambda: fastflat.compress(G, "qsgd", levels=1.5), TypeError, "levels must be an int, got float"),
    (lambda: fastflat.compress(G, "qsgd", norm="l1"), ValueError, "norm must be l2 or max, got 'l1'"),
    (lambda: fastflat.compress(G, "qsgd", clip=2.5), ValueError, "clip must be None unless method is terngrad"),
    (lambda: fastflat.compress(G, "terngrad", clip=0), ValueError, "clip must be positive and finite, got 0"),
    (lambda: fastflat.compress(G, bucket=0), ValueError, "bucket must lie in"),
    (lambda: fastflat.compress(G, state=torch.tensor([1, 2])), TypeError, "state must be None with sign"),
    (lambda: fastflat.compress(G, error=G[0]), ValueError, r"error must be contiguous torch.float32 of shape \[4, 3\]"),
    (lambda: fastflat.compress(G, error=G.double()), ValueError, "error must be contiguous torch.float32"),
    (lambda: fastflat.compress(G.clone().requires_grad_()), ValueError, "g must need no gradient"),
    (lambda: fastflat.compress_topk(G, 0), ValueError, r"k must lie in \[1, 12\], got 0"),
    (lambda: fastflat.compress_topk(G, 13), ValueError, r"k must lie in \[1, 12\], got 13"),
    (lambda: fastflat.decompress(G), TypeError, "compressed must be what compress returns, got Tensor"),
    (lambda: fastflat.decompress(C, G[0].clone()), ValueError, "out must be contiguous with 12 elements, got 3"),
    (lambda: fastflat.decompress(C, G.double()), ValueError, "out must be float64 for float64 units"),
    (lambda: fastflat.decompress(C, add=True), ValueError, "out must be a tensor with add"),
    (lambda: fastflat.decompress(C, factor="a"), TypeError, "factor must be a number, got str"),
    (
        lambda: fastflat.decompress(C._replace(codes=C.codes[1:])),
        ValueError,
        r"codes must be torch.uint8 of shape \[2\]",
    ),
    (lambda: fastflat.decompress_topk(C), TypeError, "largest must be what compress_topk returns, got Compressed"),
)


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=[text for *_, text in BAD])
def test_bad_input_gets_one_line(call, kind, message):
    with pytest.raises(kind, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_codes_have_no_derivative():
    with pytest.raises(NotImplementedError, match="compress: codes have no derivative"):
        torch.func.grad(lambda g: fastflat.decompress(fastflat.compress(g)).sum())(G)

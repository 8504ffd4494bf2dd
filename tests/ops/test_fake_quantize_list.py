# SPDX-License-Identifier: Apache-2.0
"""A list in one call against a call for each tensor: the same bits of values and gradients, whatever the mode."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastflat as ff
from fastflat._ops import compute_dtype, scale_shape
from fastflat.backends import reference

from . import comparison as common

ops = torch.ops.fastflat
EPS = 2.0**-126
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
#: (shape, axis, group): every way in which elements meet scales, and how sums are cut: channels, one range, many.
PLACES = [
    ((), -1, 0),
    ((0,), -1, 0),
    ((0, 4), 1, 0),
    ((7,), -1, 0),
    ((40001,), -1, 0),
    ((150001,), -1, 0),
    ((5, 3, 3, 3), 0, 0),
    ((70, 27), 0, 0),
    ((70, 1000), 0, 0),
    ((600, 30), 1, 0),
    ((9000, 12), 1, 0),
    ((2, 3, 130, 257), 1, 0),
    ((6, 64), -1, 16),
    ((300, 256), -1, 128),
]
SPECS = [
    ff.QuantSpec.lsq(4),
    ff.QuantSpec.lsq(3, axis=0),
    ff.QuantSpec(bits=8, axis=-1),
    ff.QuantSpec.lsq(4, group=2, signed=False),
    ff.QuantSpec.torch(5, axis=0),
    ff.QuantSpec.lsq(3, symmetric=False, zero="float"),
    ff.QuantSpec.lsq(2, axis=1, mask="none", scale_is="log2"),
]


def raw_arguments(seed, places=PLACES, dtypes=DTYPES, zero="some", special=True):
    """The lists of a raw call: types and places mixed, zero-points for some."""
    generator = torch.Generator().manual_seed(seed)
    xs, scales, zeros, gys, grids = [], [], [], [], []
    for i, (shape, axis, group) in enumerate(places):
        x = common.random_data(shape, dtypes[(i + seed) % len(dtypes)], seed + i, special)
        parameters, compute = scale_shape(x.shape, axis, group), compute_dtype(x.dtype)
        scales.append(torch.rand(parameters, generator=generator, dtype=compute) + 0.05)
        has_zero = zero == "all" or (zero == "some" and i % 3 == 0)
        zeros.append(torch.randn(parameters, generator=generator, dtype=compute) * 3 if has_zero else None)
        gys.append(torch.randn(shape, generator=generator).to(x.dtype))
        xs.append(x)
        grids.append((-8, 7, axis, group, EPS, (0, 1, 6, 8 + 32 + 64 + 128)[i % 4]))
    return gys, xs, scales, zeros if zero != "none" else [], tuple(map(list, zip(*grids, strict=True)))


def singly(gys, xs, scales, zeros, grids, factors, needs, dtype=None):
    """The same by a raw call each."""
    calls = list(zip(xs, scales, zeros or [None] * len(xs), *grids, strict=True))
    ys = [ops.fake_quantize(*call, dtype) for call in calls]
    rest = zip(gys, calls, factors, needs, strict=True)
    return ys, [ops.fake_quantize_bwd(gy, *call, f, bool(need)) for gy, call, f, need in rest]


def assert_same_lists(actual, expected):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        common.assert_same_bits(a, e)


def check_raw(gys, xs, scales, zeros, grids, needs, dtype=None):
    factors = [0.1 * (i + 1) for i in range(len(xs))]
    ys, gradients = singly(gys, xs, scales, zeros, grids, factors, needs, dtype)
    assert_same_lists(ops.fake_quantize_list(xs, scales, zeros, *grids, dtype), ys)
    gxs, gss, gzs = ops.fake_quantize_list_bwd(gys, xs, scales, zeros, *grids, factors, needs)
    assert_same_lists(gxs, [g[0] for g in gradients])
    assert_same_lists(gss, [g[1] for g in gradients] if any(needs) else [])
    any_zero = any(need and z is not None for need, z in zip(needs, zeros or [None] * len(xs), strict=True))
    assert_same_lists(gzs, [g[2] for g in gradients] if any_zero else [])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("zero", ["none", "some", "all"])
@pytest.mark.parametrize("seed", range(2))
def test_same_bits_as_calls_for_each(on_backend, seed, zero, threads):
    gys, xs, scales, zeros, grids = raw_arguments(seed, zero=zero)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_raw(gys, xs, scales, zeros, grids, [1] * len(xs))
        check_raw(gys, xs, scales, zeros, grids, [int(i % 2 == seed % 2) for i in range(len(xs))])
        check_raw(gys, xs, scales, zeros, grids, [0] * len(xs))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cast_in_the_same_pass(compiled, dtype):
    gys, xs, scales, zeros, grids = raw_arguments(0, dtypes=[torch.float32])
    check_raw([g.to(dtype) for g in gys], xs, scales, zeros, grids, [1] * len(xs), dtype)


def test_layouts(compiled):
    x = torch.randn(6, 8, 10, 12)
    views = [x, x.to(memory_format=torch.channels_last), x[:, :, ::2], x.transpose(1, 3), x[:1].expand(6, 8, 10, 12)]
    scales = [torch.rand(v.shape[1]) + 0.1 for v in views]
    grids = tuple([v] * len(views) for v in (-8, 7, 1, 0, EPS, 0))
    check_raw([torch.randn(v.shape) for v in views], views, scales, [], grids, [1] * len(views))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_list(data):
    places = st.one_of(
        st.tuples(st.tuples(st.integers(0, 300)), st.sampled_from([-1, 0]), st.just(0)),
        st.tuples(st.tuples(st.integers(1, 80), st.integers(0, 90)), st.sampled_from([-1, 0, 1]), st.just(0)),
        st.tuples(st.integers(1, 5).map(lambda k: (7, 6 * k)), st.just(-1), st.sampled_from([2, 3, 6])),
    )
    chosen = data.draw(st.lists(places, max_size=9))
    zero = data.draw(st.sampled_from(["none", "some", "all"]))
    if not chosen:
        return
    gys, xs, scales, zeros, grids = raw_arguments(data.draw(st.integers(0, 99)), chosen, zero=zero)
    check_raw(gys, xs, scales, zeros, grids, data.draw(st.lists(st.integers(0, 1), min_size=len(xs), max_size=len(xs))))


def test_empty_list(on_backend):
    assert ops.fake_quantize_list([], [], [], [], [], [], [], [], []) == []
    assert ff.fake_quantize_list([], [], []) == []
    assert ff.fake_quantize_list([], [], ff.QuantSpec()) == []


# The function --------------------------------------------------------------------------------------------------------


def arguments(specs, seed=0, dtype=torch.float64, requires_grad=True):
    generator = torch.Generator().manual_seed(seed)
    xs, scales, zeros = [], [], []
    for i, spec in enumerate(specs):
        x = torch.randn((4, 5 + i, 6), generator=generator, dtype=dtype)
        shape = (*x.shape[:-1], x.shape[-1] // spec.group) if spec.group else ()
        shape = (x.shape[spec.axis],) if spec.axis is not None else shape
        trained = requires_grad and spec.trains_scale
        scale = torch.rand(shape, generator=generator, dtype=compute_dtype(dtype)) * 0.3 + 0.2
        scales.append(scale.requires_grad_(trained))
        zero = None if spec.symmetric else torch.randn(shape, generator=generator, dtype=compute_dtype(dtype))
        zeros.append(zero if zero is None else zero.requires_grad_(trained))
        xs.append(x.requires_grad_(requires_grad))
    return xs, scales, zeros


def each(xs, scales, specs, zeros, dtype=None):
    calls = zip(xs, scales, specs, zeros, strict=True)
    return [ff.fake_quantize(x, s, z, spec=spec, dtype=dtype) for x, s, spec, z in calls]


def leaves_of(*lists):
    return [t for given in lists for t in given if t is not None and t.requires_grad]


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(on_backend, dtype):
    xs, scales, zeros = arguments(SPECS, dtype=dtype)
    leaves = leaves_of(xs, scales, zeros)
    gys = [torch.randn_like(x) for x in xs]
    got, want = ff.fake_quantize_list(xs, scales, SPECS, zeros), each(xs, scales, SPECS, zeros)
    assert_same_lists([y.detach() for y in got], [y.detach() for y in want])
    assert_same_lists(torch.autograd.grad(got, leaves, gys), torch.autograd.grad(want, leaves, gys))


def test_unused_outputs_take_no_part(on_backend):
    xs, scales, zeros = arguments(SPECS)
    ys, expected = ff.fake_quantize_list(xs, scales, SPECS, zeros), each(xs, scales, SPECS, zeros)
    kept = [0, 3, 5]
    leaves = leaves_of(xs, scales, zeros)
    got, want = (
        torch.autograd.grad(sum((t[i] ** 2).sum() for i in kept), leaves, allow_unused=True) for t in (ys, expected)
    )
    assert [g is None for g in got] == [g is None for g in want]
    assert any(g is None for g in got)
    assert_same_lists([g for g in got if g is not None], [g for g in want if g is not None])
    alone = ff.fake_quantize_list(xs, scales, SPECS, zeros)[1]
    assert torch.autograd.grad(alone, xs[0], torch.ones_like(alone), allow_unused=True) == (None,)


def test_frozen_tensors_need_no_gradient(on_backend):
    specs = [ff.QuantSpec(), ff.QuantSpec.lsq(4), ff.QuantSpec.lsq(4)]
    xs, scales, _ = arguments(specs)
    xs[0].requires_grad_(False)
    xs[1].requires_grad_(False)
    ys = ff.fake_quantize_list(xs, scales, specs)
    assert [y.requires_grad for y in ys] == [False, True, True]
    with torch.no_grad():
        assert not any(y.requires_grad for y in ff.fake_quantize_list(xs, scales, specs))
    frozen = [x.detach() for x in xs], [s.detach() for s in scales]
    assert not any(y.requires_grad for y in ff.fake_quantize_list(*frozen, specs))


def test_saves_inputs_only(on_backend):
    saved = []
    specs = [ff.QuantSpec.lsq(4), ff.QuantSpec.lsq(3, axis=0)]
    xs, scales, _ = arguments(specs)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()), lambda t: t):
        ff.fake_quantize_list(xs, scales, specs)
    assert sorted(saved) == sorted(t.data_ptr() for t in (*xs, *scales))


def test_general_specs_are_computed_singly(on_backend):
    specs = [ff.QuantSpec.lsq(4), ff.QuantSpec.lsq(4, noise="uniform"), ff.QuantSpec(format="e4m3"), ff.QuantSpec()]
    xs, scales, zeros = arguments(specs)
    torch.manual_seed(3)
    got = ff.fake_quantize_list(xs, scales, specs)
    torch.manual_seed(3)
    want = each(xs, scales, specs, zeros)
    assert_same_lists([y.detach() for y in got], [y.detach() for y in want])
    leaves = leaves_of(xs, scales)
    gys = [torch.randn_like(x) for x in xs]
    assert_same_lists(torch.autograd.grad(got, leaves, gys), torch.autograd.grad(want, leaves, gys))


def test_scales_in_the_type_of_the_data(on_backend):
    xs, scales, _ = arguments([ff.QuantSpec.lsq(4)] * 2, dtype=torch.bfloat16)
    scales = [s.detach().bfloat16().requires_grad_() for s in scales]
    ys = ff.fake_quantize_list(xs, scales, ff.QuantSpec.lsq(4))
    want = each(xs, scales, [ff.QuantSpec.lsq(4)] * 2, [None] * 2)
    assert_same_lists([y.detach() for y in ys], [y.detach() for y in want])
    gys = [torch.randn_like(x) for x in xs]
    got = torch.autograd.grad(ys, xs + scales, gys)
    assert_same_lists(got, torch.autograd.grad(want, xs + scales, gys))


def loss(ys):
    return sum((y**3).sum() + y.sin().sum() for y in ys)


def test_double_backward(on_backend):
    xs, scales, zeros = arguments(SPECS)
    leaves = leaves_of(xs, scales, zeros)
    results = []
    for ys in (ff.fake_quantize_list(xs, scales, SPECS, zeros), each(xs, scales, SPECS, zeros)):
        first = torch.autograd.grad(loss(ys), leaves, create_graph=True)
        second = torch.autograd.grad(sum((g * g).sum() for g in first), leaves)
        results.append((*(g.detach() for g in first), *second))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_torch_func_and_forward_mode(on_backend):
    specs = SPECS[:4]
    xs, scales, _ = arguments(specs, requires_grad=False)

    def of_list(xs, scales):
        return ff.fake_quantize_list(xs, scales, specs)

    def of_each(xs, scales):
        return each(xs, scales, specs, [None] * len(specs))

    tangents = [torch.randn_like(x) for x in xs]
    for f in (of_list, of_each):
        grads = torch.func.grad(lambda xs, f=f: loss(f(xs, scales)))(xs)
        values, ty = torch.func.jvp(lambda xs, f=f: f(xs, scales), (xs,), (tangents,))
        batched = torch.func.vmap(lambda xs, f=f: f(xs, scales))([torch.stack([x, 2 * x]) for x in xs])
        if f is of_list:
            found = (*grads, *values, *ty, *batched)
        else:
            assert_same_lists(found, (*grads, *values, *ty, *batched))


def test_batched_cotangents(on_backend):
    specs = SPECS[:2]
    xs, scales, _ = arguments(specs)
    gys = [torch.randn(3, *x.shape, dtype=x.dtype) for x in xs]
    leaves = leaves_of(xs, scales)
    got, want = (
        torch.autograd.grad(ys, leaves, gys, is_grads_batched=True)
        for ys in (ff.fake_quantize_list(xs, scales, specs), each(xs, scales, specs, [None] * 2))
    )
    assert_same_lists(got, want)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compile(compiled):
    specs = [ff.QuantSpec.lsq(4), ff.QuantSpec.lsq(3, axis=0), ff.QuantSpec.lsq(3, symmetric=False), ff.QuantSpec()]
    xs, scales, zeros = arguments(specs, dtype=torch.float32)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled_loss(xs, scales, zeros):
        return loss(ff.fake_quantize_list(xs, scales, specs, zeros))

    leaves = leaves_of(xs, scales, zeros)
    value, expected = compiled_loss(xs, scales, zeros), loss(each(xs, scales, specs, zeros))
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
    got, want = torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_plans_follow_the_metadata(on_backend):
    """A second call with other shapes, types or trained tensors takes no plan of the first."""
    spec = ff.QuantSpec.lsq(4)
    x, s = torch.randn(5), torch.tensor(0.1)
    assert not ff.fake_quantize_list([x], [s], [spec])[0].requires_grad
    assert ff.fake_quantize_list([x], [s.clone().requires_grad_()], [spec])[0].requires_grad
    assert ff.fake_quantize_list([x.double()], [s.double()], [spec])[0].dtype == torch.float64
    assert ff.fake_quantize_list([x], [s], [spec], dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    again = ff.QuantSpec.lsq(2)
    assert not torch.equal(*(ff.fake_quantize_list([x], [s], [k])[0] for k in (spec, again)))


@pytest.mark.parametrize("name", ["fake_quantize_list", "fake_quantize_list_bwd"])
def test_opcheck(compiled, name):
    places = [((6, 4), 1, 0), ((3, 8), -1, 4), ((5,), -1, 0)]
    gys, xs, scales, zeros, grids = raw_arguments(1, places, [torch.float32], special=False)
    args = (xs, scales, zeros, *grids)
    if name.endswith("bwd"):
        args = (gys, *args, [0.5] * 3, [1, 0, 1])
    torch.library.opcheck(getattr(ops, name).default, args)
    empty = [[] if v is zeros else v for v in args]
    torch.library.opcheck(getattr(ops, name).default, tuple(empty))


def test_raw_ops_refuse_derivatives():
    gys, xs, scales, zeros, grids = raw_arguments(1, [((6, 4), 1, 0), ((5,), -1, 0)], [torch.float32])
    xs[1].requires_grad_()
    with pytest.raises(NotImplementedError, match="fastflat::fake_quantize_list: a raw op has no derivative"):
        ops.fake_quantize_list(xs, scales, zeros, *grids)
    with pytest.raises(NotImplementedError, match="fastflat::fake_quantize_list_bwd: a raw op has no derivative"):
        ops.fake_quantize_list_bwd(gys, xs, scales, zeros, *grids, [1.0] * 2, [1] * 2)


SPEC = ff.QuantSpec.lsq(4, axis=0)
X, S = torch.randn(3, 4), torch.ones(3)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (([X, X], [S], SPEC), r"fake_quantize_list: scales must be as long as xs \(2\), got 1"),
        (([X], [S], [SPEC, SPEC]), r"specs must be as long as xs \(1\), got 2"),
        (([X], [S], [SPEC], [None, None]), r"zero_points must be as long as xs \(1\), got 2"),
        ((X, [S], SPEC), "xs must be a list, got Tensor"),
        (([X], S, SPEC), "scales must be a list, got Tensor"),
        (([X], [S], 4), "specs must be a list, got int"),
        (([X, X], [S, S[:2]], SPEC), r"fake_quantize_list\[1\]: scale must have shape \[C=3\], got \[2\]"),
        (([X, 1.0], [S, S], SPEC), r"fake_quantize_list\[1\]: x must be a tensor, got float"),
        (([X], [S], ["lsq"]), r"fake_quantize_list\[0\]: spec must be a QuantSpec, got str"),
        (([X, X.to("meta")], [S, S.to("meta")], SPEC), r"xs\[1\] must be on the device of xs\[0\] \(cpu\), got meta"),
        (([X], [S.to("meta")], SPEC), r"fake_quantize_list\[0\]: scale must be on the device of x \(cpu\), got meta"),
        (([X], [S], [SPEC.replace(estimator="ewgs")]), "delta must be given with estimator='ewgs'"),
    ],
)
def test_bad_input(args, message):
    with pytest.raises((ValueError, TypeError), match=message) as error:
        ff.fake_quantize_list(*args)
    assert "\n" not in str(error.value)


def test_raw_ops_keep_memory_safe(compiled):
    _, xs, scales, zeros, grids = raw_arguments(1, [((6, 4), 1, 0), ((5,), -1, 0)], [torch.float32])
    for wrong, message in (
        ((xs, scales[:1], zeros, *grids), "all lists must be as long as xs, 2"),
        ((xs, [scales[0], torch.ones(3)], zeros, *grids), "scale must have 1 values, got 3"),
        ((xs, scales, zeros, *grids[:2], [2, -1], *grids[3:]), "axis must be less than 2, got 2"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.fake_quantize_list(*wrong)


def test_reference_is_the_oracle(compiled):
    gys, xs, scales, zeros, grids = raw_arguments(2)
    ys = ops.fake_quantize_list(xs, scales, zeros, *grids)
    assert_same_lists(ys, reference.fake_quantize_list(xs, scales, zeros, *grids))
    needs, factors = [1] * len(xs), [1.0] * len(xs)
    gxs, gss, _ = ops.fake_quantize_list_bwd(gys, xs, scales, zeros, *grids, factors, needs)
    rxs, rss, _ = reference.fake_quantize_list_bwd(gys, xs, scales, zeros, *grids, factors, needs)
    assert_same_lists(gxs, rxs)
    assert [g.shape for g in gss] == [g.shape for g in rss]

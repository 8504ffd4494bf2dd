# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel in Triton's interpreter, against the reference. Not collected by itself: TRITON_INTERPRET must be
set before triton is imported, so test_triton_interpreter.py runs this module in a process of its own.

Maps and maxima must have the reference's bits. Sums may differ by their order alone: the terms have the same bits, a
program adds at most a few hundred of them one after another and the rest in a tree, so 64 units of rounding of the sum
of magnitudes are allowed, where any wrong or lost term shows.
"""

import itertools

import pytest
import torch
import triton
import triton.language as tl

from fastflat import _ops
from fastflat._spec import RULES, TINY, QuantSpec
from fastflat.backends import reference
from fastflat.backends.reference import layout
from fastflat.backends.reference.fake_quantize import _code, _prepare
from fastflat.triton_kernels import _common, _launch, _rules, _sums, fake_quantize, identity

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
HARD = [NAN, INF, -INF, -0.0, 0.0, 1e-45, -1e-45, 2.0**-126, 0.5, 1.5, 2.5, -0.5, -3.5, 7.5, -8.5, 3e38, -3e38, 1e20]
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
#: Layouts of scales: (shape of x, axis, group).
PLACES = {
    "tensor": ((3, 341), -1, 0),
    "scalar": ((), -1, 0),
    "rows": ((5, 37), 0, 0),
    "long rows": ((3, 1100), 0, 0),
    "filters": ((6, 4, 3, 3), 0, 0),
    "columns": ((37, 5), 1, 0),
    "middle": ((2, 5, 7, 7), 1, 0),
    "wide middle": ((2, 3, 16, 8), 1, 0),
    "one channel": ((9, 1, 5), 1, 0),
    "group": ((5, 96), -1, 32),
    "odd group": ((4, 21), -1, 7),
}
#: The rules that the fake_quantize family knows.
OWN = [name for name, bit in RULES.items() if bit < 256]
GRIDS = [QuantSpec(bits=b, signed=s) for b, s in ((1, True), (2, True), (4, False), (8, True), (16, False))]


@pytest.fixture(autouse=True)
def _poisoned_outputs():
    """New tensors hold NaN until a kernel writes them."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    """The same bits, type, shape and strides; NaN equals NaN."""
    assert (got.dtype, got.shape, got.stride()) == (want.dtype, want.shape, want.stride())
    bits = BITS[want.element_size()]
    differ = (got.view(bits) != want.view(bits)) & ~(got.isnan() & want.isnan())
    assert not differ.any(), f"got {got[differ][:4].tolist()}, want {want[differ][:4].tolist()}"


def data(shape, dtype: torch.dtype, scale: torch.Tensor | None = None, axis: int = -1) -> torch.Tensor:
    """Values around a 4-bit grid, with everything awkward first: specials, and ties of the grid."""
    x = torch.randn(shape, dtype=torch.float64) * 4
    flat = x.view(-1)
    n = min(len(HARD), flat.numel())
    flat[:n] = torch.tensor(HARD, dtype=torch.float64)[:n]
    flat[n::5] = flat[n::5].round() + 0.5
    return x.to(dtype)


def parameters(x: torch.Tensor, axis: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales (powers of two, so that ties are met, and others) and zero-points (fractions, off the grid too)."""
    shape = _ops.scale_shape(x.shape, axis, group)
    scale = torch.rand(shape, dtype=torch.float64) + 0.1
    scale.view(-1)[::2] = 0.5
    return tuple(t.to(_ops.compute_dtype(x.dtype)) for t in (scale, torch.randn(shape, dtype=torch.float64) * 6))


def close(got: torch.Tensor, want: torch.Tensor, magnitude: torch.Tensor) -> None:
    """Equal but for the order of a sum whose terms' magnitudes add up to `magnitude`."""
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    bound = 64 * torch.finfo(got.dtype).eps / 2 * magnitude
    ok = (got == want) | ((got - want).abs() <= bound) | (got.isnan() & want.isnan())
    assert ok.all(), f"got {got[~ok][:4].tolist()}, want {want[~ok][:4].tolist()}, bound {bound[~ok][:4].tolist()}"


def check_backward(gy, x, scale, zero, grid, axis, group, factor=0.37):
    args = (gy, x, scale, zero, *grid[:2], axis, group, *grid[2:], factor)
    gx, gs, gz = fake_quantize.fake_quantize_bwd(*args, True)
    want_gx, want_gs, want_gz = reference.fake_quantize_bwd(*args, True)
    same(gx, want_gx)
    # |gy| on all elements, each with its own share, bounds the terms: sum the magnitudes through the reference itself.
    blocked, g = _prepare(x, scale, zero, *grid[:2], axis, group, *grid[2:])
    u, d, m = _code(blocked, g, *grid[:2], grid[3])
    gy_ = layout.blocked(gy, group).to(blocked.dtype)
    share = (gy_ * torch.where(m, d - u, d)).abs()
    total = layout.sum_to_scale(share, x, axis, group, scale.dtype) * factor
    close(gs, want_gs, total)
    if zero is None:
        assert gz.shape == (0,)
    else:
        outside = layout.sum_to_scale(gy_.abs(), x, axis, group, scale.dtype) * factor
        close(gz, want_gz, outside * scale)
    same(fake_quantize.fake_quantize_bwd(*args, False)[0], want_gx)


def grid_of(spec: QuantSpec, rules: int) -> tuple:
    return spec.qmin, spec.qmax, spec.eps, rules


# The arithmetic -----------------------------------------------------------------------------------------------------


@triton.jit
def _widen_kernel(y_ptr, x_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, _common.widen(tl.load(x_ptr + at)))


@triton.jit
def _narrow_kernel(y_ptr, x_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    _common.store(y_ptr, at, tl.load(x_ptr + at), at < 0, False)


@triton.jit
def _round_kernel(y_ptr, x_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, _common.round_even(tl.load(x_ptr + at)))


def every_code(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_16_bit_codes_are_read_exactly(dtype):
    x = every_code(dtype)
    y = torch.empty(x.shape, dtype=torch.float32)
    _widen_kernel[(4,)](y, _launch.raw(x), 2**14)
    same(y, x.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_ties_and_their_neighbours_are_written_as_torch_writes_them(dtype):
    codes = every_code(dtype).float()
    codes = codes[codes.isfinite()].sort().values
    between = ((codes[1:].double() + codes[:-1].double()) / 2).float()
    outside = torch.tensor([INF, -INF, NAN, 65519.9, 65520.0, 3.3961775e38, 3.4e38, 1e-45, 2.0**-25, 2.0**-24 * 1.5])
    # NaNs whose payload would be rounded away or carry into the sign
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    x = torch.cat([codes, between, outside])
    x = torch.cat([x, *(torch.nextafter(x, torch.tensor(to)) for to in (INF, -INF))])
    x = torch.cat([x, nans])
    x = torch.nn.functional.pad(x, (0, -x.numel() % 2**12))
    y = torch.empty(x.shape, dtype=dtype)
    _narrow_kernel[(x.numel() // 2**12,)](_launch.raw(y), x, 2**12)
    same(y, x.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_to_even(dtype):
    limit = 2.0 ** (23 if dtype == torch.float32 else 52)
    ties = torch.arange(-2048, 2048, dtype=dtype) + 0.5
    bits = torch.randint(-(2**31), 2**31, (2**13,)).to(torch.int32).view(torch.float32).to(dtype)
    edge = torch.tensor([limit, limit - 0.5, limit + 1, limit * 2, 0.0, -0.0, INF, -INF, NAN, 5e-324], dtype=dtype)
    x = torch.cat([ties, bits, edge, -edge])
    x = torch.nn.functional.pad(torch.cat([x, *(torch.nextafter(x, x * 0 + to) for to in (INF, -INF))]), (0, 4))
    x = torch.nn.functional.pad(x, (0, -x.numel() % 2**12))
    y = torch.empty_like(x)
    _round_kernel[(x.numel() // 2**12,)](y, x, 2**12)
    same(y, torch.round(x))


def test_rules_have_the_same_bits_everywhere():
    assert {name: getattr(_rules, name.upper()).value for name in RULES} == RULES


# Maps ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8, torch.int64])
@pytest.mark.parametrize("n", [0, 1, 1023, 1024, 1025])
def test_identity(n, dtype):
    x = torch.randint(-100, 100, (n,)).to(dtype)
    same(identity.identity(x), x)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_ops_at_every_place(place, dtype):
    shape, axis, group = PLACES[place]
    x = data(shape, dtype)
    scale, zero = parameters(x, axis, group)
    gy, ts, tz = torch.randn(shape).to(dtype), torch.randn_like(scale), torch.randn_like(scale)
    for zp, rules in ((None, 0), (None, 255), (zero, 0), (zero, RULES["zero_inside"] | RULES["zero_float"])):
        q = (*((-8, 7) if zp is None else (0, 15)), axis, group, TINY, rules)
        args = (x, scale, zp, *q)
        same(fake_quantize.fake_quantize(*args), reference.fake_quantize(*args))
        tangents = (gy, ts, tz if zp is not None else None)
        same(
            fake_quantize.fake_quantize_jvp(*tangents, *args, 0.37), reference.fake_quantize_jvp(*tangents, *args, 0.37)
        )
        check_backward(gy, x, scale, zp, (q[0], q[1], TINY, rules), axis, group)
    for got, want in zip(
        fake_quantize.fake_quantize_absmax(x, -8, 7, axis, group, TINY, 0),
        reference.fake_quantize_absmax(x, -8, 7, axis, group, TINY, 0),
        strict=True,
    ):
        same(got, want)


@pytest.mark.parametrize("name", ["none", *OWN, *map("+".join, itertools.combinations(OWN, 2))])
def test_every_rule_and_pair_of_rules(name):
    rules = sum(RULES[part] for part in name.split("+") if part in RULES)
    x = data((3, 67), torch.float32)
    scale, zero = parameters(x, 0, 0)
    for zp in (None, zero):
        args = (x, scale, zp, -8, 7, 0, 0, TINY, rules)
        same(fake_quantize.fake_quantize(*args), reference.fake_quantize(*args))
        tangents = (torch.randn_like(x), torch.randn_like(scale), torch.randn_like(scale))
        same(fake_quantize.fake_quantize_jvp(*tangents, *args, 0.5), reference.fake_quantize_jvp(*tangents, *args, 0.5))
        check_backward(torch.randn_like(x), x, scale, zp, (-8, 7, TINY, rules), 0, 0)


@pytest.mark.parametrize(
    "spec", [*GRIDS, QuantSpec.torch(4), QuantSpec.torch(8, axis=0)], ids=lambda s: f"{s.bits}{s.axis}"
)
def test_grids_and_named_forms(spec):
    x = data((2, 300), torch.float32) * 40
    scale, zero = parameters(x, 0, 0)
    for zp in (None, zero):
        args = (x, scale, zp, spec.qmin, spec.qmax, 0, 0, spec.eps, spec.rules)
        same(fake_quantize.fake_quantize(*args), reference.fake_quantize(*args))


@pytest.mark.parametrize("scale", [0.0, -1.0, NAN, INF, 1e-45, 2.0**-126, 3e38])
@pytest.mark.parametrize("rules", [0, RULES["reciprocal"]])
def test_scales_at_the_edge(scale, rules):
    x = data((40,), torch.float32)
    args = (x, torch.tensor(scale), None, -8, 7, -1, 0, TINY, rules)
    same(fake_quantize.fake_quantize(*args), reference.fake_quantize(*args))
    same(fake_quantize.fake_quantize_bwd(x, *args, 1.0, False)[0], reference.fake_quantize_bwd(x, *args, 1.0, False)[0])


def test_limits_are_full_doubles_in_fp64():
    x = data((50,), torch.float64)
    eps, factor = 0.1 + 2.0**-50, 1 / 3
    args = (x, torch.tensor(0.05, dtype=torch.float64), None, -8, 7, -1, 0, eps, 0)
    same(fake_quantize.fake_quantize(*args), reference.fake_quantize(*args))
    tangents = (None, torch.tensor(0.7, dtype=torch.float64), None)
    same(
        fake_quantize.fake_quantize_jvp(*tangents, *args, factor), reference.fake_quantize_jvp(*tangents, *args, factor)
    )


@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.parametrize("target", DTYPES, ids=str)
def test_output_types(source, target):
    x = data((2, 70), source)
    scale, _ = parameters(x, 0, 0)
    args = (x, scale, None, -128, 127, 0, 0, TINY, 0)
    same(fake_quantize.fake_quantize(*args, target), reference.fake_quantize(*args, target))
    for tx in (x, x.to(target)):
        jvp = (tx, None, None, *args, 1.0, target)
        same(fake_quantize.fake_quantize_jvp(*jvp), reference.fake_quantize_jvp(*jvp))
    absmax = (x[:, 18:], -128, 127, 0, 0, TINY, 0, target)
    for got, want in zip(
        fake_quantize.fake_quantize_absmax(*absmax), reference.fake_quantize_absmax(*absmax), strict=True
    ):
        same(got, want)
    check_backward(torch.randn(2, 70).to(target), x, scale, None, (-128, 127, TINY, 0), 0, 0)


@pytest.mark.parametrize("present", list(itertools.product([False, True], repeat=3)), ids=str)
def test_absent_tangents_count_as_zero(present):
    x = data((3, 40), torch.float32)
    scale, zero = parameters(x, 0, 0)
    tangents = [
        t if on else None for t, on in zip((torch.randn_like(x), scale * 0.3, zero * 0.3), present, strict=True)
    ]
    args = (*tangents, x, scale, zero, 0, 15, 0, 0, TINY, 0, -0.25)
    same(fake_quantize.fake_quantize_jvp(*args), reference.fake_quantize_jvp(*args))


# Layouts ------------------------------------------------------------------------------------------------------------


def channels_last(x):
    return x.to(memory_format=torch.channels_last)


LAYOUTS = {
    "channels last": channels_last,
    "transposed": lambda x: x.transpose(1, 3),
    "every other": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "narrowed": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "expanded": lambda x: x[:, :, :1].expand(-1, -1, 3, -1),
    "offset": lambda x: torch.cat([x.flatten(), x.flatten()[:1]])[1:].view(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axis", [-1, 0, 1, 3])
def test_layouts(layout, axis):
    x = LAYOUTS[layout](data((2, 6, 5, 4), torch.float32))
    scale, _ = parameters(x, axis, 0)
    args = (x, scale, None, -8, 7, axis, 0, TINY, 0)
    before = x.clone()
    same(fake_quantize.fake_quantize(*args), reference.fake_quantize(*args))
    for gy in (
        torch.randn(x.shape),
        channels_last(torch.randn(x.shape)),
        torch.randn((*x.shape[:-1], 1)).expand(x.shape),
    ):
        check_backward(gy, x, scale, None, (-8, 7, TINY, 0), axis, 0)
        jvp = (gy, None, None, *args, 1.0)
        same(fake_quantize.fake_quantize_jvp(*jvp), reference.fake_quantize_jvp(*jvp))
    absmax = (x, -8, 7, axis, 0, TINY, 0)
    for got, want in zip(
        fake_quantize.fake_quantize_absmax(*absmax), reference.fake_quantize_absmax(*absmax), strict=True
    ):
        same(got, want)
    same(identity.identity(x), torch.empty_like(x).copy_(x))
    same(x, before) if x.stride() == before.stride() else None


def test_strided_input_with_groups_gives_contiguous_output():
    x = data((32, 6), torch.float32).t()
    scale, _ = parameters(x, -1, 8)
    args = (x, scale, None, -8, 7, -1, 8, TINY, 0)
    same(fake_quantize.fake_quantize(*args), reference.fake_quantize(*args))
    check_backward(torch.randn(32, 6).t(), x, scale, None, (-8, 7, TINY, 0), -1, 8)


@pytest.mark.parametrize(("shape", "axis", "group"), [((0,), -1, 0), ((0, 3), 1, 0), ((3, 0), 0, 0), ((2, 0), -1, 4)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_empty(shape, axis, group, dtype):
    x = torch.empty(shape, dtype=dtype)
    scale = torch.ones(_ops.scale_shape(x.shape, axis, group), dtype=_ops.compute_dtype(dtype))
    args = (x, scale, scale, -8, 7, axis, group, TINY, 0)
    same(fake_quantize.fake_quantize(*args), reference.fake_quantize(*args))
    same(fake_quantize.fake_quantize_jvp(x, None, None, *args, 1.0), reference.fake_quantize(*args))
    got, want = fake_quantize.fake_quantize_bwd(x, *args, 1.0, True), reference.fake_quantize_bwd(x, *args, 1.0, True)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    absmax = (x, -8, 7, axis, group, TINY, 0)
    for a, b in zip(fake_quantize.fake_quantize_absmax(*absmax), reference.fake_quantize_absmax(*absmax), strict=True):
        same(a, b)


# Grids --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wide", [False, True], ids=["32-bit offsets", "64-bit offsets"])
@pytest.mark.parametrize("programs", [1, 3, 4096])
@pytest.mark.parametrize("place", ["tensor", "long rows", "columns", "middle", "wide middle", "odd group"])
def test_any_division_of_the_work(place, programs, wide, monkeypatch):
    monkeypatch.setattr(_launch, "PROGRAMS", programs)
    monkeypatch.setattr(_launch, "ROWS", 8)
    monkeypatch.setattr(_launch, "FUSED", 16)
    monkeypatch.setattr(_launch, "_NARROW_LIMIT", 0 if wide else 2**31)
    shape, axis, group = PLACES[place]
    for dtype in (torch.bfloat16,) if wide else (torch.float32,):
        x = data((5 * shape[0], *shape[1:]), dtype)
        scale, zero = parameters(x, axis, group)
        args = (x, scale, zero, -8, 7, axis, group, TINY, 0)
        same(fake_quantize.fake_quantize(*args), reference.fake_quantize(*args))
        check_backward(torch.randn(x.shape).to(dtype), x, scale, zero, (-8, 7, TINY, 0), axis, group)
        absmax = (x, -8, 7, axis, group, TINY, 0)
        for a, b in zip(
            fake_quantize.fake_quantize_absmax(*absmax), reference.fake_quantize_absmax(*absmax), strict=True
        ):
            same(a, b)


def test_many_partial_sums_for_one_scale(monkeypatch):
    monkeypatch.setattr(_launch, "BLOCK", 16)
    x = torch.randn(601)
    check_backward(torch.randn(601), x, torch.tensor(0.3), torch.tensor(1.0), (-8, 7, TINY, 0), -1, 0)
    assert _launch.Plan.of(_launch.Scales.of(x, -1, 0), 4, 16).chunks > _sums.finish_tile(1)[1]


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("place", ["tensor", "columns", "group", "wide middle"])
def test_absmax_of_nan_and_infinity(place, value, monkeypatch):
    shape, axis, group = PLACES[place]
    x = torch.randn(shape)
    x.view(-1)[x.numel() // 2] = value
    absmax = (x, -8, 7, axis, group, TINY, 0)
    for fused in (4096, 0):
        monkeypatch.setattr(_launch, "FUSED", fused)
        for got, want in zip(
            fake_quantize.fake_quantize_absmax(*absmax), reference.fake_quantize_absmax(*absmax), strict=True
        ):
            same(got, want)

# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the general_quantize family in Triton's interpreter, against the reference. Not collected by
itself: test_triton_interpreter.py runs it in a process of its own.

Maps must have the reference's bits, whatever the data. Sums are taken of finite data and may differ by their order.
"""

import pytest
import torch

from fastflat import _ops
from fastflat._spec import RULES, TINY
from fastflat.backends import reference
from fastflat.triton_kernels import _launch, fake_quantize, general_quantize

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
HARD = [NAN, INF, -INF, -0.0, 0.0, 1e-45, -1e-45, 2.0**-126, 0.25, 0.5, 1.5, 2.5, -0.5, -3.5, 3e38, -3e38, 1e20, 1e-3]
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
#: (shape of x, axis, group): every kernel, with rows at multiples of 8 and others.
PLACES = [
    ((2, 531), -1, 0),
    ((2, 6, 5, 5), 1, 0),
    ((6, 96), -1, 32),
    ((3, 520), 0, 0),
    ((40, 5), 1, 0),
    ((3, 33), -1, 11),
    ((2, 3, 16, 16), 1, 0),
    ((12, 136), 1, 0),
    ((3, 1100), 0, 0),
]
#: Rules that :class:`fastflat.QuantSpec` makes, each convention and each way through the kernels at least once.
SETS = [
    "",
    "reciprocal mask_after nan_qmin inf_qmin positive_zero",
    "zero_inside zero_float",
    "round_away",
    "round_away mask_after zero_inside",
    "round_stochastic",
    "pact",
    "noise_uniform",
    "noise_uniform mask_none",
    "noise_normal",
    "noise_temper",
    "noise_temper reciprocal mask_after nan_qmin positive_zero",
    "noise_bypass",
    "binary",
    "binary round_stochastic",
    "e4m3",
    "e4m3 mask_after",
    "e4m3 noise_bypass",
    "e5m2",
    "e3m2",
    "e2m3",
    "e2m1",
    "e2m1 round_stochastic",
    "e2m1 noise_uniform",
    "e2m1 noise_temper",
    "compute_input reciprocal",
    "compute_input zero_inside mask_after",
    "compute_input through_chain",
    "through_chain",
    "through_chain reciprocal mask_after positive_zero",
    "inverse mask_absmax",
    "inverse mask_none",
    "nan_passes mask_after zero_inside zero_float",
    "rectified mask_after through_chain zero_inside zero_float",
]
#: Formats and conventions without a zero-point.
SYMMETRIC = {"binary", "inverse", "e4m3", "e5m2", "e3m2", "e2m3", "e2m1"}
DRAWING = {"round_stochastic", "noise_uniform", "noise_normal", "noise_temper", "noise_bypass"}
STATE = torch.tensor([-123456789123456789, 987654321])


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    """The same bits, type, shape and strides; NaN equals NaN."""
    assert (got.dtype, got.shape, got.stride()) == (want.dtype, want.shape, want.stride())
    bits = BITS[want.element_size()]
    differ = (got.view(bits) != want.view(bits)) & ~(got.isnan() & want.isnan())
    assert not differ.any(), f"got {got[differ][:4].tolist()}, want {want[differ][:4].tolist()}"


def close(got: torch.Tensor, want: torch.Tensor, terms: int) -> None:
    """Equal but for the order of a sum of `terms` products of magnitudes up to 100."""
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=100 * torch.finfo(got.dtype).eps * terms, equal_nan=True)


def data(shape, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Values around a 4-bit grid, with ties of the grid and everything awkward strewn in."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, dtype=torch.float64, generator=g) * 3
    flat = x.view(-1)
    flat[::5] = flat[::5].round() / 2
    at = torch.randperm(flat.numel(), generator=g)[: max(1, flat.numel() // 8)]
    flat[at] = torch.tensor(HARD, dtype=torch.float64)[torch.randint(len(HARD), at.shape, generator=g)]
    return x.to(dtype)


def finite(x: torch.Tensor) -> torch.Tensor:
    return x.nan_to_num(0, 0, 0).clamp(-9, 9)


def bits_of(names: str) -> int:
    return sum(RULES[name] for name in names.split())


def check(names: str, place: tuple, dtype: torch.dtype, zero: bool, scalars: bool) -> None:
    """All ops on one place."""
    (shape, axis, group), rules = place, bits_of(names)
    compute = _ops.compute_dtype(dtype)
    g = torch.Generator().manual_seed(3)
    scale = torch.rand(_ops.scale_shape(torch.Size(shape), axis, group), generator=g, dtype=compute) * 0.8 + 0.1
    if scale.numel() > 2:
        scale.view(-1)[0], scale.view(-1)[1] = 0.5, 0.0 if "inverse" in names else -1.0
    if "compute_input" in names:
        scale = scale.to(dtype).to(compute)
    z = torch.randn(scale.shape, generator=g, dtype=compute) * 4 if zero else None
    x, gy = data(shape, dtype, 1), data(shape, dtype, 2)
    state = STATE if DRAWING & set(names.split()) else None
    nu, a, delta = (torch.tensor(v, dtype=compute) if scalars else None for v in (0.7, 0.3, 0.4))
    drawn, grid = (z, state, nu, a), (-8, 7, axis, group, TINY, rules)
    args = (x, scale, *drawn, *grid)
    same(general_quantize.general_quantize(*args), reference.general_quantize(*args))
    tangents = (gy, scale * 0.3, z)
    same(
        general_quantize.general_quantize_jvp(*tangents, *args, 0.3),
        reference.general_quantize_jvp(*tangents, *args, 0.3),
    )
    gradient = (gy, x, scale, *drawn, delta, *grid, 0.3)
    want = reference.general_quantize_bwd(*gradient, True, scalars)[0]
    same(general_quantize.general_quantize_bwd(*gradient, False, False)[0], want)
    same(general_quantize.general_quantize_bwd(*gradient, True, scalars)[0], want)
    gradient = (finite(gy), finite(x), *gradient[2:])
    got = general_quantize.general_quantize_bwd(*gradient, True, scalars)
    want = reference.general_quantize_bwd(*gradient, True, scalars)
    same(got[0], want[0])
    for a_sum, wanted in zip(got[1:], want[1:], strict=True):
        close(a_sum, wanted, x.numel())


@pytest.mark.parametrize("names", SETS, ids=lambda names: names.replace(" ", "+") or "none")
def test_every_set_of_rules(names):
    """Two places and types of all, another pair for each set: neighbours in the list cover what one set leaves out."""
    number = SETS.index(names)
    dtypes = [torch.bfloat16, torch.float16] if "compute_input" in names else DTYPES
    symmetric = bool(SYMMETRIC & set(names.split()))
    for turn in range(2):
        place = PLACES[(number + 4 * turn) % len(PLACES)]
        check(names, place, dtypes[(number + turn) % len(dtypes)], not symmetric and turn == 0, turn == 0)


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("names", ["round_stochastic", "noise_normal"])
def test_draws_belong_to_elements_at_every_place(names, place):
    check(names, place, torch.float32, True, True)


@pytest.mark.parametrize("names", ["", "reciprocal mask_after nan_qmin inf_qmin positive_zero", "zero_inside"])
def test_both_families_agree_where_both_apply(names):
    x, gy = data((4, 67), torch.float32, 1), data((4, 67), torch.float32, 2)
    scale, zero = torch.rand(4) + 0.1, torch.randn(4) * 5
    grid = (-8, 7, 0, 0, TINY, bits_of(names))
    none = (None,) * 3
    same(
        general_quantize.general_quantize(x, scale, zero, *none, *grid),
        fake_quantize.fake_quantize(x, scale, zero, *grid),
    )
    got = general_quantize.general_quantize_bwd(gy, x, scale, zero, *none, None, *grid, 0.3, True, False)
    want = fake_quantize.fake_quantize_bwd(gy, x, scale, zero, *grid, 0.3, True)
    for a, b in zip(got, want, strict=False):
        same(a, b)


@pytest.mark.parametrize("scale", [0.0, -1.0, NAN, INF, 1e-45, 2.0**-126, 3e38])
@pytest.mark.parametrize("names", ["inverse mask_absmax", "round_away reciprocal", "e2m1", "through_chain"])
def test_scales_at_the_edge(names, scale):
    x, gy = data((40,), torch.float32, 1), data((40,), torch.float32, 2)
    args = (x, torch.tensor(scale), None, None, None, None, -8, 7, -1, 0, TINY, bits_of(names))
    same(general_quantize.general_quantize(*args), reference.general_quantize(*args))
    args = (gy, *args[:6], None, *args[6:], 1.0, False, False)
    same(general_quantize.general_quantize_bwd(*args)[0], reference.general_quantize_bwd(*args)[0])


@pytest.mark.parametrize("shape", [(2, 6, 5, 4), (0, 3)], ids=str)
@pytest.mark.parametrize("names", ["noise_uniform", "through_chain"])
def test_layouts_and_types_of_results(names, shape):
    """Draws follow the storage; a cotangent in another order or type is taken over."""
    x = data(shape, torch.bfloat16, 1)
    x = x.to(memory_format=torch.channels_last) if x.dim() == 4 else x
    scale = torch.rand(shape[1]) + 0.2
    grid = (-8, 7, 1, 0, TINY, bits_of(names))
    drawn = (None, STATE, None, None)
    gy = data(shape, torch.float32, 2)
    for t in (x, x.transpose(0, -1).contiguous().transpose(0, -1), torch.cat([x, x], 1)[:, : shape[1]]):
        args = (t, scale, *drawn, *grid, torch.float32)
        same(general_quantize.general_quantize(*args), reference.general_quantize(*args))
        args = (gy, t, scale, *drawn, None, *grid, 0.5, True, False)
        got, want = general_quantize.general_quantize_bwd(*args), reference.general_quantize_bwd(*args)
        same(got[0], want[0])
        assert [s.shape for s in got] == [s.shape for s in want]


def test_only_the_gradient_of_delta():
    x, gy = finite(data((5, 33), torch.float32, 1)), finite(data((5, 33), torch.float32, 2))
    scale, delta = torch.rand(5) + 0.1, torch.tensor(0.4)
    args = (gy, x, scale, None, None, None, None, delta, -8, 7, 0, 0, TINY, 0, 0.3, False, True)
    got, want = general_quantize.general_quantize_bwd(*args), reference.general_quantize_bwd(*args)
    same(got[0], want[0])
    assert got[1].numel() == got[2].numel() == 0
    close(got[3], want[3], x.numel())


@pytest.mark.parametrize(("wide", "programs"), [(False, 3), (True, 1)], ids=["32-bit offsets", "64-bit offsets"])
def test_any_division_of_the_work(wide, programs, monkeypatch):
    for name, value in (("PROGRAMS", programs), ("ROWS", 8), ("BLOCK", 64), ("_NARROW_LIMIT", 0 if wide else 2**31)):
        monkeypatch.setattr(_launch, name, value)
    for place in (((401,), -1, 0), ((3, 136), 0, 0), ((24, 24), 1, 0), ((30, 5), 1, 0), ((6, 32), -1, 8)):
        check("noise_temper", place, torch.float32, True, True)

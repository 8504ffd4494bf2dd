# SPDX-License-Identifier: Apache-2.0
"""The bit-plane kernels in Triton's interpreter, against the reference. test_triton_interpreter.py runs this module.

Maps must have the reference's bits; sums may differ by their order alone.
"""

import pytest
import torch

from fastflat._ops import compute_dtype
from fastflat.backends import reference
from fastflat.triton_kernels import bitplane

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

INF, NAN = float("inf"), float("nan")
HARD_VALUES = [NAN, INF, -INF, -0.0, 0.0, 1e-45, -1e-45, 2.0**-126, 3e38, -3e38, 40.0, -40.0, 88.0, -90.0]
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
PAIRS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float64, torch.float64),
    (torch.float32, torch.bfloat16),
]
#: Off the vector grid, more than a block and on it, one element, none.
SHAPES = [(5, 7), (1048,), (), (0, 3)]
#: Every type; every kind of hard bits and masks in fp32.
CASES = [(pair, (False, False)) for pair in PAIRS]
CASES += [(PAIRS[0], hard) for hard in ((True, False), (False, True), (True, True))]


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


def arguments(planes, shape, dtype, special=True, beta=3.0):
    compute = compute_dtype(dtype)
    p, q = (torch.randn(planes, *shape, dtype=torch.float64) for _ in range(2))
    if special:
        for t in (p, q):
            count = min(len(HARD_VALUES), t.numel())
            t.view(-1)[torch.randperm(t.numel())[:count]] = torch.tensor(HARD_VALUES[:count], dtype=torch.float64)
    m = torch.randn(planes, dtype=compute)
    return p.to(dtype), q.to(dtype), m, torch.tensor(0.7, dtype=compute), torch.tensor(beta, dtype=compute)


@pytest.mark.parametrize(("pair", "hard"), CASES)
def test_value_and_tangent_have_the_bits_of_the_reference(pair, hard):
    for i, shape in enumerate(SHAPES):
        planes = (3, 2, 16, 5)[i]
        args = arguments(planes, shape, pair[0])
        same(bitplane.bitplane(*args, *hard, pair[1]), reference.bitplane(*args, *hard, pair[1]))
        tangents = [torch.randn(t.shape, dtype=torch.float64).to(t.dtype) for t in args[:4]]
        for keep in (15, (5, 10, 0, 4)[i]):
            some = [t if keep >> k & 1 else None for k, t in enumerate(tangents)]
            got = bitplane.bitplane_jvp(*some, *args, *hard, pair[1])
            same(got, reference.bitplane_jvp(*some, *args, *hard, pair[1]))


@pytest.mark.parametrize(("pair", "hard"), CASES)
def test_gradients(pair, hard):
    for i, shape in enumerate(SHAPES):
        planes = (3, 2, 16, 5)[i]
        args = arguments(planes, shape, pair[0])
        gw = torch.randn(shape, dtype=torch.float64).to(pair[1])
        got, want = bitplane.bitplane_bwd(gw, *args, *hard), reference.bitplane_bwd(gw, *args, *hard)
        same(got[0], want[0])
        same(got[1], want[1])
        check_sums(got, want, args, gw)


def check_sums(got, want, args, gw):
    planes, beta = args[0].shape[0], args[4].item()
    total = gw.double().abs().sum()
    power = 2.0 ** torch.arange(planes - 1, -1, -1, dtype=torch.float64) / (2**planes - 1)
    for g, w, magnitude in ((got[2], want[2], power * beta * total), (got[3], want[3], total)):
        assert (g.dtype, g.shape) == (w.dtype, w.shape)
        bound = 32 * torch.finfo(w.dtype).eps * magnitude
        assert (((g - w).abs().double() <= bound) | (g.isnan() & w.isnan())).all(), (g, w)


def test_sums_over_several_steps_of_a_program(monkeypatch):
    monkeypatch.setattr(bitplane, "_PIECES", 2)
    args = arguments(3, (5003,), torch.float32, special=False)
    gw = torch.randn(5003)
    got, want = bitplane.bitplane_bwd(gw, *args, False, False), reference.bitplane_bwd(gw, *args, False, False)
    same(got[0], want[0])
    check_sums(got, want, args, gw)


def test_layouts_cost_a_copy_and_nothing_else():
    p, q, m, scale, beta = arguments(3, (4, 6), torch.float32)
    swapped = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (p, q)]
    got = bitplane.bitplane(*swapped, m, scale, beta, False, False)
    same(got, reference.bitplane(p, q, m, scale, beta, False, False))

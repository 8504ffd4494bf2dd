# SPDX-License-Identifier: Apache-2.0
"""The bit-plane kernels, executed from their .cu source, against the reference: maps bit for bit, sums closely."""

import itertools

import pytest
import torch

from fastflat._ops import compute_dtype
from fastflat.backends import reference

from .cases import PAIRS, same_bits

SIZES = [0, 1, 3, 8, 17, 1023, 1024, 2056, 5001]
HARD = [(False, False), (True, False), (False, True), (True, True)]
CASES = [
    pytest.param(n, pair, HARD[i % 4 if i % 3 else 0], 1 + 5 * i % 16, id=f"{n}-{str(pair[0])[6:]}-{str(pair[1])[6:]}")
    for i, (n, pair) in enumerate(itertools.product(SIZES, PAIRS))
]
every_case = pytest.mark.parametrize(("n", "pair", "hard", "planes"), CASES)


def arguments(n, dtype, planes, special=True):
    g = torch.Generator().manual_seed(n + planes)
    compute = compute_dtype(dtype)
    p, q = (torch.randn(planes, n, generator=g, dtype=torch.float64) * 3 for _ in range(2))
    if special and n > 8:
        values = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, 3e38, -88.0])
        p[:, :8], q[0, -8:] = values.double(), values.double()
    m = torch.randn(planes, generator=g, dtype=compute)
    return p.to(dtype), q.to(dtype), m, torch.tensor(0.7, dtype=compute), torch.tensor(1.9, dtype=compute)


@every_case
def test_value_and_tangent(emulated, n, pair, hard, planes):
    args = arguments(n, pair[0], planes)
    assert same_bits(emulated.bitplane(*args, *hard, pair[1]), reference.bitplane(*args, *hard, pair[1]))
    tangents = [torch.randn(t.shape, dtype=torch.float64).to(t.dtype) for t in args[:4]]
    for keep in (15, 1 + n % 14):
        some = [t if keep >> i & 1 else None for i, t in enumerate(tangents)]
        got = emulated.bitplane_jvp(*some, *args, *hard, pair[1])
        assert same_bits(got, reference.bitplane_jvp(*some, *args, *hard, pair[1]))


@every_case
def test_backward(emulated, n, pair, hard, planes):
    args = arguments(n, pair[0], planes, special=False)
    gw = torch.randn(n, dtype=torch.float64).to(pair[1])
    results = []
    for order in (0, 1, 2):
        emulated.module.set_order(order)
        results.append(emulated.bitplane_bwd(gw, *args, *hard))
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other))
    got, want = results[0], reference.bitplane_bwd(gw, *args, *hard)
    assert same_bits(got[0], want[0])
    assert same_bits(got[1], want[1])
    total = gw.double().abs().sum()
    power = 2.0 ** torch.arange(planes - 1, -1, -1, dtype=torch.float64) / (2**planes - 1)
    for g, w, magnitude in ((got[2], want[2], 1.9 * power * total), (got[3], want[3], total)):
        assert (g.dtype, g.shape) == (w.dtype, w.shape)
        assert ((g - w).abs().double() <= 16 * torch.finfo(w.dtype).eps * magnitude).all()


def test_large_planes_take_several_tiles_a_block(emulated):
    # 4096 blocks of 256 threads with 2 doubles each are one tile a block: one element more makes two.
    n = 4096 * 512 + 1
    args = arguments(n, torch.float64, 1, special=False)
    gw = torch.randn(n, dtype=torch.float64)
    emulated.module.take_counts()
    got, want = emulated.bitplane_bwd(gw, *args, False, False), reference.bitplane_bwd(gw, *args, False, False)
    assert emulated.module.take_counts()["blocks"] == 2049 + 1
    assert same_bits(got[0], want[0])
    assert same_bits(got[1], want[1])
    for g, w in zip(got[2:], want[2:]):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [4096, 4099])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_stream_is_touched_once(emulated, dtype, n):
    planes = 8
    args = arguments(n, dtype, planes, special=False)
    gw = torch.randn(n).to(dtype)
    plane = n * dtype.itemsize

    def moved(call, *rest):
        emulated.module.take_counts()
        call(*rest)
        counts = emulated.module.take_counts()
        return counts["read"], counts["written"]

    assert moved(emulated.bitplane, *args, False, False) == (2 * planes * plane, plane)
    assert moved(emulated.bitplane_jvp, *args[:4], *args, False, False) == (4 * planes * plane, plane)
    read, written = moved(emulated.bitplane_bwd, gw, *args, False, False)
    partials = written - 2 * planes * plane
    assert read == (2 * planes + 1) * plane + partials
    assert 0 < partials <= 0.01 * (4 * planes + 1) * plane


def test_misaligned_planes_are_refused(emulated):
    p, q, m, scale, beta = arguments(33, torch.float32, 1, special=False)
    with pytest.raises(RuntimeError, match="716"):
        emulated.bitplane(p[:, 1:], q[:, 1:], m, scale, beta, False, False)
    with pytest.raises(RuntimeError, match="716"):
        emulated.bitplane_bwd(p[0, 1:], q[:, :32], q[:, :32], m, scale, beta, False, False)
    assert emulated.module.take_counts()["launches"] == 0

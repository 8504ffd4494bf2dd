# SPDX-License-Identifier: Apache-2.0
"""The tangents kernels, executed from their .cu source, against the reference: maps by bits, sums closely."""

import pytest
import torch

from fastflat.backends import reference
from tests.ops import tangent_cases as cases

#: Nothing, no channels, channels last and few of them, runs on 16 bytes and off them, short and long.
SHAPES = (
    *((0, 3, 2), (1, 1, 1), (1, 1, 1003), (70, 24, 1), (301, 3, 1), (2, 5, 4), (40, 3, 4), (5, 7, 49)),
    *((2, 8, 64), (1, 40, 32), (2, 3, 1025), (1, 1, 9000)),
)


def shifted(t, by):
    """t one element after another in a buffer that starts `by` elements off the 16-byte grid."""
    if not isinstance(t, torch.Tensor) or t.dim() < 3:
        return t
    buffer = torch.empty(t.numel() + 16, dtype=t.dtype)
    while buffer.data_ptr() % 16:
        buffer = buffer[1:]
    return buffer[by : by + t.numel()].view(t.shape).copy_(t)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_combine(emulated, dtype, shape):
    combine = emulated.tangents_combine
    for i, terms in enumerate(cases.TERMS):
        arguments = cases.combination(terms, (0, 1, 3, 9)[i % 4], shape, dtype)
        cases.check_combine(combine, reference.tangents_combine, arguments)
    for kind in cases.KINDS:
        arguments = cases.activation(kind, ("t0", "t1", "t0 t1")[kind % 3], 2, shape, dtype, special=True)
        cases.check_combine(combine, reference.tangents_combine, arguments)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums(emulated, dtype, shape):
    for i, terms in enumerate(cases.SUMS):
        arguments = cases.summation(terms, (0, 1, 3, 5)[i % 4], shape, dtype)
        cases.check_sums(emulated.tangents_sums, reference.tangents_sums, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(70, 24, 1), (5, 7, 49), (2, 3, 1025)], ids=str)
def test_order_and_address_do_not_matter(emulated, dtype, shape):
    """Blocks and threads in any order, tensors at any address: the same bits."""
    summed = cases.summation("p0 t1 mask total", 3, shape, dtype)
    combined = cases.combination("t0 p0:e t1 p1:c f0 f1 shift mask", 3, shape, dtype)
    sums, map_ = emulated.tangents_sums(*summed), emulated.tangents_combine(*combined)
    emulated.module.set_order(9)
    for by in (0, 1, 3):
        again = emulated.tangents_sums(*(shifted(t, by) for t in summed))
        assert all(torch.equal(a, b) for a, b in zip(again, sums, strict=True))
        assert torch.equal(emulated.tangents_combine(*(shifted(t, by) for t in combined)), map_)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1 << 15), (1 << 9, 64, 1), (8, 4, 1024)], ids=str)
def test_bytes_moved(emulated, dtype, shape):
    """Primals once for as many tangents as share a reading of them; partial sums are few where the data is much."""
    count = 2 if dtype.itemsize == 2 else 4
    bytes_ = {name: cases.bytes_of(name) for name in ("tangents_combine", "tangents_sums")}
    calls = (
        ("tangents_combine", cases.combination("t0 p0:c f0 shift mask", count, shape, dtype)),
        ("tangents_combine", cases.activation(4, "t0 t1", count, shape, dtype)),
        ("tangents_sums", cases.summation("p0 mask total", count, shape, dtype)),
    )
    for name, arguments in calls:
        emulated.module.take_counts()
        getattr(emulated, name)(*arguments)
        counts = emulated.module.take_counts()
        size = bytes_[name](*arguments)
        # Columns of little data are shared out four rows at a time (reduce_plan.h).
        most = 1.7 if name == "tangents_sums" and shape[2] == 1 else 1.08
        assert 0.98 * size <= counts["read"] + counts["written"] <= most * size, name

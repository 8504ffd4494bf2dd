# SPDX-License-Identifier: Apache-2.0
"""The vectors kernels, executed from their .cu source, against the reference: maps by bits, sums closely."""

import pytest
import torch

from fastflat.backends import reference
from tests.ops import vector_cases as cases

#: Nothing, shorter than a pack, around packs and blocks, several chunks; rows on 16 bytes and off them.
LENGTHS = (0, 1, 3, 8, 1023, 1024, 2049, 9001)
COUNTS = (*cases.COUNTS, (4, 8), (3, 9))
#: Factors of a block pass through shared memory 32 rows at a time.
LONG_BASES = ((31, 1), (33, 2), (64, 1), (70, 9))


def shifted(t, by):
    """t one element after another in a buffer that starts `by` elements off the 16-byte grid."""
    buffer = torch.empty(t.numel() + 16, dtype=t.dtype)
    while buffer.data_ptr() % 16:
        buffer = buffer[1:]
    return buffer[by : by + t.numel()].view(t.shape).copy_(t)


@pytest.mark.parametrize("storage", cases.STORAGES)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_dot(emulated, storage, counts):
    for n in LENGTHS:
        cases.check_dot(emulated.vectors_dot, reference.vectors_dot, storage, counts, n)
    cases.check_dot(emulated.vectors_dot, reference.vectors_dot, storage, counts, 500, special=True)


@pytest.mark.parametrize("storage", cases.STORAGES)
@pytest.mark.parametrize("counts", [*COUNTS, *LONG_BASES], ids=str)
def test_subtract(emulated, storage, counts):
    for n in LENGTHS if counts not in LONG_BASES else (1025,):
        cases.check_subtract(emulated.vectors_subtract_, reference.vectors_subtract_, storage, counts, n)
    cases.check_subtract(emulated.vectors_subtract_, reference.vectors_subtract_, storage, counts, 500, special=True)


@pytest.mark.parametrize("storage", cases.STORAGES)
@pytest.mark.parametrize("n", [2048, 4099])
def test_order_and_address_do_not_matter(emulated, storage, n):
    """Blocks and threads in any order, rows at any address: the same bits."""
    q, w, c = cases.problem(storage, (5, 3), n)
    left = w.clone()
    dots, squares = emulated.vectors_dot(q, w), emulated.vectors_subtract_(left, q, c)
    places = cases.starts(n)
    forms = emulated.vectors_quadratic(q[:3], w, places)
    emulated.module.set_order(9)
    for by in (0, 1, 3):
        of_q, of_w = shifted(q, by), shifted(w, 3 * by)
        assert torch.equal(emulated.vectors_dot(of_q, of_w), dots)
        assert torch.equal(emulated.vectors_quadratic(of_q[:3], of_w, places), forms)
        assert torch.equal(emulated.vectors_subtract_(of_w, of_q, c), squares)
        assert torch.equal(of_w, left)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("state", cases.STATES, ids=str)
def test_signs(emulated, dtype, state):
    for k, n in ((0, 3), (3, 0), (1, 1), (3, 127), (2, 4096), (3, 9001)):
        cases.check_signs(emulated.vectors_rademacher, reference.vectors_rademacher, dtype, state, k, n)


@pytest.mark.parametrize("storage", cases.STORAGES)
def test_quadratic(emulated, storage):
    for k, n in ((1, 1), (3, 5), (2, 40003), (0, 8)):
        cases.check_quadratic(emulated.vectors_quadratic, reference.vectors_quadratic, storage, k, n, cases.starts(n))
    cases.check_quadratic(emulated.vectors_quadratic, reference.vectors_quadratic, storage, 2, 40, [7])


def test_quadratic_of_more_slices_than_a_launch_takes(emulated):
    n = 1500
    places = list(range(0, n + 1, 2))
    cases.check_quadratic(emulated.vectors_quadratic, reference.vectors_quadratic, "fp32", 2, n, places)
    assert 4 <= emulated.module.take_counts()["launches"] <= 40


@pytest.mark.parametrize("storage", cases.STORAGES)
def test_bytes_moved(emulated, storage):
    """The basis once for eight vectors; vectors once for dots of few rows, read and written once by a subtraction."""
    n = 1 << 16
    vectors = 8 if storage == "fp32" else 4
    q, w, c = cases.problem(storage, (3, vectors), n)
    emulated.module.take_counts()
    emulated.vectors_dot(q, w)
    counts = emulated.module.take_counts()
    size = q.nbytes + w.nbytes
    assert size <= counts["read"] + counts["written"] <= 1.02 * size
    emulated.vectors_subtract_(w, q, c)
    counts = emulated.module.take_counts()
    size = q.nbytes + 2 * w.nbytes
    assert size <= counts["read"] + counts["written"] <= 1.02 * size
    emulated.vectors_rademacher(torch.tensor([1, 2]), 1, n, q.dtype)
    counts = emulated.module.take_counts()
    assert counts["read"] + counts["written"] == n * q.element_size()
    emulated.vectors_quadratic(q, w[:3], [0, n // 4, n])
    counts = emulated.module.take_counts()
    size = q.nbytes + w[:3].nbytes
    assert size <= counts["read"] + counts["written"] <= 1.02 * size

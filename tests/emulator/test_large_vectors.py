# SPDX-License-Identifier: Apache-2.0
"""The vectors kernels on more than 2^31 elements, as in :mod:`test_large`: the far end must be what it is by itself."""

import pytest
import torch

from fastflat.backends import reference
from tests.ops import vector_cases as cases

from .test_large import EDGE, FAR, sparse

BF16, F32, STREAM = 1, 0, 0x57
ROWS, N = 5, (1 << 29) + 1032  # 5 N > 2^31


@pytest.fixture
def edges(emulated):
    emulated.module.set_edge_blocks(EDGE)
    return emulated.module


def far(dtype, seed):
    """Sparse rows, and their far end, filled."""
    t = sparse((ROWS, N), dtype)
    t[:, -FAR:] = cases.rows(ROWS, FAR, dtype, seed)
    return t, t[:, -FAR:].clone()


def test_dot_and_subtraction(edges):
    (q, small_q), (w, small_w) = far(torch.bfloat16, 0), far(torch.float32, 1)
    c = cases.rows(ROWS, ROWS, torch.float64, 2)
    call = edges.RowsCall(BF16, F32, ROWS, ROWS, N)
    # Blocks that are left out add nothing.
    partials = torch.zeros(edges.vectors_dot_partials(call), dtype=torch.float64)
    dots = torch.full((ROWS, ROWS), 7e77, dtype=torch.float64)
    assert edges.vectors_dot(call, *(t.data_ptr() for t in (q, w, partials, dots)), STREAM) == 0
    cases.assert_close_sums(dots, reference.vectors_dot(small_q, small_w), cases.terms_of_dots(small_q, small_w))
    partials = torch.zeros(edges.vectors_subtract_partials(call), dtype=torch.float64)
    squares = torch.full((ROWS,), 7e77, dtype=torch.float64)
    assert edges.vectors_subtract(call, *(t.data_ptr() for t in (w, q, c, partials, squares)), STREAM) == 0
    wanted = reference.vectors_subtract_(small_w, small_q, c)
    assert torch.equal(w[:, -FAR:], small_w)
    cases.assert_close_sums(squares, wanted, wanted)


def test_signs(edges):
    n = (1 << 31) + FAR
    y, state = sparse((n,), torch.bfloat16), torch.tensor([5, 7])
    assert edges.vectors_rademacher(BF16, state.data_ptr(), n, y.data_ptr(), STREAM) == 0
    first = n // 128 - FAR // 128
    drawn = torch.stack(reference.vectors._noise.words(state, FAR // 128, first), 1).flatten()
    set_ = (drawn[:, None] >> torch.arange(32)) & 1
    assert torch.equal(y[-FAR:].float(), (1.0 - 2 * set_).flatten())

# SPDX-License-Identifier: Apache-2.0
"""The tangents kernels on more than 2^31 elements, as in :mod:`test_large`: the far end is what it is by itself."""

import pytest
import torch

from fastflat.backends import reference
from tests.ops import tangent_cases as cases

from .test_large import EDGE, FAR, sparse

BF16, STREAM = 1, 0x57
COUNT, N = 5, (1 << 29) + 1032  # 5 N > 2^31


@pytest.fixture
def edges(emulated):
    emulated.module.set_edge_blocks(EDGE)
    return emulated.module


def far(shape, seed):
    """Sparse rows, and their far end, filled."""
    t = sparse(shape, torch.bfloat16)
    t[..., -FAR:] = cases.draw((*shape[:-1], FAR), torch.bfloat16, seed)
    return t, t[..., -FAR:].clone()


def test_combine_and_sums(edges):
    (t, small_t), (p, small_p) = far((COUNT, N), 0), far((N,), 1)
    out = sparse((COUNT, N), torch.bfloat16)
    geometry = edges.Geometry(1, 1, N)
    addresses = [t.data_ptr(), p.data_ptr(), *[0] * 8]
    call = (BF16, 0, geometry, COUNT, False, False, addresses, out.data_ptr(), STREAM)
    assert edges.tangents_combine(*call) == 0
    small = small_t[:, None, None], small_p[None, None]
    wanted = reference.tangents_combine(*small, *[None] * 8, 0)
    assert torch.equal(out[:, -FAR:], wanted[:, 0, 0])
    # Blocks that are left out add nothing.
    dots, mapped = torch.full((COUNT, 1), 7e30), sparse((COUNT, N), torch.bfloat16)
    addresses = [t.data_ptr(), p.data_ptr(), 0, 0, p.data_ptr(), mapped.data_ptr(), dots.data_ptr(), 0]
    call = edges.SumsCall(BF16, geometry, COUNT, addresses)
    partials = torch.zeros(2 * edges.tangents_sums_partials(call))
    assert edges.tangents_sums(call, partials.data_ptr(), STREAM) == 0
    mapped_small, dots_small, _ = reference.tangents_sums(*small, None, None, small[1], False)
    assert torch.equal(mapped[:, -FAR:], mapped_small[:, 0, 0])
    assert torch.allclose(dots, dots_small, rtol=1e-4, atol=1e-4 * FAR**0.5)

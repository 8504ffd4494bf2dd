# SPDX-License-Identifier: Apache-2.0
"""Lists with a tensor of more than 2^31 elements: the real launches over sparse memory, of which the first and last
blocks run. The far end must be what the same elements give in a small tensor."""

import pytest
import torch

from fastflat.backends import reference
from fastflat.backends.reference._lists import Writer
from tests.ops import list_cases

from .test_large import EDGE, FAR, sparse

N = (1 << 31) + 1032  # a multiple of eight: the tail starts with a block of draws
BYTES = -(-2 * N // 64) * 64


@pytest.fixture
def edges(emulated, monkeypatch):
    """The emulated ops of which only the first and last blocks run; chunks that are left out add nothing."""
    made = emulated._sums

    def zeroed(like):
        firsts, partials, sums = made(like)
        return firsts, partials.zero_(), sums.zero_()

    monkeypatch.setattr(emulated, "_sums", zeroed)
    emulated.module.set_edge_blocks(EDGE)
    return emulated


def far(dtype, seed, positive=False):
    """A sparse tensor, and its tail, filled."""
    x = sparse((N,), dtype)
    tail = torch.randn(FAR, generator=torch.Generator().manual_seed(seed))
    x[-FAR:] = (tail.abs() if positive else tail).to(dtype)
    return x, x[-FAR:].clone()


@pytest.mark.parametrize("seeded", [False, True])
def test_ascent(edges, seeded):
    (w, small), (g, small_g) = far(torch.bfloat16, 0), far(torch.bfloat16, 1)
    backup, scale = sparse((BYTES,), torch.uint8), torch.tensor([0.1], dtype=torch.float64)
    state = torch.tensor([5, 6]) if seeded else None
    edges.sharpness_ascent_([w], [g], [], backup, [0], scale, [1], 0.01, state)
    assert torch.equal(backup[: 2 * N].view(torch.bfloat16)[-FAR:], small)
    risen, wanted = small.float(), small.clone()
    reference.sharpness_ascent_([risen], [small_g.float()], [], None, [], scale, [1], 0.01)
    writer = Writer(state)
    writer.next(N - FAR)
    writer.write(risen, wanted)
    list_cases.assert_same([w[-FAR:]], [wanted])


def test_sums(edges):
    (g, small), (other, small_other) = far(torch.bfloat16, 2), far(torch.float32, 3)
    # What follows a huge tensor has its own place.
    last = torch.randn(9)
    sums = edges.sharpness_sums([g, last], [other, last], [1], 0.0)
    torch.testing.assert_close(
        sums, reference.sharpness_sums([small, last], [small_other, last], [1], 0.0), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("name", ["momentum", "adam", "moments", "lamb"])
def test_steps(edges, name):
    step = next(s for s in list_cases.STEPS if s.name == name)
    streams = [far(torch.bfloat16, k) for k in range(3)] + [far(torch.float32, k, positive=k > 3) for k in (3, 4)]
    (w, g, f, m, v), small = ([s[k] for s in streams] for k in (0, 1))
    backup, at = sparse((BYTES,), torch.uint8), [0]
    backup[: 2 * N].view(torch.bfloat16)[-FAR:] = small[0]
    small_backup = small[0].clone().view(torch.uint8)
    ours = list_cases.Lists([w], backup, at, [], [g], [f], [[m], [v], []], [])
    theirs = list_cases.Lists(
        [small[0]], small_backup, at, [], [small[1]], [small[2]], [[small[3]], [small[4]], []], []
    )
    sums = getattr(edges, step.op)(*step.arguments(ours))
    wanted = getattr(reference, step.op)(*step.arguments(theirs))
    list_cases.assert_same([t[-FAR:] for t in (w, m, v)], [small[0], small[3], small[4]])
    if sums is not None:
        torch.testing.assert_close(sums, wanted, rtol=1e-12, atol=0)

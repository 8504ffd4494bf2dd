# SPDX-License-Identifier: Apache-2.0
"""The row_tangents kernels, executed from their .cu source, against the reference."""

import pytest
import torch

from fastflat.backends import reference
from tests.ops import row_tangents_cases as cases

#: Nothing; teams of one lane to a block, several of them in a block, rows on 16 bytes and off them.
SHAPES = ((0, 2, 3), (2, 0, 3), (2, 3, 0), (1, 1, 1), (3, 9, 3), (2, 65, 10), (3, 9, 64), (2, 2, 257))
#: Held by a block, and passed over twice.
LONG = ((3, 1, 1001), (2, 2, 4104), (1, 1, 9001))


def check(emulated, name, *rest, **options):
    cases.check(name, getattr(emulated, name), getattr(reference, name), *rest, **options)


@pytest.mark.parametrize("name", cases.OPS)
@pytest.mark.parametrize("shape", [*SHAPES, *LONG], ids=str)
def test_against_the_reference(emulated, name, shape):
    check(emulated, name, shape, torch.float32, every=shape == (3, 9, 3))
    if shape in SHAPES:
        check(emulated, name, shape, torch.float32, special=True, every=False)


@pytest.mark.parametrize("name", cases.OPS)
@pytest.mark.parametrize("dtype", cases.DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", [(2, 0, 3), (2, 65, 10), (2, 2, 257), (1, 1, 4104)], ids=str)
def test_other_types(emulated, name, dtype, shape):
    check(emulated, name, shape, dtype, every=False)


def test_few_rows_share_their_tangents_out(emulated):
    check(emulated, "row_tangents_softmax", (300, 2, 5), torch.float32, every=False)
    assert emulated.module.take_counts()["blocks"] >= 4 * 128


def shifted(t, by):
    """t one element after another in a buffer that starts `by` elements off the 16-byte grid."""
    buffer = torch.empty(t.numel() + 16, dtype=t.dtype)
    while buffer.data_ptr() % 16:
        buffer = buffer[1:]
    return buffer[by : by + t.numel()].view(t.shape).copy_(t)


@pytest.mark.parametrize("name", cases.OPS)
@pytest.mark.parametrize("shape", [(3, 5, 64), (2, 2, 1024), (1, 1, 8200)], ids=str)
def test_order_and_address_do_not_matter(emulated, name, shape):
    """Blocks and threads in any order, rows at any address: the same bits."""
    arguments = next(cases.Problem(shape, torch.float32).calls(name, every=False))
    call = getattr(emulated, name)
    expected = cases.as_tuple(call(*arguments))
    emulated.module.set_order(9)
    for by in (0, 1, 3):
        moved = (shifted(a, by) if isinstance(a, torch.Tensor) else a for a in arguments)
        assert all(torch.equal(a, b) for a, b in zip(cases.as_tuple(call(*moved)), expected, strict=True))


@pytest.mark.parametrize("name", cases.OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_moved(emulated, name, dtype):
    """Primal rows once for all tangents, tangents and results once; what is of a row or a channel stays in caches."""
    k, r, d = 2, 256, 1024
    data = cases.Problem((k, r, d), dtype)
    arguments = {
        "row_tangents_norm": (data.x, data.normal, data.inv, None, None, None, True),
        "row_tangents_norm_bwd": (data.g, data.x, data.mean, data.scale, None, data.normal, data.grad, data.inv)
        + (None, True),
        "row_tangents_softmax": (data.t, data.log, data.of_row, True),
        "row_tangents_softmax_bwd": (data.g, data.x, data.p, data.grad),
    }[name]
    emulated.module.take_counts()
    found = cases.as_tuple(getattr(emulated, name)(*arguments))
    counts = emulated.module.take_counts()
    size = sum(t.nbytes for t in (*arguments, *found) if isinstance(t, torch.Tensor) and t.dim() > 1)
    size -= sum(t.nbytes for t in arguments if isinstance(t, torch.Tensor) and t.shape == (k, r))
    assert counts["read"] + counts["written"] == size

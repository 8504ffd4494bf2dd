# SPDX-License-Identifier: Apache-2.0
"""The logits kernels, executed from their .cu source, against the reference."""

import pytest
import torch

from tests.ops import logits_cases as cases

#: Of the table those that have a kernel.
OPS = cases.OPS[:-1]
#: Nothing, one class, several rows in a block, rows on 16 bytes and off them.
SHAPES = ((2, 0, 3), (2, 3, 0), (1, 1, 1), (1, 9, 3), (2, 65, 10), (2, 9, 64))
#: A block has the row, held or not.
LONG = ((1, 2, 1001), (2, 1, 4104))


@pytest.mark.parametrize("name", OPS)
def test_against_the_reference(emulated, name):
    for shape in (*SHAPES, *LONG):
        cases.check(name, getattr(emulated, name), shape, torch.float32)
        cases.check(name, getattr(emulated, name), shape, torch.float32, special=True)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", cases.DTYPES[1:], ids=str)
def test_other_types(emulated, name, dtype):
    for shape in ((2, 0, 3), (2, 33, 10), (1, 2, 1001), (1, 1, 4104)):
        cases.check(name, getattr(emulated, name), shape, dtype, special=shape[1] == 33)


def shifted(t, by):
    """t one element after another in a buffer that starts `by` elements off the 16-byte grid."""
    buffer = torch.empty(t.numel() + 16, dtype=t.dtype)
    while buffer.data_ptr() % 16:
        buffer = buffer[1:]
    return buffer[by : by + t.numel()].view(t.shape).copy_(t)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("shape", [(1, 5, 64), (1, 1, 1024)], ids=str)
def test_order_and_address_do_not_matter(emulated, name, shape):
    """Blocks and threads in any order, rows at any address: the same bits."""
    call = getattr(emulated, name)
    for arguments in cases.Problem(shape, torch.float32).calls(name):
        expected = cases.as_tuple(call(*arguments))
        emulated.module.set_order(9)
        for by in (0, 1):
            moved = (shifted(a, by) if isinstance(a, torch.Tensor) else a for a in arguments)
            found = cases.as_tuple(call(*moved))
            assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_moved(emulated, dtype):
    """Backward passes move each tensor of logits once; what is of a row or a class stays in caches."""
    data = cases.Problem((1, 64, 256), dtype)
    for arguments, factor in zip(data.calls("logits_divergence_bwd"), (1, 1.5), strict=True):
        emulated.module.take_counts()
        emulated.logits_divergence_bwd(*arguments)
        counts = emulated.module.take_counts()
        # The mixture reads the rows before it does again, from the caches.
        assert counts["read"] + counts["written"] == 2 * factor * (data.z0.nbytes + data.z.nbytes)
    emulated.module.take_counts()
    emulated.logits_loss_bwd(*next(data.calls("logits_loss_bwd")))
    counts = emulated.module.take_counts()
    assert counts["read"] + counts["written"] == 2 * data.z0.nbytes

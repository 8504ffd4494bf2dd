# SPDX-License-Identifier: Apache-2.0
"""The kernels of the inputs family, executed from their .cu source, against the reference."""

import pytest
import torch

from tests.ops import inputs_cases as cases


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_against_the_reference(emulated, dtype):
    for shape in cases.SHAPES:
        cases.check("inputs_noise", emulated.inputs_noise, shape, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_order_address_and_bytes(emulated, dtype):
    """Blocks and threads in any order and x off the 16-byte grid: the same bits; x is read once for all copies."""
    x = torch.randn(6, 400).to(dtype)
    arguments = (cases.STATE, 3, 1, 0.5, 0.5)
    emulated.module.take_counts()
    expected = emulated.inputs_noise(x, *arguments)
    counts = emulated.module.take_counts()
    assert counts["read"] + counts["written"] == 4 * x.nbytes + expected[1].nbytes
    emulated.module.set_order(9)
    buffer = torch.empty(x.numel() + 1, dtype=dtype)
    moved = buffer[1:].view(x.shape).copy_(x)
    assert all(torch.equal(a, b) for a, b in zip(emulated.inputs_noise(moved, *arguments), expected, strict=True))

# SPDX-License-Identifier: Apache-2.0
"""The template op: the shortest complete test of an op."""

from __future__ import annotations

import pytest
import torch

import fastflat  # noqa: F401
from fastflat.backends import reference

from . import comparison as common

op = torch.ops.fastflat.identity


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (33,), (3, 5, 7), (70001,)])
def test_same_bits_as_reference(dtype, shape):
    x = common.random_data(shape).nan_to_num(0).clamp(-100, 100).to(dtype)
    assert torch.equal(op(x), reference.identity(x))
    assert op(x).data_ptr() != x.data_ptr() or not x.numel()


def test_layouts():
    x = torch.randn(2, 3, 4, 5)
    for view in (
        x,
        x.to(memory_format=torch.channels_last),
        x[:, :, ::2],
        x.transpose(1, 3),
        x[:, :1].expand(2, 3, 4, 5),
    ):
        y = op(view)
        assert torch.equal(y, view)
        assert y.stride() == torch.empty_like(view).stride()


def test_opcheck():
    torch.library.opcheck(op.default, (torch.randn(4, 5),))


def test_raw_op_refuses_a_gradient():
    with pytest.raises(NotImplementedError, match="fastflat::identity: a raw op has no derivative"):
        op(torch.randn(3, requires_grad=True))

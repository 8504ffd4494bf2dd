# SPDX-License-Identifier: Apache-2.0
"""``identity``: y = x. The smallest kernel with everything a kernel needs; copy it to start a new op."""

import torch
import triton
import triton.language as tl

from . import _launch
from ._common import program


@triton.jit(do_not_specialize=["n"])
def _identity_kernel(y_ptr, x_ptr, n, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    start = program(WIDE) * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    # Whole blocks carry no mask, so that their accesses are 16 bytes wide whatever n is.
    if start + BLOCK <= n:
        tl.store(y_ptr + offsets, tl.load(x_ptr + offsets))
    else:
        tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, mask=offsets < n), mask=offsets < n)


def identity(x: torch.Tensor) -> torch.Tensor:
    x = _launch.dense(x)
    y = torch.empty_like(x)
    if x.numel():
        bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
        with _launch.on_device(x):
            _identity_kernel[(triton.cdiv(x.numel(), _launch.BLOCK),)](
                y.view(bits), x.view(bits), x.numel(), _launch.BLOCK, _launch.wide(x), **_launch.OPTIONS
            )
    return y

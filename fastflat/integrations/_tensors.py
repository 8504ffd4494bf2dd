# SPDX-License-Identifier: Apache-2.0
"""Which tensors the adapters hand to fastflat's kernels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

#: Types whose forms are exact for each adapter that lists them.
FP32 = (torch.float32,)
UP_TO_32 = (torch.float32, torch.bfloat16, torch.float16)


def plain(x: Tensor, types: tuple[torch.dtype, ...]) -> bool:
    """Whether x is an ordinary, non-empty tensor of one of these types: no subclass, for which a peer may do more."""
    return type(x) in (Tensor, nn.Parameter) and x.dtype in types and x.numel() > 0

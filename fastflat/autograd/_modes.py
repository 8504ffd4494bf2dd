# SPDX-License-Identifier: Apache-2.0
"""Which derivative machinery is in force. The only file that asks PyTorch's private state; tested per torch version."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

#: Context that calls raw ops below the Autograd keys, inside a Function that has the derivative.
below_autograd = torch._C._AutoDispatchBelowAutograd


def transformed() -> bool:
    """Whether a torch.func transform, batched backward or forward-mode level is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


#: Whether a tensor is a batch of cotangents under torch.autograd.grad(..., is_grads_batched=True).
is_batched_cotangent = torch._C._functorch.is_legacy_batchedtensor

# SPDX-License-Identifier: Apache-2.0
"""Which derivative machinery is in force, and what every Function does for it. The only file that asks PyTorch's
private state; tested per torch version."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

#: Context that calls raw ops below the Autograd keys, inside a Function that has the derivative.
below_autograd = torch._C._AutoDispatchBelowAutograd


def transformed() -> bool:
    """Whether a torch.func transform, batched backward or forward-mode level is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


#: Whether a tensor is a batch of cotangents under torch.autograd.grad(..., is_grads_batched=True).
is_batched_cotangent = torch._C._functorch.is_legacy_batchedtensor


def backward_op(name: str, kernels: SimpleNamespace, *cotangents: Tensor | None) -> Callable:
    """The raw backward op `name`; batches of is_grads_batched=True consult no vmap rule and are taken apart by the
    dispatcher."""
    for t in cotangents:
        if t is not None and is_batched_cotangent(t):
            return getattr(torch.ops.fastflat, name)
    return getattr(kernels, name)


def remember(ctx: Any, *inputs_and_plan: Any) -> None:
    """Keep the tensors and the plan of a call for every derivative."""
    *tensors, ctx.plan = inputs_and_plan
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)
    ctx.set_materialize_grads(False)

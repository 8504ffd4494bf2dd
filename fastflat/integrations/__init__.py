# SPDX-License-Identifier: Apache-2.0
"""Other libraries' quantizers and sharpness-aware optimizers, computed by fastflat: :func:`accelerate`,
:func:`accelerate_optimizer` and :func:`restore`, and adapters for one's own."""

from torch import nn
from torch.optim import Optimizer

from fastflat import _checks
from fastflat.integrations import brevitas, discretizers, modelopt, plain, torch_ao, torchao
from fastflat.integrations._accelerate import Entry, Report, accelerate, restore_model
from fastflat.integrations._adapter import Adapter, register, registered, unregister
from fastflat.integrations.discretizers import Pact
from fastflat.integrations.optimizers import accelerate_optimizer, restore_optimizer
from fastflat.integrations.plain import Plain, PlainLayer

__all__ = [
    "Adapter",
    "Entry",
    "Pact",
    "Plain",
    "PlainLayer",
    "Report",
    "accelerate",
    "accelerate_optimizer",
    "register",
    "registered",
    "restore",
    "unregister",
]


def restore(model: nn.Module | Optimizer) -> int:
    """Put the modules' own forward, or an optimizer's own passes, back, with the state that they have now.

    Returns:
        How many modules :func:`accelerate`, or 1 where :func:`accelerate_optimizer`, had swapped.
    """
    if isinstance(model, Optimizer):
        return restore_optimizer(model)
    if not isinstance(model, nn.Module):
        _checks.fail("restore", "model", "be a torch.nn.Module or a torch.optim.Optimizer", type(model))
    return restore_model(model)


# Those asked first come last.
for _adapter in (*plain.popular()[::-1], *discretizers.popular()[::-1]):
    register(_adapter)
for _adapter in (
    torch_ao.FakeQuantize(),
    torch_ao.FusedMovingAverage(),
    torch_ao.Learnable(),
    torchao.IntxFakeQuantizer(),
    modelopt.TensorQuantizer(),
    brevitas.Weights(),
    brevitas.Activations(),
):
    register(_adapter)

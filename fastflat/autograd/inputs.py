# SPDX-License-Identifier: Apache-2.0
"""Derivatives of noise on inputs, whose every copy is x and a constant, of every order and in every mode.

A step of an attack has none: it is a decision, and so says the function that users call.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastflat.autograd._batching import one_by_one
from fastflat.autograd._modes import below_autograd, transformed


class Plan(NamedTuple):
    """Everything about a call that is not a tensor."""

    copies: int
    law: int
    most: float
    keep: float
    kernels: SimpleNamespace | None


class Noise(Function):
    """K copies with noise, with every derivative."""

    @staticmethod
    def forward(x, state, plan):
        return plan.kernels.inputs_noise(x, state, *plan[:4])[0]

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.copies = inputs[2].copies

    @staticmethod
    def backward(ctx, g):
        return g.sum(0), None, None

    @staticmethod
    def jvp(ctx, tx, *_):
        return tx.expand(ctx.copies, *tx.shape).contiguous()

    @staticmethod
    def vmap(info, in_dims, x, state, plan):
        return one_by_one(Noise, info.batch_size, in_dims, x, state, plan)


class CompiledNoise(Function):
    """The same as torch.compile traces it."""

    @staticmethod
    def forward(ctx, x, state, copies, law, most, keep):
        return torch.ops.fastflat.inputs_noise(x, state, copies, law, most, keep)[0]

    @staticmethod
    def backward(ctx, g):
        return g.sum(0), None, None, None, None, None


def noise(x: Tensor, state: Tensor, plan: Plan) -> Tensor:
    """Copies by the Function that the mode in force needs."""
    if torch.compiler.is_compiling():
        return CompiledNoise.apply(x, state, *plan[:4])
    if transformed() or (x.requires_grad and torch.is_grad_enabled()):
        return Noise.apply(x, state, plan)
    with below_autograd():
        return Noise.forward(x, state, plan)

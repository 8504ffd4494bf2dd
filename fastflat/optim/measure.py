# SPDX-License-Identifier: Apache-2.0
"""How sharp the minimum is where a model stands."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastflat.optim._passes import Randomness, buffers_kept
from fastflat.optim.sam import SAM


def sharpness(
    model: nn.Module, loss_fn: Callable[[], Tensor], rho: float = 0.05, *, adaptive: bool = False, eta: float = 0.0
) -> tuple[float, float]:
    """The loss at w and its rise ``L(w + e) - L(w)``, with the e of :class:`SAM`: to first order the worst within rho.

    Args:
        model: whose parameters are perturbed; those of quantizers are not. In the mode it is in.
        loss_fn: computes the loss of ``model`` on fixed data; it is called twice, with the same random numbers.
        rho, adaptive, eta: of the perturbation.

    Returns:
        The loss and its rise, two numbers. Parameters, their gradients, buffers and random state are as before.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    before = [p.grad for p in params]
    opt = SAM(model, rho=rho, adaptive=adaptive, eta=eta)
    state = Randomness(params[0].device)
    try:
        with buffers_kept(model):
            for p in params:
                p.grad = None
            with torch.enable_grad():
                loss = loss_fn()
                loss.backward()
            state.put_back()
            with opt.perturbed(), torch.no_grad():
                risen = loss_fn()
    finally:
        state.put_back()
        for p, g in zip(params, before, strict=True):
            p.grad = g
    return float(loss.detach()), float(risen) - float(loss.detach())

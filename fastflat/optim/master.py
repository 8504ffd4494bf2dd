# SPDX-License-Identifier: Apache-2.0
"""fp32 copies of 16-bit parameters for any optimizer, and a loss scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class MasterWeights:
    """An optimizer over fp32 copies of parameters of 16 bits: a step smaller than half a bf16 ulp is not lost.

    Backward passes leave gradients in the model's type; :meth:`step` takes them to fp32, divides by the loss scale,
    steps on the copies and rounds these to the parameters. With a scale a gradient that is not finite skips the step
    and halves the scale, and ``growth`` good steps double it (Micikevicius et al. 2018, arXiv 1710.03740); that looks
    at the gradients on the host, as ``torch.amp.GradScaler`` does, and without a scale nothing waits.

    Args:
        params: tensors, or groups of options with ``params``, as optimizers take them.
        optimizer: makes it from the same with fp32 tensors, as ``lambda p: ff.optim.SGD(p, lr=0.1)``.
        scale: first loss scale, as ``2.0**16`` for fp16; None for none, which bf16 needs not.
        growth: good steps until the scale doubles.

    Attributes:
        optimizer: over the copies; schedules take it.
        scale: now; 1 without one.

    Raises:
        TypeError, ValueError: no parameters of floats, or a scale or growth that is not positive.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        optimizer: Callable[[list], torch.optim.Optimizer],
        *,
        scale: float | None = None,
        growth: int = 2000,
    ) -> None:
        if scale is not None and not 0 < scale < math.inf:
            raise ValueError(f"optim.MasterWeights: scale must be positive and finite, got {scale!r}")
        if growth < 1:
            raise ValueError(f"optim.MasterWeights: growth must be 1 or more, got {growth!r}")
        groups = [p if isinstance(p, dict) else {"params": [p]} for p in params]
        groups = [
            {**g, "params": [g["params"]] if isinstance(g["params"], Tensor) else list(g["params"])} for g in groups
        ]
        self._params = [p for group in groups for p in group["params"]]
        for p in self._params:
            if not isinstance(p, Tensor) or not p.is_floating_point():
                got = p.dtype if isinstance(p, Tensor) else type(p).__name__
                raise TypeError(f"optim.MasterWeights: params must be tensors of floats, got {got}")
        if not self._params:
            raise ValueError("optim.MasterWeights: params must hold a parameter, got none")
        copies = {p: p.detach().to(torch.float32, copy=True).requires_grad_() for p in self._params}
        self._masters = [copies[p] for p in self._params]
        self.optimizer = optimizer([{**g, "params": [copies[p] for p in g["params"]]} for g in groups])
        self.scale, self._dynamic, self._growth, self._good = scale or 1.0, scale is not None, growth, 0

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss to call ``backward`` of."""
        return loss * self.scale if self._dynamic else loss

    def zero_grad(self) -> None:
        """Of the parameters and of the copies."""
        for p in (*self._params, *self._masters):
            p.grad = None

    @torch.no_grad()
    def step(self) -> bool:
        """A step on the copies, then on the parameters; False where a gradient that is not finite skipped it."""
        given = [(p, m) for p, m in zip(self._params, self._masters, strict=True) if p.grad is not None]
        for p, m in given:
            m.grad = p.grad.to(torch.float32, copy=True)
            p.grad = None
        if self._dynamic and given:
            grads = [m.grad for _, m in given]
            torch._foreach_mul_(grads, 1.0 / self.scale)
            if not bool(torch.stack([g.isfinite().all() for g in grads]).all()):
                self.scale, self._good = self.scale / 2, 0
                for m in self._masters:
                    m.grad = None
                return False
            self._good += 1
            if self._good == self._growth:
                self.scale, self._good = self.scale * 2, 0
        self.optimizer.step()
        for p, m in zip(self._params, self._masters, strict=True):
            p.copy_(m)
            m.grad = None
        return True

    @torch.no_grad()
    def adopt(self) -> None:
        """Takes the copies anew from the parameters, after something else has written these."""
        for p, m in zip(self._params, self._masters, strict=True):
            m.copy_(p)

    def state_dict(self) -> dict[str, Any]:
        """Copies, scale and the optimizer's state; tensors and plain values."""
        return {
            "masters": [m.detach().clone() for m in self._masters],
            "scale": self.scale,
            "good": self._good,
            "optimizer": self.optimizer.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The counterpart, which writes the parameters, too.

        Raises:
            ValueError: the copies are of other shapes; nothing is changed then.
        """
        want, got = [tuple(m.shape) for m in self._masters], [tuple(m.shape) for m in state["masters"]]
        if want != got:
            raise ValueError(f"optim.MasterWeights: masters must have the shapes {want}, got {got}")
        self.optimizer.load_state_dict(state["optimizer"])
        self.scale, self._good = state["scale"], state["good"]
        for p, m, value in zip(self._params, self._masters, state["masters"], strict=True):
            m.copy_(value)
            p.copy_(m)

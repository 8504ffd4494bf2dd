# SPDX-License-Identifier: Apache-2.0
"""What a method adds to an ordinary training loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Hook:
    """Called by a training loop at its joints; a method overrides what it needs. One hook serves one run.

    The order: :meth:`prepare`, the optimizer is made, :meth:`start`, then for each step :meth:`before`,
    :meth:`loss` once or more (an optimizer may take several passes), :meth:`after`; last :meth:`finish`.
    """

    def prepare(self, model: nn.Module) -> None:
        """May change layers or add parameters, before the optimizer is made."""

    def start(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        """Before the first of so many steps."""

    def before(self, step: int) -> None:
        """Before step 0, 1, ...: schedules."""

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """(loss to differentiate, scores): cross-entropy unless the method has its own."""
        scores = model(x)
        return F.cross_entropy(scores.float(), y), scores

    def after(self, step: int) -> None:
        """After the optimizer's step."""

    def finish(self) -> None:
        """After the last step, before the model is evaluated."""

    def state_dict(self) -> dict[str, Any]:
        """What continues a stopped run: plain values and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The counterpart, after :meth:`start`."""

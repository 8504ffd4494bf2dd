# SPDX-License-Identifier: Apache-2.0
"""vmap of the Functions: with a scale per group the batch becomes more channels, so that one call serves all samples;
where samples must not share a call, one after another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def one_by_one(function: type[Function], size: int, in_dims: tuple, *inputs_and_plan: Any) -> tuple:
    """(results, out_dims) of a vmap rule: `function` on each sample by itself, its results stacked in front."""
    *inputs, plan = inputs_and_plan
    rows = [
        function.apply(*(t if d is None else t.select(d, i) for t, d in zip(inputs, in_dims, strict=False)), plan)
        for i in range(size)
    ]
    if isinstance(rows[0], Tensor):
        return torch.stack(rows), 0
    return tuple(map(torch.stack, zip(*rows, strict=True))), (0,) * len(rows[0])


class Batch:
    """Moves a batch axis into the channel axis of a call described by `plan`, and back.

    Per tensor: ``[B, ...]`` with a scale for each sample along axis 0. Per channel: ``[B*C, ...]`` along axis 0.
    Groups: ``[B, ..., K]`` with scales ``[B, ..., K/group]``.
    """

    def __init__(self, size: int, plan: Any) -> None:
        self.size = size
        self.axis = plan.axis
        self.plan = plan if plan.group else plan.along(0)

    def _front(self, t: Tensor, dim: int | None) -> Tensor:
        return t.expand(self.size, *t.shape) if dim is None else t.movedim(dim, 0)

    def data(self, t: Tensor | None, dim: int | None) -> Tensor | None:
        """A tensor of x's shape."""
        if t is None:
            return None
        t = self._front(t, dim)
        return t if self.axis < 0 else t.movedim(self.axis + 1, 1).flatten(0, 1)

    def parameter(self, t: Tensor | None, dim: int | None) -> Tensor | None:
        """A tensor of the scale's shape."""
        if t is None:
            return None
        t = self._front(t, dim)
        return t.contiguous() if self.axis < 0 else t.flatten(0, 1)

    def inputs(self, in_dims: tuple, x: Tensor, scale: Tensor, zero_point: Tensor | None) -> tuple:
        return self.data(x, in_dims[0]), self.parameter(scale, in_dims[1]), self.parameter(zero_point, in_dims[2])

    def split_data(self, y: Tensor) -> Tensor:
        """A result of x's shape with the batch in front again."""
        return y if self.axis < 0 else y.unflatten(0, (self.size, -1)).movedim(1, self.axis + 1)

    def split_parameter(self, g: Tensor) -> Tensor:
        """A result of the scale's shape with the batch in front again."""
        return g if self.axis < 0 else g.unflatten(0, (self.size, -1))

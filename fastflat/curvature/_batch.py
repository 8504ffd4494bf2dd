# SPDX-License-Identifier: Apache-2.0
"""A batch of data as a flat list of tensors with what puts it together again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastflat import _checks


class Batch(NamedTuple):
    """Inputs and targets; ``tensors`` are all that they hold, ``spec`` and ``rest`` everything else of them."""

    tensors: list[Tensor]
    rest: tuple  # the leaves, with None where a tensor belongs
    spec: Any
    size: int

    @classmethod
    def of(cls, name: str, pair: Any) -> Batch:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            _checks.fail(name, "data", "yield pairs (inputs, targets)", type(pair))
        leaves, spec = pytree.tree_flatten(tuple(pair))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        sized = [t for t in tensors if t.dim()]
        if not sized:
            _checks.fail(name, "data", "hold tensors with rows", "a batch without any")
        rest = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        return cls(tensors, rest, spec, sized[0].shape[0])

    def together(self, tensors: list[Tensor]) -> tuple[Any, Any]:
        """(inputs, targets) made of these tensors."""
        found = iter(tensors)
        return pytree.tree_unflatten([next(found) if leaf is None else leaf for leaf in self.rest], self.spec)

    def split(self, rows: int | None) -> Iterator[Batch]:
        """Parts of at most so many rows."""
        if rows is None or rows >= self.size:
            yield self
            return
        for start in range(0, self.size, rows):
            size = min(rows, self.size - start)
            yield self._replace(tensors=[self._rows(t, start, size) for t in self.tensors], size=size)

    def _rows(self, t: Tensor, start: int, size: int) -> Tensor:
        return t.narrow(0, start, size) if t.dim() and t.shape[0] == self.size else t


def batches(name: str, data: Iterable) -> Iterator[Batch]:
    """The batches of data that can be gone through again and again."""
    count = 0
    for pair in data:
        count += 1
        yield Batch.of(name, pair)
    if not count:
        _checks.fail(name, "data", "hold at least one batch", "none")


def check(name: str, data: Any) -> None:
    """Refuse what is no data, or is data only once."""
    if isinstance(data, Tensor) or not isinstance(data, Iterable):
        _checks.fail(name, "data", "be an iterable of (inputs, targets), such as a list or a DataLoader", type(data))
    if iter(data) is data:
        _checks.fail(name, "data", "be an iterable that can be gone through again", type(data), "; pass list(data)")


def called(model: torch.nn.Module, state: dict[str, Tensor], inputs: Any) -> Any:
    """The model's output with these parameters and buffers: a tuple or list is its arguments, a dict its keywords."""
    if isinstance(inputs, dict):
        return torch.func.functional_call(model, state, (), inputs)
    args = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    return torch.func.functional_call(model, state, args)


def coupling(model: torch.nn.Module) -> str | None:
    """The name of a batch norm that uses the statistics of a batch, so that its rows see each other."""
    for name, module in model.named_modules():
        norm = isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
        if norm and (module.training or module.running_mean is None):
            return name
    return None

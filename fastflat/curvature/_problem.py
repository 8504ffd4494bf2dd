# SPDX-License-Identifier: Apache-2.0
"""A model, its loss and the parameters in question: traced once for each shape of batch, linearised at each batch."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastflat import _checks
from fastflat.curvature._batch import Batch, called
from fastflat.curvature._differentiate import gradient, scalar
from fastflat.curvature._interpreter import Linear
from fastflat.curvature._program import Program
from fastflat.curvature._tracing import Constants, trace


class Traced(NamedTuple):
    """A program with the positions of its parts."""

    program: Program
    params: list[int]
    gradients: list[int | None]
    outputs: list[int]  # of the model, or the loss
    cotangents: list[int]  # of the outputs
    plans: dict[Any, Any]
    output_of: Callable[[list[Tensor]], Any] | None = None  # what the model returns, made of its differentiable outputs


class Problem:
    """What the operators share.

    Attributes:
        names, params: the chosen parameters.
        sizes: their numbers of elements.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        params: Any,
        reduction: str,
        row_weight: Callable[[Any], Tensor] | None,
        tangent_dtype: torch.dtype | None,
    ) -> None:
        self.name, self.model, self.loss_fn = name, model, loss_fn
        if not isinstance(model, nn.Module):
            _checks.fail(name, "model", "be a torch.nn.Module", type(model))
        if reduction not in ("mean", "sum"):
            _checks.fail(name, "reduction", "be 'mean' or 'sum'", repr(reduction))
        self.reduction, self.row_weight, self.tangent_dtype = reduction, row_weight, tangent_dtype
        self.names = chosen(name, model, params)
        self.sizes = [p.numel() for p in self.params]
        first = self.params[0]
        for n, p in zip(self.names, self.params, strict=True):
            if p.dtype != first.dtype or p.device != first.device:
                want = f"share one type and device ({first.dtype}, {first.device})"
                _checks.fail(name, "params", want, f"{p.dtype}, {p.device} of {n}")
        self._traced: dict[Any, Traced] = {}
        self._last: tuple[Any, Linear, Traced] | None = None

    @property
    def params(self) -> list[Tensor]:
        named = dict(self.model.named_parameters())
        return [named[n] for n in self.names]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The parameters that are held constant, and the buffers."""
        held = {n: p for n, p in self.model.named_parameters() if n not in set(self.names)}
        return held, dict(self.model.named_buffers())

    def output(self, batch: Batch, values: Sequence[Tensor]) -> Any:
        """What the model returns for a batch with these values of the parameters; its state stays as it is."""
        held, buffers = self.state()
        state = dict(zip(self.names, values, strict=True)) | {n: t.detach() for n, t in held.items()}
        state |= {n: b.detach().clone() for n, b in buffers.items()}
        return called(self.model, state, batch.together(batch.tensors)[0])

    def draws_given_back(self) -> AbstractContextManager:
        """Inside, the random state moves; afterwards it is as before."""
        device = self.params[0].device
        return torch.random.fork_rng([device] if device.type == "cuda" else [])

    def loss(self, output: Any, target: Any) -> Tensor:
        """The scalar loss of a batch; with weights of rows, their weighted sum."""
        if self.row_weight is None:
            return scalar(self.name, self.loss_fn(output, target))
        weights = self.row_weight(target)
        rows = torch.vmap(lambda y, t: self.loss_fn(_row(y), _row(t)))(output, target)
        return (rows * weights.to(rows.dtype)).sum()

    def weight(self, batch: Batch) -> float:
        """How much a batch weighs in the mean over all data; its loss is multiplied by the first number of `share`."""
        if self.row_weight is None:
            return float(batch.size)
        return float(self.row_weight(batch.together(batch.tensors)[1]).sum())

    def share(self, batch: Batch) -> float:
        """The factor of a batch's loss in the sum over all data."""
        return float(batch.size) if self.reduction == "mean" and self.row_weight is None else 1.0

    def at(self, batch: Batch, what: str) -> tuple[Linear, Traced]:
        """The program of a batch, linearised there; that of the batch before is dropped. ``what`` it computes: the
        loss and its ``"gradient"``, or the ``"outputs"`` of the model with the pullback of their cotangents."""
        held, buffers = self.state()
        tensors = [*self.params, *held.values(), *buffers.values(), *batch.tensors]
        modes = tuple(m.training for m in self.model.modules())
        states = tuple((id(t), t.data_ptr(), t._version) for t in tensors)
        key = (what, modes, states, batch.rest, batch.spec)
        if self._last is None or self._last[0] != key:
            self._last = None
            traced = self._trace(batch, what, modes)
            linear = Linear(traced.program, [t.detach() for t in tensors], traced.plans, self.tangent_dtype)
            self._last = (key, linear, traced)
        return self._last[1:]

    def _trace(self, batch: Batch, what: str, modes: tuple[bool, ...]) -> Traced:
        held, buffers = self.state()
        groups = [self.params, list(held.values()), list(buffers.values()), batch.tensors]
        shapes = tuple((t.shape, t.dtype, t.stride()) for t in batch.tensors)
        key = (what, shapes, batch.rest, batch.spec, modes)
        if key in self._traced:
            return self._traced[key]
        count = len(self.names)
        structure: list[Any] = []

        def function(twice, params, held_values, buffer_values, tensors):
            params = [p.detach().requires_grad_() for p in params]
            known = [*params, *held_values, *buffer_values, *tensors]
            state = dict(zip(self.names, params, strict=True))
            state.update(zip(held, held_values, strict=True))
            state.update(zip(buffers, buffer_values, strict=True))
            inputs, targets = batch.together(tensors)
            with torch.enable_grad():
                with Constants(known):
                    output = called(self.model, state, inputs)
                    if what != "outputs":
                        loss = self.loss(output, targets)
                        return [*gradient(loss, params, twice=twice), loss]
                leaves, spec = pytree.tree_flatten(output)
                outputs = [z for z in leaves if isinstance(z, Tensor) and z.requires_grad]
                rest = [None if isinstance(z, Tensor) else z for z in leaves]
                structure[:] = [rest, spec, len(outputs) == sum(isinstance(z, Tensor) for z in leaves)]
                cotangents = [torch.zeros_like(z) for z in outputs]
                pulled = gradient(outputs, params, cotangents, twice=twice)
            return [*pulled, *outputs, *cotangents]

        program = trace(function, *groups)
        found, params = program.outputs, program.inputs[:count]
        if what != "outputs":
            self._traced[key] = Traced(program, params, found[:count], found[count:], [], {})
            return self._traced[key]
        rest, spec, all_move = structure
        if not all_move:
            _checks.fail(self.name, "model", "return tensors that all depend on the parameters", "others beside them")
        middle = (len(found) + count) // 2

        def output_of(tensors):
            there = iter(tensors)
            return pytree.tree_unflatten([next(there) if r is None else r for r in rest], spec)

        self._traced[key] = Traced(program, params, found[:count], found[count:middle], found[middle:], {}, output_of)
        return self._traced[key]


def _row(tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.unsqueeze(0), tree)


def chosen(name: str, model: nn.Module, params: Any) -> list[str]:
    """Names of the parameters meant: None for those that require a gradient; names, patterns or tensors."""
    named = dict(model.named_parameters())
    if params is None:
        found = [n for n, p in named.items() if p.requires_grad and p.is_floating_point()]
        if not found:
            _checks.fail(name, "model", "have a parameter that requires a gradient", "none", "; name some by params=")
        return found
    params = [params] if isinstance(params, (str, Tensor)) else list(params)
    if not params:
        _checks.fail(name, "params", "name at least one parameter", "none")
    picked: set[str] = set()
    for wanted in params:
        if isinstance(wanted, Tensor):
            match = [n for n, p in named.items() if p is wanted]
            label = f"a tensor of shape {list(wanted.shape)}"
        elif isinstance(wanted, str):
            match = fnmatch.filter(named, wanted)
            label = repr(wanted)
        else:
            _checks.fail(name, "params", "hold names, patterns or tensors", type(wanted))
        if not match:
            close = difflib.get_close_matches(wanted, named, 3) if isinstance(wanted, str) else []
            hint = f"; close to it: {', '.join(close)}" if close else ""
            _checks.fail(name, "params", "name parameters of the model", label, hint)
        picked.update(match)
    return [n for n in named if n in picked]


def unpacked(vectors: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """Rows ``[K, n]`` as ``[K, *shape]`` for each parameter."""
    parts = vectors.split([p.numel() for p in params], 1)
    return [part.reshape(vectors.shape[0], *p.shape) for part, p in zip(parts, params, strict=True)]

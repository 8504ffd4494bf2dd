# SPDX-License-Identifier: Apache-2.0
"""Tracing a function down to ATen calls."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from fastflat.backends import dispatched
from fastflat.curvature._program import Program, Untraceable, mutates, program_of
from fastflat.curvature._rules import RULES

_STOP = torch.ops.aten.detach_copy.default


def trace(function: Callable, *examples: Sequence[Tensor]) -> Program:
    """The program of ``function(twice, *lists) -> list of tensors or None``.

    ``twice`` asks for first derivatives that can be differentiated again by autograd. Without it they are shorter, but
    those of some ops read results of the forward that count as constants, such as the factors of a determinant: then
    the function is traced again with it.

    The function runs once, on tensors without data: nothing is computed or drawn, and what it does in place is
    followed in the trace and reaches nobody. Attention is computed by its mathematical form, whose derivatives exist.

    Raises:
        Untraceable: control flow that depends on values, or an operation that no trace can hold.
    """
    examples = [[t.detach() for t in group] for group in examples]
    try:
        with sdpa_kernel(SDPBackend.MATH), dispatched(), _no_fused_recurrence(), torch.random.fork_rng([]):
            graph = _graph(functools.partial(function, False), examples)
            if any(_reads_constants(node) for node in graph.graph.nodes):
                graph = _graph(functools.partial(function, True), examples)
    except Untraceable:
        raise
    except (RuntimeError, NotImplementedError, TypeError) as error:
        lines = str(error).strip().splitlines()
        raise Untraceable(lines[0] if lines else type(error).__name__) from error
    return program_of(graph, sum(map(len, examples)))


def _graph(function: Callable, examples: list[list[Tensor]]) -> Any:
    from torch.fx.experimental.proxy_tensor import make_fx  # a second of imports that others need not wait for

    graph = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*examples)
    if any(mutates(node) for node in graph.graph.nodes):
        graph = make_fx(torch.func.functionalize(graph), tracing_mode="fake", _allow_non_fake_inputs=True)(*examples)
    return graph


def _reads_constants(node: Any) -> bool:
    """Whether a floating result beside the first is read of an op that has no rule to say how it moves."""
    if node.target is not operator.getitem or node.args[1] == 0 or not node.users:
        return False
    value, op = node.meta.get("val"), node.args[0].target
    return isinstance(value, Tensor) and value.is_floating_point() and op not in RULES


class Constants(TorchFunctionMode):
    """Marks, while a forward pass is traced, what autograd holds constant: results of ``detach`` and of code under
    ``no_grad``. A trace of the operations alone would let tangents through."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        self._known = {id(t) for t in known}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        writes = bool(args) and _in_place(func) and isinstance(args[0], Tensor)
        if writes and not isinstance(args[0], FakeTensor):
            args = (args[0].clone(), *args[1:])  # state that the function did not get as an argument stays as it is
        if not torch.is_grad_enabled() or func in (torch.Tensor.requires_grad.__get__, torch.Tensor.grad_fn.__get__):
            return func(*args, **kwargs)
        given = [t for t in _tensors((args, kwargs)) if t.is_floating_point()]
        if any(t.requires_grad for t in given):
            into = args[:1] if writes else ()
            args, kwargs = _mapped((args[len(into) :], kwargs), self._constant)
            args = (*into, *args)
            result = func(*args, **kwargs)
            return _mapped(result, self._constant) if func in _CUTS else result
        return func(*args, **kwargs)

    def _constant(self, t: Tensor) -> Tensor:
        if t.requires_grad or id(t) in self._known or not t.is_floating_point():
            return t
        return _STOP(t)


def _in_place(func: Callable) -> bool:
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or (name.startswith("__i") if name.endswith("__") else name.endswith("_"))


_CUTS = {torch.Tensor.detach, torch.detach, torch.Tensor.data.__get__}


def _tensors(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _mapped(tree, lambda t: found.append(t) or t)
    return found


def _mapped(tree: Any, change: Callable[[Tensor], Any]) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, change, tree)


@contextlib.contextmanager
def _no_fused_recurrence():
    """Recurrent layers in plain operations: the fused ones of oneDNN and cuDNN have no second derivative."""
    enabled, *_ = torch.backends.mkldnn.set_flags(False)
    try:
        with torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        torch.backends.mkldnn.set_flags(enabled)

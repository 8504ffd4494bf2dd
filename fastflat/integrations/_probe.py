# SPDX-License-Identifier: Apache-2.0
"""Checks an adapter against the module that it would replace, on copies of it."""

from __future__ import annotations

import copy
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastflat import _checks
from fastflat.integrations._adapter import Adapter
from fastflat.integrations._swap import swap

#: Sums over elements agree to this part of the sum of magnitudes: two orders of up to some thousand fp32 terms.
SUMS = 2.0**-14


class Outcome(NamedTuple):
    """What a probe call did."""

    results: list[Any]  # leaves of what it returned
    gradients: dict[str, Tensor | None]
    state: dict[str, Tensor]


def difference(module: nn.Module, adapter: Adapter) -> str | None:
    """In what module and adapter differ on the adapter's examples, in a few words; None if in nothing.

    Both work on copies in each of the adapter's modes, call after call; the random state stays as it is.
    """
    for mode, turn in adapter.modes(module).items():
        theirs, ours = _copied(module), _copied(module)
        try:
            for twin in (theirs, ours):
                turn(twin)
        except Exception as error:
            return f"it raised {line_of(error)} on the way to {mode} mode"
        swap(ours, adapter)
        reason = _run(module, theirs, ours, adapter, mode)
        if reason:
            return reason
    return None


def _run(module: nn.Module, theirs: nn.Module, ours: nn.Module, adapter: Adapter, mode: str) -> str | None:
    """The examples one after another on both copies."""
    count = 0
    for number, args in enumerate(adapter.examples(module), 1):
        count = number
        summed = adapter.sums(theirs)
        try:
            expected = outcome(theirs, args, number)
        except Exception as error:  # what a module of someone else's raises, no adapter can be held to
            return f"its own forward raised {line_of(error)} on probe {number}"
        try:
            found = outcome(ours, args, number)
        except Exception as error:
            return f"the adapter raised {line_of(error)} on probe {number}"
        reason = _compared(expected, found, summed)
        if reason:
            return f"{reason} on probe {number} in {mode} mode"
    return None if count else "the adapter has no examples to probe it with"


def _copied(module: nn.Module) -> nn.Module:
    """A copy without hooks, which belong to the program and not to the quantizer."""
    twin = copy.deepcopy(module)
    for part in twin.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks):
            hooks.clear()
    return twin


def outcome(module: nn.Module, args: tuple, seed: int) -> Outcome:
    """One call with its gradients, for a cotangent that depends on the seed."""
    args = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), args)
    first = next(t for t in pytree.tree_leaves(args) if isinstance(t, Tensor))
    first.requires_grad_()
    with torch.random.fork_rng(_devices(first)), warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        results = pytree.tree_leaves(module(*args))
    leaves = {"input": first, **{n: p for n, p in module.named_parameters() if p.requires_grad}}
    outputs = [y for y in results if isinstance(y, Tensor) and y.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(y.shape, generator=generator).to(y.device, y.dtype) for y in outputs]
    found = torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True) if outputs else ()
    gradients = dict(zip(leaves, found, strict=False)) or dict.fromkeys(leaves)
    attributes = [(n, t) for n, t in vars(module).items() if isinstance(t, Tensor)]  # state that no state_dict has
    held = (*module.named_parameters(), *module.named_buffers(), *attributes)
    state = {n: t.detach().clone() for n, t in held}
    return Outcome([y.detach() if isinstance(y, Tensor) else y for y in results], gradients, state)


def _compared(expected: Outcome, found: Outcome, sums: tuple[str, ...] | None) -> str | None:
    if len(expected.results) != len(found.results):
        return f"{len(found.results)} results in place of {len(expected.results)}"
    for number, (a, b) in enumerate(zip(expected.results, found.results, strict=True)):
        reason = _unlike(a, b)
        if reason:
            return f"{'the result' if number == 0 else f'result {number}'} {reason}"
    for name, a in expected.gradients.items():
        b = found.gradients.get(name)
        summed = name != "input" if sums is None else name in sums
        reason = _far(a, b, expected) if summed else _unlike(a, b)
        if reason:
            return f"the gradient of {name} {reason}"
    for name, a in expected.state.items():
        reason = _unlike(a, found.state.get(name))
        if reason:
            return f"{name} {reason} afterwards"
    return None


def _unlike(a: Any, b: Any) -> str | None:
    """How b differs from a; zeros of both signs are one number, and so are all NaN."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return None if a is b or (type(a) is type(b) and a == b) else f"is {_short(b)}, not {_short(a)}"
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"is {_short(b)}, not {_short(a)}"
    same = (a == b) | ((a != a) & (b != b))
    if bool(same.all()):
        return None
    return f"differs in {int((~same).sum())} of {same.numel()} values"


def _far(a: Tensor | None, b: Tensor | None, expected: Outcome) -> str | None:
    """As :func:`_unlike`, for sums over elements."""
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
        return _unlike(a, b)
    size = max(float(a.abs().max()) if a.numel() else 0.0, 1e-30)
    terms = max((y.numel() for y in expected.results if isinstance(y, Tensor)), default=1)
    unit = max(SUMS, 8 * torch.finfo(a.dtype).eps)
    allowed = unit * size * max(1.0, terms**0.5 / 16) + 1e-6 * (terms / max(a.numel(), 1)) ** 0.5
    excess = (a.double() - b.double()).abs()
    wrong = ~((excess <= allowed) | ((a != a) & (b != b)))
    return f"differs by {float(excess[wrong].max()):.2g}, allowed {allowed:.2g}" if bool(wrong.any()) else None


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return "nothing" if value is None else repr(value)[:40]


def line_of(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {_checks.first_line(error, 120)}" if str(error).strip() else type(error).__name__


def _devices(t: Tensor) -> list[torch.device]:
    return [t.device] if t.device.type == "cuda" else []

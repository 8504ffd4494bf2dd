# SPDX-License-Identifier: Apache-2.0
"""Perturbations of the weights that raise the loss most, taken back bit for bit."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import fnmatch
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastflat import _checks
from fastflat._ops import compute_dtype
from fastflat._spec import QuantSpec
from fastflat.evaluate import _runs

_NAME = "evaluate.weight_attack"


@dataclasses.dataclass(frozen=True)
class WeightAttack:
    """What a weight attack did.

    Attributes:
        eps, step: radius and length of a step.
        losses: mean loss over the data before each step, and after the last.
        parameters: names of what was moved.
    """

    eps: float
    step: float
    losses: tuple[float, ...]
    parameters: tuple[str, ...]

    def __str__(self) -> str:
        return f"loss {self.losses[0]:.4f} -> {self.losses[-1]:.4f} in {len(self.losses) - 1} steps, eps {self.eps:g}"


@contextlib.contextmanager
def weight_attack(
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    data: Iterable[tuple[Any, Any]],
    eps: float,
    steps: int = 1,
    *,
    step: float | None = None,
    params: str | Sequence[str] | None = None,
) -> Iterator[WeightAttack]:
    """Inside, the weights lie where the loss is high within ``|W - W0| <= eps`` of each element; afterwards they are W0
    in every bit, whatever was raised::

        with weight_attack(model, loss, data, eps=0.01):
            print(evaluate(model, data))

    Each step is ``W <- clamp(W + step sign(g), W0 - eps, W0 + eps)``, g being the gradient of the mean loss over all
    data. The model runs in the mode it is in; its buffers, gradients and the random state are as before, inside
    already. A step below half the spacing of 16-bit weights does not move them.

    Args:
        model: any module.
        loss: ``(output, target) -> scalar``, the mean over a batch's rows.
        data: batches (inputs, targets) that can be gone through ``steps + 1`` times.
        eps: largest change of an element.
        steps: how many.
        step: length of one; 2.5 eps / steps by default, at most eps.
        params: names or patterns; by default the parameters of two axes or more that are no scales of quantizers.

    Raises:
        TypeError, ValueError: an argument is not as above, a loss is not finite; the weights are then W0.

    Source: Tsai et al., NeurIPS 2021 (arXiv:2103.02200), for what it measures.
    """
    _runs.module(_NAME, model)
    _runs.positive_integer(_NAME, "steps", steps)
    for argument, value in (("eps", eps), ("step", 0.0 if step is None else step)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            _checks.fail(_NAME, argument, "be a number", type(value))
        if not 0 <= value < math.inf:
            _checks.fail(_NAME, argument, "be finite and at least 0", value)
    _runs.again(_NAME, data)
    chosen = _chosen(model, params)
    step = eps * min(1.0, 2.5 / steps) if step is None else step
    weights = list(chosen.values())
    before = [w.detach().clone() for w in weights]
    losses = []
    try:
        for _ in range(steps):
            mean, gradients = _mean_loss(model, loss, data, weights)
            losses.append(mean)
            with torch.no_grad():
                for w, w0, g in zip(weights, before, gradients, strict=True):
                    centre = w0.to(g.dtype)
                    w.copy_((w + step * g.sign()).clamp(centre - eps, centre + eps))
        losses.append(_mean_loss(model, loss, data, None)[0])
        yield WeightAttack(float(eps), float(step), tuple(losses), tuple(chosen))
    finally:
        with torch.no_grad():
            for w, w0 in zip(weights, before, strict=True):
                w.copy_(w0)


def _mean_loss(
    model: nn.Module, loss: Callable, data: Iterable, weights: list[nn.Parameter] | None
) -> tuple[float, list[Tensor]]:
    """The mean loss over all data and its gradients, batches weighing as many as their rows."""
    total, rows = 0.0, 0
    sums = None if weights is None else [torch.zeros_like(w, dtype=compute_dtype(w.dtype)) for w in weights]
    with _runs.undisturbed(model), torch.set_grad_enabled(weights is not None):
        for inputs, targets in _runs.pairs(_NAME, data):
            size = _rows(inputs)
            value = loss(_runs.called(model, inputs), targets)
            if not isinstance(value, Tensor) or value.numel() != 1:
                got = list(value.shape) if isinstance(value, Tensor) else type(value)
                _checks.fail(_NAME, "loss", "return a scalar", got)
            if sums is not None:
                found = torch.autograd.grad(value.sum(), weights, allow_unused=True)
                for s, g in zip(sums, found, strict=True):
                    if g is not None:
                        s.add_(g, alpha=size)
            total, rows = total + value.detach().double().sum() * size, rows + size
    if not rows:
        _checks.fail(_NAME, "data", "hold at least one example", "none")
    mean = float(total) / rows
    if not math.isfinite(mean):
        _checks.fail(_NAME, "loss", "be finite", mean)
    return mean, sums or []


def _chosen(model: nn.Module, params: str | Sequence[str] | None) -> dict[str, nn.Parameter]:
    named = dict(model.named_parameters())
    if params is None:
        scales = {
            id(p)
            for m in model.modules()
            if isinstance(getattr(m, "spec", None), QuantSpec)
            for p in m.parameters(recurse=False)
        }
        found = {n: p for n, p in named.items() if p.dim() >= 2 and p.is_floating_point() and id(p) not in scales}
        found = {n: p for n, p in found.items() if p.requires_grad}
        if not found:
            _checks.fail(_NAME, "model", "have weights of two axes or more that require a gradient", "none")
        return found
    picked: set[str] = set()
    for pattern in [params] if isinstance(params, str) else params:
        match = fnmatch.filter(named, pattern) if isinstance(pattern, str) else []
        if not match:
            close = difflib.get_close_matches(str(pattern), named, 3)
            hint = f"; close to it: {', '.join(close)}" if close else ""
            _checks.fail(_NAME, "params", "name parameters of the model", repr(pattern), hint)
        picked.update(match)
    if not picked:
        _checks.fail(_NAME, "params", "name at least one parameter", "none")
    for n in picked:
        if not named[n].requires_grad:
            _checks.fail(_NAME, "params", "require a gradient", f"{n}, which does not")
    return {n: p for n, p in named.items() if n in picked}


def _rows(inputs: Any) -> int:
    sized = [t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor) and t.dim()]
    if not sized:
        _checks.fail(_NAME, "data", "hold tensors with rows", "a batch without any")
    return len(sized[0])

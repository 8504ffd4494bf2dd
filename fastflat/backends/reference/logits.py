# SPDX-License-Identifier: Apache-2.0
"""The logits family in plain PyTorch: sums over a row in fp64, the rest in the compute type."""

from __future__ import annotations

import torch
from torch import Tensor

from fastflat._ops import compute_dtype
from fastflat.backends.reference import _elementary


def _value(t: Tensor) -> Tensor:
    """In the compute type."""
    return t.to(compute_dtype(t.dtype))


def _norm(z: Tensor) -> Tensor:
    """The largest logit of a row and the logarithm of the sum of exponentials below it, [..., 2]."""
    if z.shape[-1] == 0:
        return z.new_full((*z.shape[:-1], 2), float("-inf"))
    most = torch.where(z.isnan(), float("-inf"), z).amax(-1)
    total = _elementary.exp(z - most[..., None]).double().sum(-1).to(z.dtype)
    return torch.stack([most, _elementary.log(total)], -1)


def _log_probabilities(z: Tensor, norm: Tensor) -> Tensor:
    return (z - norm[..., :1]) - norm[..., 1:]


def _divergence(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    terms = torch.where(p == 0, torch.zeros_like(p), p * (log_p - log_q))
    return terms.double().sum(-1).to(p.dtype)


def _gradient_to_first(g: Tensor, p: Tensor, log_p: Tensor, log_q: Tensor, all_: Tensor) -> Tensor:
    return torch.where(p == 0, torch.zeros_like(p), g * (p * ((log_p - log_q) - all_)))


def _mixture(p: Tensor) -> Tensor:
    """Logarithm of the mean of the distributions, added up in their order."""
    total = p[0]
    for other in p[1:]:
        total = total + other
    return _elementary.log(total * (1.0 / len(p)))


def logits_divergence(z0: Tensor, z: Tensor, js: bool) -> tuple[Tensor, Tensor]:
    every = _value(torch.cat([z0[None], z]))
    norm = _norm(every)
    log_p = _log_probabilities(every, norm)
    if js:
        p = _elementary.exp(log_p)
        return _divergence(p, log_p, _mixture(p)), norm
    p0 = _elementary.exp(log_p[:1])
    return _divergence(p0, log_p[:1], log_p[1:]), norm


def logits_divergence_bwd(
    g: Tensor, z0: Tensor, z: Tensor, divergence: Tensor, norm: Tensor, js: bool
) -> tuple[Tensor, Tensor]:
    log_p = _log_probabilities(_value(torch.cat([z0[None], z])), norm)
    p, g, divergence = _elementary.exp(log_p), g[:, None], divergence[..., None]
    if js:
        every = _gradient_to_first(g, p, log_p, _mixture(p), divergence)
        return every[0].to(z.dtype, copy=True), every[1:].to(z.dtype, copy=True)
    gz0 = torch.zeros_like(p[0])
    for log_q, of_pair in zip(log_p[1:], divergence, strict=True):
        gz0 = gz0 + _gradient_to_first(g, p[0], log_p[0], log_q, of_pair)
    return gz0.to(z.dtype), (g * (p[1:] - p[0])).to(z.dtype)


def _labels(y: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Which labels are classes, and labels that can be used as indices."""
    known = (y >= 0) & (y < classes)
    return known, torch.where(known, y, 0)


def _balanced(z: Tensor, y: Tensor, mult: Tensor | None, add: Tensor | None, margin: Tensor | None, s: float):
    value, factor = _value(z), torch.ones((), dtype=_value(z).dtype, device=z.device) * s
    value = value if mult is None else mult * value
    value = value if add is None else value + add
    if margin is not None:
        own = torch.arange(z.shape[1], device=z.device) == y[:, None]
        value = value - torch.where(own, margin, torch.zeros_like(margin))
    return factor * value, factor


def _at(t: Tensor, y: Tensor, known: Tensor) -> Tensor:
    """Of each row the element of its label; NaN where that is no class."""
    if t.shape[1] == 0:
        return t.new_full(y.shape, float("nan"))
    return torch.where(known, t.gather(1, y[:, None]).squeeze(1), float("nan"))


def logits_loss(
    z: Tensor,
    y: Tensor,
    mult: Tensor | None,
    add: Tensor | None,
    margin: Tensor | None,
    class_weight: Tensor | None,
    s: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    known, index = _labels(y, z.shape[1])
    a, _ = _balanced(z, y, mult, add, margin, s)
    norm = _norm(a)
    weight = torch.ones_like(norm[:, 0])
    if class_weight is not None and z.shape[1]:
        weight = class_weight[index]
    weight = torch.where(known, weight, float("nan"))
    loss = weight * (norm[:, 1] - (_at(a, index, known) - norm[:, 0]))
    ignored = y == ignore_index
    return loss.masked_fill(ignored, 0.0), weight.masked_fill(ignored, 0.0), norm


def logits_loss_bwd(
    g: Tensor,
    z: Tensor,
    y: Tensor,
    mult: Tensor | None,
    add: Tensor | None,
    margin: Tensor | None,
    norm: Tensor,
    s: float,
) -> Tensor:
    a, factor = _balanced(z, y, mult, add, margin, s)
    p = _elementary.exp(_log_probabilities(a, norm))
    own = (torch.arange(z.shape[1], device=z.device) == y[:, None]).to(p.dtype)
    by_class = g[:, None] * (factor if mult is None else factor * mult)
    return torch.where(g[:, None] == 0, torch.zeros_like(p), by_class * (p - own)).to(z.dtype)


def logits_stats(z: Tensor, y: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    known, index = _labels(y, z.shape[1])
    value = _value(z)
    norm = _norm(value)
    most, log_sum = norm.unbind(-1)
    of_label = _at(value, index, known)
    own = torch.arange(z.shape[1], device=z.device) == y[:, None]
    others = torch.where(own | value.isnan(), float("-inf"), value)
    other = others.amax(1) if z.shape[1] else torch.full_like(most, float("-inf"))
    p = _elementary.exp((of_label - most) - log_sum)
    largest = _elementary.exp(-log_sum)
    gap = _elementary.exp((other - most) - log_sum) - p
    stats = torch.stack([log_sum - (of_label - most), p, gap, 2.0 * (largest * (1.0 - largest))])
    ignored = (y == ignore_index)[None] & (torch.arange(4, device=z.device) < 3)[:, None]
    return stats.masked_fill(ignored, 0.0), norm


def logits_scan(a: Tensor, b: Tensor, y: Tensor, t: Tensor, ignore_index: int) -> Tensor:
    known, index = _labels(y, a.shape[1])
    kept = y != ignore_index
    a, b = _value(a), _value(b)
    losses = []
    for step in t:
        moved = a - step * b
        most, log_sum = _norm(moved).unbind(-1)
        loss = (log_sum - (_at(moved, index, known) - most)).double()
        losses.append(torch.where(kept, loss, 0.0).sum() / kept.sum())
    return torch.stack(losses).to(t.dtype) if losses else torch.empty_like(t)

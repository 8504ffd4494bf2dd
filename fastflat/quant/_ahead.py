# SPDX-License-Identifier: Apache-2.0
"""All weights of a model quantized by one call before its forward: what ``prepare(fuse_weights=True)`` installs.

A hook before the root's forward computes them and lays them ready; each layer takes its own and computes for itself
what it does not find: in a call of a sub-module alone, for a quantizer that is off or computed in another way, after a
change of the weight since, or under another autocast or gradient mode than that of the root. Hooks keep no state, and
what lies ready belongs to the running forward call alone: copies, pickles and replicas of the model are ordinary.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastflat.functional import fake_quantize_list
from fastflat.quant.quantizer import Quantizer


class _Ready(NamedTuple):
    """A quantized weight and what it was computed from."""

    y: Tensor
    tensors: tuple[Tensor | None, ...]  # weight, scale, zero-point
    versions: tuple[int | None, ...]
    spec: Any
    mode: tuple[bool, bool]


class _Store(dict[tuple[int, str], _Ready]):
    """What lies ready in the forward call that runs, by layer and name of the weight; `depth`: roots that run."""

    depth = 1


_store: ContextVar[_Store | None] = ContextVar("fastflat_weights_ahead", default=None)


def install(model: nn.Module) -> None:
    """Compute the weights of `model` ahead of each of its forward calls."""
    if _before not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_before)
        model.register_forward_hook(_after, always_call=True)


def take(layer: nn.Module, name: str, weight: Tensor, quantizer: Quantizer, dtype: torch.dtype | None) -> Tensor | None:
    """The quantized weight that lies ready for a layer, or None."""
    if torch.compiler.is_compiling():
        return None
    store = _store.get()
    if not store:
        return None
    ready = store.get((id(layer), name))
    if ready is None:
        return None
    tensors = (weight, quantizer.scale, quantizer.zero_point)
    if (
        any(a is not b for a, b in zip(tensors, ready.tensors, strict=True))
        or _versions(tensors) != ready.versions
        or (dtype or weight.dtype) != ready.y.dtype
        or _spec(quantizer) is not ready.spec
        or not _usual(quantizer)
        or _mode() != ready.mode
    ):
        return None
    if ready.y.requires_grad:
        # A layer that is called again has a gradient of its own from each call: their sum is rounded as without us.
        del store[id(layer), name]
    return ready.y


def _before(model: nn.Module, _: Any) -> None:
    if torch.compiler.is_compiling():
        return
    running = _store.get()
    if running is not None:  # a root within a root: the outer one has done the work, or another model computes its own
        running.depth += 1
        return
    groups: dict[tuple, list] = {}
    for layer in model.modules():
        weights = getattr(layer, "weight_quantizers", None)
        for name, quantizer in weights().items() if weights is not None else ():
            weight = getattr(layer, name)
            spec = _spec(quantizer)
            if _usual(quantizer) and not spec.general and not weight.is_inference():
                key = (weight.device, _cast(layer, weight))
                groups.setdefault(key, []).append((layer, name, weight, quantizer, spec))
    store, mode = _Store(), _mode()
    for (_, dtype), members in groups.items():
        layers, names, weights, quantizers, specs = zip(*members, strict=True)
        scales, zeros = [q.scale for q in quantizers], [q.zero_point for q in quantizers]
        ys = fake_quantize_list(
            weights, scales, specs, zeros if any(z is not None for z in zeros) else None, dtype=dtype
        )
        for layer, name, *tensors, spec, y in zip(layers, names, weights, scales, zeros, specs, ys, strict=True):
            store[id(layer), name] = _Ready(y, tuple(tensors), _versions(tensors), spec, mode)
    _store.set(store)


def _after(model: nn.Module, _: Any, __: Any) -> None:
    running = _store.get()
    if running is None:
        return
    running.depth -= 1
    if not running.depth:
        _store.set(None)


def _cast(layer: nn.Module, weight: Tensor) -> torch.dtype | None:
    """The type to which the layer will ask its weight to be cast."""
    kind = weight.device.type
    if layer.casts_weight and weight.dtype == torch.float32 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def _usual(quantizer: Quantizer) -> bool:
    """Whether a call of the quantizer is a call of fake_quantize and nothing else."""
    kind = type(quantizer)
    return (
        kind.forward is Quantizer.forward
        and kind.quantize is Quantizer.quantize
        and quantizer.enabled
        and quantizer.calibrated
        and not (quantizer._forward_hooks or quantizer._forward_pre_hooks)
        and not (quantizer._backward_hooks or quantizer._backward_pre_hooks)
    )


def _spec(quantizer: Quantizer):
    return quantizer.spec if quantizer.training else quantizer._evaluation


def _versions(tensors) -> tuple[int | None, ...]:
    return tuple(None if t is None or t.is_inference() else t._version for t in tensors)


def _mode() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()

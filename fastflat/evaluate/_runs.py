# SPDX-License-Identifier: Apache-2.0
"""Running a model so that nothing of it changes, and the batches that it runs on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastflat import _checks


@contextlib.contextmanager
def undisturbed(model: nn.Module, *, evaluating: bool = False) -> Iterator[None]:
    """Inside, the model works on copies of its buffers, and its random draws are undone on leaving; so are its modes,
    which are those of evaluation inside if asked. The buffers themselves are never written."""
    copies: dict[int, Tensor] = {}
    held = [(module, dict(module._buffers)) for module in model.modules()]
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.device.type == "cuda"}
    with torch.random.fork_rng(sorted(devices, key=str)), _modes_kept(model):
        try:
            for module, buffers in held:
                for name, buffer in buffers.items():
                    if buffer is not None:
                        module._buffers[name] = copies.setdefault(id(buffer), buffer.detach().clone())
            if evaluating:
                model.eval()
            yield
        finally:
            for module, buffers in held:
                module._buffers.update(buffers)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode; on leaving each of its modules has its own mode again."""
    with _modes_kept(model):
        model.eval()
        yield


@contextlib.contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def module(name: str, model: Any) -> None:
    """Refuse what is no model."""
    if not isinstance(model, nn.Module):
        _checks.fail(name, "model", "be a torch.nn.Module", type(model))


def pairs(name: str, data: Any) -> Iterator[tuple[Any, Any]]:
    """(inputs, targets) of each batch; data without any are refused."""
    if isinstance(data, Tensor) or not isinstance(data, Iterable):
        _checks.fail(name, "data", "be an iterable of (inputs, targets), such as a list or a DataLoader", type(data))
    count = 0
    for pair in data:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            _checks.fail(name, "data", "yield pairs (inputs, targets)", type(pair))
        count += 1
        yield pair[0], pair[1]
    if not count:
        _checks.fail(name, "data", "hold at least one batch", "none")


def again(name: str, data: Any) -> None:
    """Refuse data that can be gone through only once."""
    if isinstance(data, Iterator):
        _checks.fail(name, "data", "be an iterable that can be gone through again", type(data), "; pass list(data)")


def called(model: nn.Module, inputs: Any) -> Any:
    """The model's output: a tuple or list is its arguments, a dict its keywords."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def logits_and_labels(name: str, logits: Any, labels: Any) -> tuple[Tensor, Tensor]:
    """Refuse what is no ``[N, C]`` of floats and ``[N]`` of integers; labels on the device of the logits."""
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.dim() != 2:
        got = f"{logits.dtype} {list(logits.shape)}" if isinstance(logits, Tensor) else type(logits)
        _checks.fail(name, "logits", "be a floating tensor [N, C]", got)
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.shape != logits.shape[:1]:
        got = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, Tensor) else type(labels)
        _checks.fail(name, "labels", f"be a tensor of {len(logits)} integers", got)
    return logits, labels.to(logits.device, torch.int64)


def positive_integer(name: str, argument: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        _checks.fail(name, argument, "be an integer of at least 1", repr(value))

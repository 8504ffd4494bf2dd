# SPDX-License-Identifier: Apache-2.0
"""Post-training quantization: what a network is worth when its weights are rounded after training."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastflat._spec import QuantSpec
from fastflat.functional import fake_quantize_dynamic

#: Bits of the weights in the order of the tables.
BITS = (8, 6, 4, 3, 2)


@torch.no_grad()
def rounded_weights(model: nn.Module, bits: int, *, axis: int | None = 0) -> nn.Module:
    """A copy of a model whose weights of two axes or more lie on symmetric grids of their largest magnitude.

    Args:
        model: stays as it is. Quantized activations stay as they were trained; of layers with weight quantizers it is
            the float weights that are rounded, and their quantizers are off.
        bits: width of the grid from ``-2^(bits-1)`` to ``2^(bits-1) - 1``, 2 to 16.
        axis: one grid for each index along it; ``None``: one for each weight.
    """
    model = copy.deepcopy(model)
    for layer in model.modules():
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.dim() < 2:
            continue
        weight.copy_(fake_quantize_dynamic(weight, spec=QuantSpec(bits=bits, axis=axis, mask="none"))[0])
        if hasattr(layer, "weight_quantizers"):
            for quantizer in layer.weight_quantizers().values():
                quantizer.enabled = False
    return model


@torch.no_grad()
def accuracy(model: nn.Module, data: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Share of right answers (argmax over the last axis) in evaluation mode; the model's mode stays.

    Args:
        data: batches of inputs and class numbers.
    """
    training = model.training
    model.eval()
    try:
        right, count = 0, 0
        for x, y in data:
            right = right + (model(x).argmax(-1) == y).sum()
            count += y.numel()
    finally:
        model.train(training)
    if not count:
        raise ValueError("evaluate.accuracy: data must hold examples, got none")
    return float(right) / count


def post_training_accuracy(
    model: nn.Module, data: Iterable[tuple[Tensor, Tensor]], bits: Iterable[int] = BITS, *, axis: int | None = 0
) -> dict[int, float]:
    """Accuracy by bits of the weights, with nothing trained after the rounding; see :func:`rounded_weights`.

    Args:
        model: in floats or of :func:`fastflat.prepare`; stays as it is.
        data: batches of inputs and class numbers; iterated once for each width.
        bits: the widths.
    """
    return {n: accuracy(rounded_weights(model, n, axis=axis), data) for n in bits}

# SPDX-License-Identifier: Apache-2.0
"""What a trained network is worth when its weights are quantized afterwards, and what its averaged weights are."""

from __future__ import annotations

import copy

import torch
from torch import nn

from fastflat import QuantSpec, fake_quantize_dynamic
from fastflat.cli._trainer import Trainer

#: Bits of the weights in the order of the tables.
BITS = (8, 6, 4, 3, 2)


def post_training(trainer: Trainer) -> dict[str, float]:
    """Accuracy on the test split by bits, with every weight of two axes or more rounded to the grid of its largest
    magnitude, one for each output channel, and nothing trained afterwards. Quantized activations stay as they were
    trained; of quantized weights it is the float ones that are rounded."""
    found = {}
    for bits in BITS:
        found[str(bits)] = trainer.accuracy_of(_rounded(trainer.model, bits))
    return found


@torch.no_grad()
def _rounded(model: nn.Module, bits: int) -> nn.Module:
    model = copy.deepcopy(model)
    for layer in model.modules():
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.dim() < 2:
            continue
        weight.copy_(fake_quantize_dynamic(weight, spec=QuantSpec(bits=bits, axis=0, mask="none"))[0])
        if hasattr(layer, "weight_quantizers"):
            for quantizer in layer.weight_quantizers().values():
                quantizer.enabled = False
    return model

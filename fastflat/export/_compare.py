# SPDX-License-Identifier: Apache-2.0
"""An exported model beside the one it came from."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from fastflat.export._loaded import Loaded
from fastflat.quant import Quantizer, export_codes
from fastflat.quant._initial import spread


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How far an exported model is from its origin.

    Attributes:
        codes_equal: whether all codes, scales and zero-points of weights are.
        output: largest difference of an element of the outputs.
        code_steps: largest difference of an activation's code, in codes; None where the target hides them.
        code_share: share of the activations' codes that differ.
    """

    codes_equal: bool
    output: float
    code_steps: int | None = None
    code_share: float | None = None


@torch.no_grad()
def compare(model: nn.Module, loaded: Loaded, *inputs: Tensor) -> Comparison:
    """Compare a loaded export with the prepared model it came from, on some inputs, in evaluation mode.

    A sum in another order may put an activation across the border between two codes: that is one code there, and what
    follows from it.
    """
    codes = export_codes(model) if loaded.codes else {}
    equal = codes.keys() == loaded.codes.keys() and all(_equal(codes[n], loaded.codes[n]) for n in codes)
    values: dict[str, Tensor] = {}
    named = dict(model.named_modules())
    watched = {name: named[name] for name in loaded.about["activations"]}
    hooks = [m.register_forward_hook(_keep(values, name)) for name, m in watched.items()] if loaded.values else []
    training = model.training
    try:
        ours = model.eval()(*inputs)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    output = max((float((a - b).abs().max()) for a, b in zip(_flat(ours), _flat(loaded(*inputs)), strict=True)))
    if not hooks:
        return Comparison(equal, output)
    theirs, steps, differing, count = loaded.values(*inputs), 0, 0, 0
    for name, y in values.items():
        apart = _steps(theirs[name] - y, watched[name])
        steps, differing, count = max(steps, int(apart.max())), differing + int((apart > 0).sum()), count + y.numel()
    return Comparison(equal, output, steps, differing / max(count, 1))


def _keep(values: dict[str, Tensor], name: str):
    def hook(_, __, y: Tensor) -> None:
        values[name] = y

    return hook


def _steps(difference: Tensor, quantizer: Quantizer) -> Tensor:
    step = spread(quantizer.step.detach().clamp(min=quantizer.spec.eps), difference, quantizer.spec)
    return (difference / step).abs().round()


def _equal(a: Any, b: Any) -> bool:
    pairs = [(getattr(a, part), getattr(b, part)) for part in ("codes", "scale", "zero_point")]
    if not all(torch.equal(x, y) if x is not None and y is not None else x is y for x, y in pairs):
        return False
    return a.spec == b.spec


def _flat(outputs: Any) -> list[Tensor]:
    found, _ = torch.utils._pytree.tree_flatten(outputs)
    return [x for x in found if isinstance(x, Tensor)]

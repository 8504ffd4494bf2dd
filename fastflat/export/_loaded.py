# SPDX-License-Identifier: Apache-2.0
"""What a loader gives back, whatever the file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastflat import _checks
from fastflat._spec import QuantSpec
from fastflat.export._form import bits_of
from fastflat.quant import LayerCodes


@dataclasses.dataclass(frozen=True)
class Loaded:
    """An exported model.

    Attributes:
        path: its file.
        about: the description in it: the specs of weights and activations by name.
        codes: the quantized weights as integers, by the parameters' names, for :func:`fastflat.quant.load_codes`.
        run: what computes a call; None for files of tensors that were loaded without a model.
        model: the module that computes, where there is one.
        tensors: of a file of tensors, those that are no codes.
        values: ``(inputs) -> {name: tensor}``, the values after each activation's quantizer; None where hidden.
    """

    path: Path
    about: dict[str, Any]
    codes: dict[str, LayerCodes]
    run: Callable[..., Any] | None = None
    model: nn.Module | None = None
    tensors: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    values: Callable[..., dict[str, Tensor]] | None = None

    def __call__(self, *inputs: Tensor) -> Any:
        """The output for some inputs; of gradients it knows nothing."""
        if self.run is None:
            hint = "; load(path, model) puts them into a prepared one"
            _checks.fail("export.load", str(self.path), "have a model to run", "tensors alone", hint)
        return self.run(*inputs)

    @property
    def bits(self) -> dict[str, dict[str, int]]:
        """Bits by layer, as ``prepare(bits=...)`` takes them."""
        return bits_of(self.about)


def codes_of(
    about: dict[str, Any], tensors: Callable[[str], tuple[Tensor, Tensor, Tensor | None]]
) -> dict[str, LayerCodes]:
    """Codes of the weights that a description names, from a function of the name that gives codes, scale and
    zero-point in any integer or floating types."""
    found = {}
    for name, each in about["weights"].items():
        spec = QuantSpec.from_dict(each["spec"])
        codes, scale, zero_point = tensors(name)
        found[name] = LayerCodes(
            codes.to(_storage(spec)),
            scale,
            None if zero_point is None or spec.symmetric else zero_point.to(scale.dtype),
            each["spec"],
            each["dtype"],
        )
    return found


def _storage(spec: QuantSpec) -> torch.dtype:
    kinds = (torch.int8, torch.uint8, torch.int16, torch.uint16)
    return next(t for t in kinds if torch.iinfo(t).min <= spec.qmin and spec.qmax <= torch.iinfo(t).max)

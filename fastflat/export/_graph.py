# SPDX-License-Identifier: Apache-2.0
"""A model as a graph of PyTorch's own operators, by torch.export."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastflat import _checks
from fastflat._spec import QuantSpec
from fastflat.export._form import Grid
from fastflat.quant import LayerCodes
from fastflat.quant._initial import spread


class WeightCodes(nn.Module):
    """Stands for the quantizer of a weight: ``w = (codes - z) s`` of the layer's codes."""

    def __init__(self, codes: LayerCodes) -> None:
        super().__init__()
        self.spec = QuantSpec.from_dict(codes.spec)
        self.register_buffer("scale", codes.scale.clamp(min=self.spec.eps))
        zero_point = codes.zero_point
        if zero_point is not None and self.spec.zero not in ("float", "outside_float"):
            zero_point = zero_point.round().clamp(self.spec.qmin, self.spec.qmax)
        self.register_buffer("zero_point", zero_point)

    def forward(self, codes: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        q = codes.to(self.scale.dtype)
        if self.zero_point is not None:
            q = q - spread(self.zero_point, codes, self.spec)
        return q * spread(self.scale, codes, self.spec)


class ActivationGrid(nn.Module):
    """Stands for the quantizer of an activation: the rule of its spec in PyTorch's operators."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.spec = grid.spec
        self.register_buffer("scale", grid.scale)
        self.register_buffer("zero_point", grid.zero_point)

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        spec, s = self.spec, spread(self.scale, x, self.spec)
        x = x.relu() if spec.rectified else x
        u = x * s.reciprocal() if spec.arithmetic == "reciprocal" else x / s
        if self.zero_point is None:
            return u.round().clamp(spec.qmin, spec.qmax) * s
        z = spread(self.zero_point, x, spec)
        r = (u + z).round() if spec.zero in ("inside", "float") else u.round() + z
        return (r.clamp(spec.qmin, spec.qmax) - z) * s


def examples(inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Example inputs as a tuple on the CPU, with at least two rows: a batch of one would become a constant."""
    given = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs) if isinstance(inputs, Sequence) else inputs
    if not isinstance(given, tuple) or not given or not all(isinstance(x, Tensor) for x in given):
        _checks.fail("export", "inputs", "be an example input of the model, a tensor or a tuple of them", type(inputs))
    return tuple(x.detach().cpu() for x in given)


def trace(model: nn.Module, inputs: Sequence[Tensor], dynamic_batch: bool) -> torch.export.ExportedProgram:
    """The graph of a model that was made ready. Of the inputs only shapes and types enter it.

    Raises:
        ValueError: torch.export cannot trace the model, or an operator of fastflat would remain in the graph.
    """
    if dynamic_batch:
        # A batch of one row would become a constant of the graph.
        inputs = [x.expand(2, *x.shape[1:]) if x.dim() and x.shape[0] == 1 else x for x in inputs]
    blank = tuple(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in inputs)
    batch = torch.export.Dim("batch")
    shapes = torch.export.ShapesCollection()
    for x in blank:
        if dynamic_batch and x.dim():
            shapes[x] = {0: batch}
    try:
        with torch.no_grad(), quietly():
            program = torch.export.export(model, blank, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch.export raises many kinds
        hint = "; dynamic_batch=False traces one batch size" if dynamic_batch else ""
        _checks.fail("export", "model", "be traced by torch.export", _checks.first_line(error), hint)
    for node in program.graph.nodes:
        for note in ("stack_trace", "source_fn_stack"):  # paths of this machine
            node.meta.pop(note, None)
        if node.op == "call_function" and getattr(node.target, "namespace", None) == "fastflat":
            stack = list(node.meta.get("nn_module_stack", {}).values())
            where = stack[-1][0] if stack and stack[-1][0] else "the model"
            _checks.fail(f"export({where})", "layer", "have a form in integer codes", str(node.target))
    return program


class quietly(warnings.catch_warnings):
    """Other libraries' warnings and log lines are kept out of the caller's output."""

    def __enter__(self):
        entered = super().__enter__()
        warnings.simplefilter("ignore")
        self._level = logging.root.manager.disable
        logging.disable(logging.WARNING)
        return entered

    def __exit__(self, *details) -> None:
        logging.disable(self._level)
        super().__exit__(*details)

# SPDX-License-Identifier: Apache-2.0
"""A whole training step: what quantizers add to it, compared with Functions that do nothing in the same places."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

import fastflat
from fastflat import QuantSpec
from fastflat.quant import Quantizer
from fastflat.quant.eager import BuiltinQuantizer, EagerQuantizer

from . import measure
from .measure import Effort
from .peers.floor import mul
from .peers.ours import Identity

_mul = mul(None)


class _View(Function):
    """The identity without a pass over memory: the cost of an autograd Function alone."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gy: Tensor) -> Tensor:
        return gy


def _quantizer(function: Callable[[Tensor], Tensor]) -> type[Quantizer]:
    class Replaced(Quantizer):
        def quantize(self, x: Tensor, dtype: torch.dtype | None) -> Tensor:
            return function(x)

    return Replaced


#: What stands in the places of the quantizers; None leaves the model as it is.
QUANTIZERS: dict[str, type[Quantizer] | None] = {
    "fp32": None,
    "view": _quantizer(_View.apply),
    "identity": _quantizer(Identity.apply),
    "mul": _quantizer(lambda x: _mul(x, None)),
    "fastflat": Quantizer,
    "eager": EagerQuantizer,
    "builtin": BuiltinQuantizer,
}


def steps(
    model: nn.Module, image: tuple[int, int, int], batch: int, bits: int, skip: Sequence[str], names: Sequence[str]
) -> dict[str, Callable[[], None]]:
    """For each name a call that does one step of SGD on random images: the same weights, data and order everywhere.

    Args:
        model: a network for 10 classes; copied for each.
        image: channels, height, width.
        batch: images in a step.
        bits: of weights (per channel) and of activations.
        skip: layers without quantizers.
        names: of :data:`QUANTIZERS`.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.rand((batch, *image), generator=generator)
    target = torch.randint(10, (batch,), generator=generator)
    return {name: _step(_prepared(model, QUANTIZERS[name], bits, skip, x), x, target) for name in names}


def _prepared(model: nn.Module, quantizer: type[Quantizer] | None, bits: int, skip: Sequence[str], x: Tensor):
    model = copy.deepcopy(model).train()
    if quantizer is None:
        return model
    weights, activations = QuantSpec.lsq(bits=bits, axis=0), QuantSpec.lsq(bits=bits, signed=False)
    model = fastflat.prepare(model, weights=weights, activations=activations, skip=tuple(skip), quantizer=quantizer)
    fastflat.calibrate(model, [x])
    return model.train()


def _step(model: nn.Module, x: Tensor, target: Tensor) -> Callable[[], None]:
    # A rate this small keeps every model where it began, however often it is timed.
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), target).backward()
        optimizer.step()

    return step


def rows(calls: dict[str, Callable[[], None]], threads: int, effort: Effort) -> list[dict[str, Any]]:
    """One row per call: ``overhead``, the step's time over fp32's of the same round less 1, and ``of_identity``, that
    overhead in units of identity's."""
    with measure.threads(threads):
        timings = measure.interleaved(calls, effort)
    base, identity = timings.get("fp32"), timings.get("identity")
    found = []
    for name, timing in timings.items():
        over = None if base is None or name == "fp32" else timing.over(base) - 1
        share = None if over is None or identity is None else over / (identity.over(base) - 1)
        found.append(
            {
                "peer": name,
                "threads": threads,
                "seconds": timing.median,
                "q1": timing.q1,
                "q3": timing.q3,
                "best": timing.best,
                "rounds": timing.rounds,
                "calls": timing.calls,
                "overhead": over,
                "of_identity": share,
            }
        )
    return found

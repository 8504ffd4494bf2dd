# SPDX-License-Identifier: Apache-2.0
"""Who computes a case. Each peer is a function from the case's data to a forward function of ``(x, scale)``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..cases import Data
from ..cases.fake_quantize_list import ListData
from ..cases.sharpness import StepData
from . import (
    bitplanes,
    builtin,
    compiled,
    compressors,
    eager,
    floor,
    inputs,
    libraries,
    lists,
    logits,
    ours,
    products,
    row_tangents,
    steps,
    tangents,
    vectors,
    weight_norms,
)

Forward = Callable[[Tensor, Tensor | None], Tensor]


class Unsupported(Exception):
    """The peer has no form of this case; the text says what it lacks."""


#: By op family: name in reports -> maker. The floor comes first: other columns are relative to it.
PEERS: dict[str, dict[str, Callable[[Data], Forward]]] = {
    "fake_quantize": {
        "mul": floor.mul,
        "fastflat": ours.fake_quantize,
        "eager": eager.lsq,
        "compile": compiled.lsq,
        "builtin": builtin.learnable,
        "builtin-fixed": builtin.fixed,
        "torchao": libraries.torchao,
        "brevitas": libraries.brevitas,
    },
    "fake_quantize_list": {"mul": lists.mul, "fastflat": lists.fused, "each": lists.each, "eager": lists.composed},
    "general_quantize": {
        "mul": floor.mul,
        "fastflat": ours.fake_quantize,
        "eager": eager.lsq,
        "compile": compiled.lsq,
    },
    "mixquant": {
        "mul": floor.mul,
        "fastflat": ours.mixquant,
        "one-quantizer": ours.one_quantizer,
        "composed": ours.composed_mixquant,
        "eager": eager.mixquant,
    },
    "bitplane": {"fastflat": bitplanes.fused, "eager": bitplanes.eager, "compile": bitplanes.compiled},
    "binarize": {"mul": floor.mul, "fastflat": ours.binarize, "eager": eager.binarize, "compile": compiled.binarize},
    "liq": {"mul": floor.mul, "fastflat": ours.liq, "eager": eager.liq, "compile": compiled.liq},
    "sharpness": {
        "fastflat": steps.backup,
        "fastflat-swap": steps.swap,
        "stock": steps.stock,
        "add-sub": steps.add_sub,
        "loop": steps.loop,
        "pytorch-optimizer": steps.pytorch_optimizer,
        "passes": steps.passes,
    },
    "descent": {"fastflat": steps.base, "torch-fused": steps.torch_fused, "torch": steps.torch_plain},
    "curvature": {
        "fastflat": products.fused,
        "fastflat-bf16": products.fused_bf16,
        "double-backward": products.double_backward,
        "pyhessian": products.pyhessian,
        "curvlinops": products.curvlinops,
        "eigenthings": products.eigenthings,
        "func-vmap": products.func_vmap,
        "func-loop": products.func_loop,
        "linearize": products.func_linearize,
        "compile": products.func_compiled,
        "finite-difference": products.finite_difference,
    },
    "inputs": {"fastflat": inputs.ours, "eager": inputs.eager},
    "weight_norms": {"fastflat": weight_norms.ours, "eager": weight_norms.eager},
    "compressors": {"fastflat": compressors.ours, "eager": compressors.eager},
    "logits": {"fastflat": logits.ours, "eager": logits.eager},
    "tangents": {"fastflat": tangents.ours, "eager": tangents.eager},
    "vectors": {"fastflat": vectors.ours, "matrices": vectors.matrices, "loop": vectors.loop},
    "row_tangents": {"fastflat": row_tangents.ours, "stock": row_tangents.stock},
    "identity": {"mul": floor.mul, "fastflat": ours.identity, "clone": floor.clone},
}

#: Traffic of the floors, in copies of the data: one read and one write a pass.
FLOORS = ("mul", "clone")

#: Peers whose forward function takes all that differs among copies of the data by its arguments.
_OF_ARGUMENTS = ("compile",)


def prepare(peer: str, data: Data) -> Callable[[], None]:
    """A call that does the case's passes once and keeps nothing.

    Raises:
        Unsupported: the peer cannot compute this case.
    """
    return prepare_all(peer, [data])[0]


def prepare_all(peer: str, copies: Sequence[Data]) -> list[Callable[[], None]]:
    """The same call on each of several copies of the data. What is compiled is compiled once for all.

    Raises:
        Unsupported: the peer cannot compute this case.
    """
    make = PEERS[copies[0].case.family][peer]
    shared = None
    try:
        calls = []
        for data in copies:
            if shared is None or peer not in _OF_ARGUMENTS:
                shared = make(data)
            calls.append(shared if isinstance(data, StepData) else _call(shared, data))
            calls[-1]()
    except Exception as error:  # whatever a peer raises is its own: the other rows must not be lost
        if peer == "fastflat":
            raise
        raise Unsupported(f"{type(error).__name__}: {first_line(error)}") from None
    return calls


def first_line(error: Exception) -> str:
    """What an error says, on one line."""
    return (str(error).strip().splitlines() or ["no reason given"])[0][:120]


def _call(forward: Forward, data: Data) -> Callable[[], None]:
    if isinstance(data, ListData):
        return _call_of_list(forward, data)
    x, scale, gy = data.x, data.scale, data.gy
    if data.case.passes == "forward":

        def call() -> None:
            with torch.no_grad():
                forward(x, scale)

        return call
    inputs = (x,) if scale is None or not _uses_scale(forward, data) else (x, scale)

    def call() -> None:
        torch.autograd.grad(forward(x, scale), inputs, gy)

    return call


def _call_of_list(forward: Callable, data: ListData) -> Callable[[], None]:
    """The same for lists, whose leaves receive their gradients and lose them again, as in a training step."""
    leaves = [*data.xs, *data.scales]

    def call() -> None:
        if data.case.passes == "forward":
            with torch.no_grad():
                forward(data.xs, data.scales)
            return
        torch.autograd.backward(forward(data.xs, data.scales), data.gys)
        for leaf in leaves:
            leaf.grad = None

    return call


def _uses_scale(forward: Forward, data: Data) -> bool:
    """Whether the scale gets a gradient from this peer."""
    y = forward(data.x, data.scale)
    return torch.autograd.grad(y, data.scale, data.gy, allow_unused=True)[0] is not None

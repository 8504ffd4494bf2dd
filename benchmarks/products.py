# SPDX-License-Identifier: Apache-2.0
"""Measures products with curvature matrices, peer by peer, beside one gradient of the same network and batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import measure
from .measure import Effort
from .peers import PEERS, Unsupported, first_line, products
from .product_cases import ProductCase, ProductData

_GRADIENT = "gradient"


def exact(data: ProductData) -> Tensor:
    """The products in fp64: for the Hessian by double backward, for Gauss-Newton by torch.func."""
    wide = ProductData(
        data.case, copy.deepcopy(data.model).double(), data.x.double() if data.x.is_floating_point() else data.x,
        data.y, data.v.double(),
    )  # fmt: skip
    make = products.func_vmap if data.case.mode == "ggn" else products.double_backward
    return make(wide)()


def prepared(peer: str, data: ProductData) -> tuple[Callable[[], Tensor], Tensor]:
    """A call of the peer, and what it gave.

    Raises:
        Unsupported: the peer cannot compute this case.
    """
    try:
        call = PEERS["curvature"][peer](data)
        return call, call().detach()
    except Exception as error:  # whatever a peer raises is its own: the other rows must not be lost
        if peer == "fastflat":
            raise
        raise Unsupported(f"{type(error).__name__}: {first_line(error)}") from None


def rows(
    case: ProductCase, peers: Sequence[str], threads: int, effort: Effort, device: torch.device
) -> list[dict[str, Any]]:
    """One row per peer.

    A row holds the median ``seconds`` of a call with quartiles ``q1``, ``q3`` and ``best`` over ``rounds``;
    ``gradient_seconds``, and ``gradients``, the seconds of one vector in those; ``error``, relative to the products in
    fp64 in the 2-norm (of a quantized network values that round otherwise in fp64 are part of it); ``peak_bytes``. A
    peer without a form of the case has its reason in ``unsupported``.
    """
    named = {
        "family": "curvature", "threads": threads, "mode": case.mode, "network": case.network,
        "quantized": case.quantized, "k": case.k,
    }  # fmt: skip
    with measure.host_threads(threads, device):
        data = case.data(device)
        named["parameters"] = data.v.shape[1]
        wanted = exact(data)
        calls: dict[str, Callable[[], Any]] = {_GRADIENT: products.gradient(data)}
        missing, errors = {}, {}
        for peer in peers:
            try:
                calls[peer], found = prepared(peer, data)
            except Unsupported as reason:
                missing[peer] = str(reason)
                continue
            errors[peer] = float((found.double() - wanted).norm() / wanted.norm())
        timings = measure.interleaved(calls, effort, measure.synchronizer(device))
        peaks = {peer: measure.peak_memory(calls[peer], device) for peer in calls}
    unit = timings[_GRADIENT].median
    found = []
    for peer in peers:
        row = {**named, "peer": peer, "gradient_seconds": unit, "gradient_peak_bytes": peaks[_GRADIENT]}
        if peer in missing:
            found.append({**row, "unsupported": missing[peer]})
            continue
        timing = timings[peer]
        found.append(
            {
                **row,
                "seconds": timing.median,
                "q1": timing.q1,
                "q3": timing.q3,
                "best": timing.best,
                "rounds": timing.rounds,
                "gradients": timing.median / case.k / unit,
                "error": errors[peer],
                "peak_bytes": peaks[peer],
            }
        )
    return found

# SPDX-License-Identifier: Apache-2.0
"""Whether K tangents fit into memory: asked before they are computed, since a host that runs out kills the process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastflat import memory

#: Bytes below which nobody asks.
_SMALL = 256 << 20


@contextlib.contextmanager
def watched(linear: Any, plan: Any, k: int, like: Tensor) -> Iterator[None]:
    """Raise MemoryError where the tangents of K vectors will not fit, or did not.

    What they need is known from the shapes of the program, to about a fifth: temporaries of single ops come on top.
    """
    each = plan.peak * (linear.dtype or like.dtype).itemsize
    if k * each > _SMALL:
        free = memory.available(like.device)
        if free is not None and k * each > free:
            _fail(k, each, free, like.device)
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        free = memory.available(like.device)
        _fail(k, each, min(k * each // 2, free if free is not None else k * each // 2), like.device, error)


def _fail(k: int, each: int, free: int, device: torch.device, error: Exception | None = None) -> None:
    fit = min(int(0.8 * free / max(each, 1)), k - 1)
    way = f"K = {fit} will: chunk={fit} of an operator" if fit else "nor does one: take microbatch= or fewer params="
    raise MemoryError(
        f"fastflat.curvature: K = {k} vectors at once need about {_shown(k * each)}, and {_shown(free)} are free on "
        f"{device}; {way}"
    ) from error


def _shown(size: float) -> str:
    return f"{size / 2**30:.2g} GiB"

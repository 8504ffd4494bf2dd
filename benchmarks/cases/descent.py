# SPDX-License-Identifier: Apache-2.0
"""One step of a base optimizer over the parameters of a network; the lists of :mod:`.sharpness`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from . import sharpness
from .sharpness import LISTS, StepCase

__all__ = ["LISTS", "cases"]


def cases(
    lists: Sequence[str] = tuple(LISTS),
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    bases: Sequence[str] = ("sgd", "adamw"),
) -> Iterator[StepCase]:
    return sharpness.cases(lists, dtypes, bases, "descent")

# SPDX-License-Identifier: Apache-2.0
"""A slice of every family: what ``fastflat bench run`` measures, and pytest-benchmark with it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch

from .cases import Case
from .peers import PEERS

#: Families in the order of the page, with the granularities that stand for them (None: the family has none).
KERNELS: dict[str, tuple[str, ...] | None] = {
    "identity": None,
    "fake_quantize": ("tensor", "channel", "group32", "dynamic"),
    "general_quantize": ("uniform", "stochastic", "e4m3", "mxfp4"),
    "fake_quantize_list": ("small",),
    "mixquant": ("channel",),
    "binarize": None,
    "liq": None,
    "bitplane": None,
    "logits": ("kl-1000x4", "js-10x3", "ce-1000", "stats-1000", "scan-10x16"),
    "inputs": ("noise", "noise-masked", "pgd-linf", "pgd-l2"),
    "weight_norms": ("reduce", "saturate"),
    "compressors": ("sign", "qsgd", "terngrad", "topk"),
    "vectors": ("dot8", "subtract8", "signs", "forms"),
    "tangents": ("gelu8", "scale8", "norm8", "stats8"),
    "row_tangents": ("norm-768x8", "norm_bwd-768x8", "softmax-64x8", "cross_entropy-10x8"),
}
#: Families that are steps of optimizers.
STEPS = ("sharpness", "descent")
#: Elements of the data; those of families that hold eight tangents or planes are fewer.
SIZES = (2**16, 2**20, 2**24)
QUICK_SIZES = (2**20,)
_EIGHTFOLD = ("bitplane", "vectors", "tangents", "row_tangents")


def kernels(
    sizes: Sequence[int] = QUICK_SIZES, dtypes: Sequence[torch.dtype] = (torch.float32,), only: Sequence[str] = ()
) -> dict[str, list[Case]]:
    """The cases of each family, forward and backward where it has both."""
    found: dict[str, list[Case]] = {}
    for family, granularities in KERNELS.items():
        if only and family not in only:
            continue
        own = [max(size // 8, 2**7) for size in sizes] if family in _EIGHTFOLD else list(sizes)
        options = {} if granularities is None else {"granularities": granularities}
        module = importlib.import_module(f".cases.{family}", __package__)
        found[family] = list(module.cases(own, dtypes, **options))
    return found


def steps(
    lists: Sequence[str] = ("small",), bases: Sequence[str] = ("sgd",), only: Sequence[str] = ()
) -> dict[str, list[Case]]:
    """The cases of the optimizers' families."""
    found = {}
    for family in STEPS:
        if not only or family in only:
            module = importlib.import_module(f".cases.{family}", __package__)
            found[family] = list(module.cases(lists, bases=bases))
    return found


def peers(family: str, compiled: bool = True) -> list[str]:
    """Who computes a family here: all that do the same work, without those that compile unless asked for."""
    others = ("builtin-fixed", "passes")
    return [name for name in PEERS[family] if name not in others and (compiled or name != "compile")]

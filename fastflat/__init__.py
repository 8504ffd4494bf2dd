# SPDX-License-Identifier: Apache-2.0
"""fastflat: fused kernels for low-bit, flatness-seeking training in PyTorch."""

from fastflat import functional, optim, quant
from fastflat._spec import QuantSpec
from fastflat.backends import FallbackWarning, backend, backends, choose
from fastflat.functional import (
    affine_logit_scan,
    binarize,
    bitplane,
    bitplane_codes,
    bitplane_init,
    compress,
    compress_topk,
    decompress,
    decompress_topk,
    draw_state,
    fake_quantize,
    fake_quantize_dynamic,
    fake_quantize_list,
    frac_quantize,
    liq_quantize,
    mixquant,
    noise_batch,
    pgd_step,
    rebalanced_ce,
    saturate,
    softmax_js,
    softmax_kl,
    softmax_stats,
    weight_reduce,
)
from fastflat.memory import tune_host_memory
from fastflat.quant import calibrate, param_groups, prepare

__version__ = "0.1.0"

__all__ = [
    "FallbackWarning",
    "QuantSpec",
    "accelerate",
    "accelerate_optimizer",
    "affine_logit_scan",
    "backend",
    "backends",
    "binarize",
    "bitplane",
    "bitplane_codes",
    "bitplane_init",
    "calibrate",
    "choose",
    "compress",
    "compress_topk",
    "curvature",
    "decompress",
    "decompress_topk",
    "distributed",
    "draw_state",
    "evaluate",
    "export",
    "fake_quantize",
    "fake_quantize_dynamic",
    "fake_quantize_list",
    "frac_quantize",
    "functional",
    "integrations",
    "liq_quantize",
    "methods",
    "mixquant",
    "noise_batch",
    "optim",
    "param_groups",
    "pgd_step",
    "prepare",
    "quant",
    "rebalanced_ce",
    "restore",
    "saturate",
    "softmax_js",
    "softmax_kl",
    "softmax_stats",
    "tune_host_memory",
    "weight_reduce",
]


#: Imported on first use: a tenth of a second that most programs do not need.
_LATER = {
    "curvature": None,
    "distributed": None,
    "evaluate": None,
    "export": None,
    "integrations": None,
    "methods": None,
    "accelerate": "integrations",
    "accelerate_optimizer": "integrations",
    "restore": "integrations",
}


def __getattr__(name: str):
    if name not in _LATER:
        raise AttributeError(f"module 'fastflat' has no attribute {name!r}")
    import importlib

    module = importlib.import_module(f"fastflat.{_LATER[name] or name}")
    return getattr(module, name) if _LATER[name] else module

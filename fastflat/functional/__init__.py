# SPDX-License-Identifier: Apache-2.0
"""What users call: checked, differentiable, on the backend in force. One module an op family."""

from fastflat.functional._binarize import binarize
from fastflat.functional._bitplane import bitplane, bitplane_codes, bitplane_init
from fastflat.functional._compressors import (
    Compressed,
    Largest,
    compress,
    compress_topk,
    decompress,
    decompress_topk,
)
from fastflat.functional._fake_quantize import fake_quantize, fake_quantize_dynamic, scale_value
from fastflat.functional._fake_quantize_list import fake_quantize_list
from fastflat.functional._inputs import noise_batch, pgd_step
from fastflat.functional._liq import liq_quantize
from fastflat.functional._logits import (
    SoftmaxStats,
    affine_logit_scan,
    rebalanced_ce,
    softmax_js,
    softmax_kl,
    softmax_stats,
)
from fastflat.functional._mixquant import frac_quantize, mixquant
from fastflat.functional._noise import draw_state
from fastflat.functional._weight_norms import WeightStats, saturate, weight_reduce

__all__ = [
    "Compressed",
    "Largest",
    "SoftmaxStats",
    "WeightStats",
    "affine_logit_scan",
    "binarize",
    "bitplane",
    "bitplane_codes",
    "bitplane_init",
    "compress",
    "compress_topk",
    "decompress",
    "decompress_topk",
    "draw_state",
    "fake_quantize",
    "fake_quantize_dynamic",
    "fake_quantize_list",
    "frac_quantize",
    "liq_quantize",
    "mixquant",
    "noise_batch",
    "pgd_step",
    "rebalanced_ce",
    "saturate",
    "scale_value",
    "softmax_js",
    "softmax_kl",
    "softmax_stats",
    "weight_reduce",
]

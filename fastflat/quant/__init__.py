# SPDX-License-Identifier: Apache-2.0
"""Quantizers as modules: layers, preparing a model, scales from data, parameter groups."""

from fastflat._spec import QuantSpec
from fastflat.quant._initial import METHODS
from fastflat.quant.attention import QuantMultiheadAttention
from fastflat.quant.calibrate import calibrate
from fastflat.quant.codes import LayerCodes, codes_from_tensors, codes_to_tensors, export_codes, load_codes
from fastflat.quant.layers import (
    QuantConv1d,
    QuantConv2d,
    QuantConvTranspose1d,
    QuantConvTranspose2d,
    QuantEmbedding,
    QuantLayer,
    QuantLinear,
)
from fastflat.quant.prepare import LAYERS, param_groups, prepare, quantizers
from fastflat.quant.quantizer import Quantizer
from fastflat.quant.recurrent import QuantGRU, QuantLSTM
from fastflat.quant.schedule import NoiseSchedule
from fastflat.quant.summary import LayerSummary, summary

__all__ = [
    "LAYERS",
    "METHODS",
    "LayerCodes",
    "LayerSummary",
    "NoiseSchedule",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConvTranspose1d",
    "QuantConvTranspose2d",
    "QuantEmbedding",
    "QuantGRU",
    "QuantLSTM",
    "QuantLayer",
    "QuantLinear",
    "QuantMultiheadAttention",
    "QuantSpec",
    "Quantizer",
    "calibrate",
    "codes_from_tensors",
    "codes_to_tensors",
    "export_codes",
    "load_codes",
    "param_groups",
    "prepare",
    "quantizers",
    "summary",
]

# SPDX-License-Identifier: Apache-2.0
"""Quantizers as modules: layers, preparing a model, scales from data, parameter groups."""

from fastflat._spec import QuantSpec
from fastflat.quant._initial import METHODS
from fastflat.quant.calibrate import calibrate
from fastflat.quant.layers import QuantConv2d, QuantLinear
from fastflat.quant.prepare import param_groups, prepare, quantizers
from fastflat.quant.quantizer import Quantizer
from fastflat.quant.summary import LayerSummary, summary

__all__ = [
    "METHODS",
    "LayerSummary",
    "QuantConv2d",
    "QuantLinear",
    "QuantSpec",
    "Quantizer",
    "calibrate",
    "param_groups",
    "prepare",
    "quantizers",
    "summary",
]

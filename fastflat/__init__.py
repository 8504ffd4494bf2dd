# SPDX-License-Identifier: Apache-2.0
"""fastflat: fused kernels for low-bit, flatness-seeking training in PyTorch."""

from fastflat import functional, optim, quant
from fastflat._spec import QuantSpec
from fastflat.backends import FallbackWarning, backend, backends, choose
from fastflat.functional import (
    binarize,
    bitplane,
    bitplane_codes,
    bitplane_init,
    draw_state,
    fake_quantize,
    fake_quantize_dynamic,
    fake_quantize_list,
    frac_quantize,
    liq_quantize,
    mixquant,
)
from fastflat.memory import tune_host_memory
from fastflat.quant import calibrate, param_groups, prepare

__version__ = "0.1.0"

__all__ = [
    "FallbackWarning",
    "QuantSpec",
    "backend",
    "backends",
    "binarize",
    "bitplane",
    "bitplane_codes",
    "bitplane_init",
    "calibrate",
    "choose",
    "curvature",
    "draw_state",
    "fake_quantize",
    "fake_quantize_dynamic",
    "fake_quantize_list",
    "frac_quantize",
    "functional",
    "liq_quantize",
    "mixquant",
    "optim",
    "param_groups",
    "prepare",
    "quant",
    "tune_host_memory",
]


def __getattr__(name: str):
    if name == "curvature":  # a tenth of a second of imports that most programs do not need
        import importlib

        return importlib.import_module("fastflat.curvature")
    raise AttributeError(f"module 'fastflat' has no attribute {name!r}")

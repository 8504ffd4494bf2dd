# SPDX-License-Identifier: Apache-2.0
"""fastflat: fused kernels for low-bit, flatness-seeking training in PyTorch."""

from fastflat import functional
from fastflat._spec import QuantSpec
from fastflat.backends import FallbackWarning, backend, backends, choose
from fastflat.functional import fake_quantize, fake_quantize_dynamic

__version__ = "0.1.0"

__all__ = [
    "FallbackWarning",
    "QuantSpec",
    "backend",
    "backends",
    "choose",
    "fake_quantize",
    "fake_quantize_dynamic",
    "functional",
]

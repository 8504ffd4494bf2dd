# SPDX-License-Identifier: Apache-2.0
"""Curvature: batched products with Hessian, Gauss-Newton and Fisher matrices, through quantized networks too."""

from fastflat.curvature.functional import Linearized, hvp, linearize, mixed_hvp
from fastflat.curvature.gauss_newton import GGN, Fisher
from fastflat.curvature.operators import Hessian, Operator

__all__ = ["GGN", "Fisher", "Hessian", "Linearized", "Operator", "hvp", "linearize", "mixed_hvp"]

# SPDX-License-Identifier: Apache-2.0
"""Curvature: batched products with Hessian, Gauss-Newton and Fisher matrices, through quantized networks too, and
estimates from them."""

from fastflat.curvature._density import Density, density
from fastflat.curvature._estimate import Estimate
from fastflat.curvature._lanczos import eigenvalues
from fastflat.curvature._solve import solve
from fastflat.curvature._trace import diagonal, layer_traces, trace
from fastflat.curvature.functional import Linearized, hvp, linearize, mixed_hvp
from fastflat.curvature.gauss_newton import GGN, Fisher
from fastflat.curvature.operators import Hessian, Operator

__all__ = [
    "GGN",
    "Density",
    "Estimate",
    "Fisher",
    "Hessian",
    "Linearized",
    "Operator",
    "density",
    "diagonal",
    "eigenvalues",
    "hvp",
    "layer_traces",
    "linearize",
    "mixed_hvp",
    "solve",
    "trace",
]

# SPDX-License-Identifier: Apache-2.0
"""Curvature: batched products with Hessian, Gauss-Newton and Fisher matrices, through quantized networks too, and
estimates from them.

All of them linearise a traced gradient once and push K vectors through it together: each matrix product or convolution
has one operand with K tangents, which K joins as rows, batch or channels of one call; each primal quantity is computed
once. Three ways to a Hessian's products (``method=``), K vectors at once, where a forward pass takes F:

==================== ============= ========================================================================
engine               2F + 6F K     exact; memory of 1 + K gradients' activations
double_backward      3F + 6F K     exact; any function with two derivatives; one graph, whatever K, kept by linearize
finite_difference    6F K          any function with one; error about 2e-5 in float32; not for quantizers
==================== ============= ========================================================================
"""

from fastflat.curvature._density import Density, density
from fastflat.curvature._estimate import Estimate
from fastflat.curvature._lanczos import eigenvalues
from fastflat.curvature._solve import solve
from fastflat.curvature._trace import diagonal, layer_traces, trace
from fastflat.curvature.functional import Linearized, hvp, linearize, mixed_hvp
from fastflat.curvature.gauss_newton import GGN, Fisher
from fastflat.curvature.inputs import InputHessian
from fastflat.curvature.operators import Hessian, Operator

__all__ = [
    "GGN",
    "Density",
    "Estimate",
    "Fisher",
    "Hessian",
    "InputHessian",
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

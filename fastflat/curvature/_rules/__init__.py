# SPDX-License-Identifier: Apache-2.0
"""Tangent rules by ATen op, one file for each kind of op."""

from fastflat.curvature._rules import (
    batch_norm,
    convolution,
    elementwise,
    families,
    indexing,
    products,
    quantize,
    reduction,
    row_norm,
    shape,
)
from fastflat.curvature._rules._constant import CONSTANT
from fastflat.curvature._rules._fallback import tangent
from fastflat.curvature._rules._table import PARTIAL, PRIMAL, RULES, Call, moving_reads, settled
from fastflat.curvature._rules.second_order import bend

__all__ = ["CONSTANT", "PARTIAL", "PRIMAL", "RULES", "Call", "bend", "moving_reads", "settled", "tangent"]

# SPDX-License-Identifier: Apache-2.0
"""Published methods over the kernel families; what needs two of them."""

from fastflat.methods.bit_allocation import Allocation, allocate_bits, rounded, rounding_errors, sensitivities

__all__ = ["Allocation", "allocate_bits", "rounded", "rounding_errors", "sensitivities"]

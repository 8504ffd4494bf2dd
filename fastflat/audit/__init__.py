# SPDX-License-Identifier: Apache-2.0
"""What compiled kernels are made of, without a GPU: registers, spills, access widths, forbidden instructions, traffic.

``fastflat audit`` compiles every Triton kernel and, in a checkout with nvcc, every ``csrc/cuda/*.cu`` for each
architecture, reads the PTX and the machine code, and compares with the budgets in ``benchmarks/budgets``.
"""

from fastflat.audit._run import ARCHES, BUDGETED, Report, audit

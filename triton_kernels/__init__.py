# SPDX-License-Identifier: Apache-2.0
"""Triton kernels, one module per op family; installed as ``fastflat.triton_kernels``.

Each family module holds kernels and, under the names and signatures of the raw ops, the functions that launch them.
The modules know torch and triton only. Nothing here is imported until a backend asks for it.
"""

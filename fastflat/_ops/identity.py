# SPDX-License-Identifier: Apache-2.0
"""The row of the template op."""

from __future__ import annotations

import torch

from fastflat._ops._row import Op, size_of


def _fake_identity(x):
    return torch.empty_like(x)


ROWS = (
    Op(
        "identity",
        "identity",
        "(Tensor x) -> Tensor",
        _fake_identity,
        lambda x: 2 * size_of(x),
        """``y = x``, bit for bit. Does nothing on purpose: the template for a new op (CONTRIBUTING.md) and the
        floor that benchmarks compare with.""",
    ),
)

# SPDX-License-Identifier: Apache-2.0
"""The kernel of the weight_norms family, executed from its .cu source, against the reference."""

import pytest
import torch

from tests.ops import weight_norms_cases as cases


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_against_the_reference(emulated, dtype):
    for shape in cases.SHAPES:
        cases.check("weight_norms_saturate", emulated.weight_norms_saturate, shape, dtype, special=True)


def test_bytes_moved(emulated):
    w = torch.randn(64, 256)
    emulated.module.take_counts()
    emulated.weight_norms_saturate(w, torch.tensor(0.5))
    counts = emulated.module.take_counts()
    assert counts["read"] + counts["written"] == 2 * w.nbytes

# SPDX-License-Identifier: Apache-2.0
"""The weight_norms kernels in Triton's interpreter. Not collected by itself: test_triton_interpreter.py runs it in a
process of its own."""

import pytest
import torch

from fastflat.triton_kernels import weight_norms

from . import weight_norms_cases as cases

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("name", cases.OPS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_against_the_reference(name, dtype, monkeypatch):
    monkeypatch.setattr(weight_norms, "_TILE", 32)
    for shape in ((0, 3), (5, 70), (19, 6)) if dtype == torch.float32 else ((5, 70),):
        cases.check(name, getattr(weight_norms, name), shape, dtype, special=True)

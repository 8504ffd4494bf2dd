# SPDX-License-Identifier: Apache-2.0
"""The compressors kernels in Triton's interpreter. Not collected by itself: test_triton_interpreter.py runs it in a
process of its own."""

import pytest
import torch

from fastflat.triton_kernels import compressors

from . import compressors_cases as cases

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("name", cases.OPS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_against_the_reference(name, dtype, monkeypatch):
    monkeypatch.setattr(compressors, "_TILE", 64)
    monkeypatch.setattr(compressors, "_STEPS", 2)
    for shape in ((0,), (7,), (3, 61)) if dtype == torch.float32 else ((3, 61),):
        cases.check(name, getattr(compressors, name), shape, dtype, special=True)

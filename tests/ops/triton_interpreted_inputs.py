# SPDX-License-Identifier: Apache-2.0
"""The inputs kernels in Triton's interpreter. Not collected by itself: test_triton_interpreter.py runs it in a process
of its own."""

import pytest
import torch

from fastflat.triton_kernels import inputs

from . import inputs_cases as cases

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("name", cases.OPS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_against_the_reference(name, dtype, monkeypatch):
    monkeypatch.setattr(inputs, "_TILE", 64)
    shapes = ((0, 3), (3, 0), (5, 3, 7), (2, 70)) if dtype == torch.float32 else ((3, 50),)
    for shape in shapes:
        cases.check(name, getattr(inputs, name), shape, dtype, special=name == "inputs_pgd_step")

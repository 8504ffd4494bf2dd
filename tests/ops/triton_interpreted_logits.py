# SPDX-License-Identifier: Apache-2.0
"""The logits kernels in Triton's interpreter. Not collected by itself: test_triton_interpreter.py runs it in a process
of its own."""

import pytest
import torch

from fastflat.triton_kernels import logits

from . import logits_cases as cases

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("name", cases.OPS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_against_the_reference(name, dtype):
    cases.check(name, getattr(logits, name), (1, 0, 3), dtype)
    cases.check(name, getattr(logits, name), (1, 9, 10), dtype, special=True)
    if dtype == torch.float32:
        cases.check(name, getattr(logits, name), (2, 2, 1), dtype)


@pytest.mark.parametrize("name", cases.OPS)
def test_rows_that_are_passed_over_again(name, monkeypatch):
    monkeypatch.setattr(logits, "_LONGEST", 16)
    monkeypatch.setattr(logits, "_TILE", 16)
    cases.check(name, getattr(logits, name), (1, 2, 33), torch.float32, special=True)

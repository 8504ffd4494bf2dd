# SPDX-License-Identifier: Apache-2.0
"""The row_tangents kernels in Triton's interpreter. Not collected by itself: test_triton_interpreter.py runs it in a
process of its own."""

import pytest
import torch

from fastflat.backends import reference
from fastflat.triton_kernels import row_tangents

from . import row_tangents_cases as cases

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

#: Nothing, several rows in a program, one row, a row that is passed over twice.
SHAPES = ((0, 2, 3), (2, 3, 0), (1, 1, 1), (3, 5, 10), (2, 5, 257), (2, 1, 1032), (1, 1, 4101))


def check(name, *rest, **options):
    cases.check(name, getattr(row_tangents, name), getattr(reference, name), *rest, **options)


@pytest.mark.parametrize("name", cases.OPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_reference(name, shape):
    check(name, shape, torch.float32, every=False)


@pytest.mark.parametrize("name", cases.OPS)
@pytest.mark.parametrize("enough", [1, 2])
def test_tangents_of_a_program(name, enough, monkeypatch):
    """One program walks over all of them, or two over a part each."""
    monkeypatch.setattr(row_tangents, "_ENOUGH", enough)
    check(name, (3, 1, 10), torch.float32, every=False)
    check(name, (3, 1, 4097), torch.float32, every=False)


@pytest.mark.parametrize("name", cases.OPS)
def test_whatever_is_absent(name):
    check(name, (1, 2, 3), torch.float32)
    check(name, (3, 4, 9), torch.float32, special=True, every=False)


@pytest.mark.parametrize("name", cases.OPS)
@pytest.mark.parametrize("dtype", cases.DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 10), (1, 1, 4104)], ids=str)
def test_other_types(name, dtype, shape):
    check(name, shape, dtype, every=False)

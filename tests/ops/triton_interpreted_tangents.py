# SPDX-License-Identifier: Apache-2.0
"""The tangents kernels in Triton's interpreter: maps have the reference's bits, sums agree.
Not collected by itself: test_triton_interpreter.py runs it in a process of its own."""

import pytest
import torch

from fastflat.backends import reference
from fastflat.triton_kernels import tangents

from . import tangent_cases as cases

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

#: Nothing, no channels, channels last, short and odd runs, several programs.
SHAPES = ((0, 3, 2), (1, 1, 1), (1, 1, 2056), (70, 24, 1), (2, 5, 4), (3, 5, 49), (1, 40, 32), (1, 2, 1025))
#: fp32 with each, and one other dtype in turn.
PLACES = [(shape, dtype) for i, shape in enumerate(SHAPES) for dtype in (torch.float32, cases.DTYPES[1 + i % 3])]


@pytest.mark.parametrize(("shape", "dtype"), PLACES, ids=str)
def test_combine(dtype, shape):
    for i, terms in enumerate(cases.TERMS[(sum(shape) + dtype.itemsize) % 5 :: 5]):
        arguments = cases.combination(terms, (1, 0, 3, 9)[i % 4], shape, dtype)
        cases.check_combine(tangents.tangents_combine, reference.tangents_combine, arguments)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_activations(dtype, kind):
    for tangent in ("t0",) if kind == 6 else ("t0", "t1", "t0 t1"):
        arguments = cases.activation(kind, tangent, 2, (1, 1, 200), dtype, special=True)
        cases.check_combine(tangents.tangents_combine, reference.tangents_combine, arguments)


@pytest.mark.parametrize(("shape", "dtype"), PLACES, ids=str)
def test_sums(dtype, shape):
    for i, terms in enumerate(cases.SUMS[(sum(shape) + dtype.itemsize) % 3 :: 3]):
        arguments = cases.summation(terms, (1, 0, 3, 5)[(i + sum(shape)) % 4], shape, dtype)
        cases.check_sums(tangents.tangents_sums, reference.tangents_sums, arguments)

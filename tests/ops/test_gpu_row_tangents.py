# SPDX-License-Identifier: Apache-2.0
"""The row_tangents family on a GPU: CUDA and Triton kernels against the reference on the CPU.

Twins that run without one: tests/emulator/test_row_tangents.py and triton_interpreted_row_tangents.py.
"""

from __future__ import annotations

import pytest
import torch

from fastflat.backends import backend, kernels, reference, unavailable

from . import row_tangents_cases as cases

pytestmark = pytest.mark.gpu

#: Beside those of the CPU: rows that a warp, a block and none holds, many rows, many tangents.
SHAPES = (*cases.SHAPES, (8, 300, 768), (3, 5, 4096), (2, 3, 50257), (3, 40000, 10), (1000, 2, 33))


@pytest.fixture(params=["cuda", "triton"])
def ops(request):
    """The raw ops of one GPU backend, called with CPU tensors."""
    reason = unavailable(request.param, "cuda")
    if reason:
        pytest.skip(reason)
    with backend(request.param):
        yield {name: over_there(getattr(kernels("cuda"), name)) for name in cases.OPS}


def over_there(op):
    def call(*args):
        results = cases.as_tuple(op(*(a.cuda() if isinstance(a, torch.Tensor) else a for a in args)))
        return tuple(t.cpu() for t in results)

    return call


@pytest.mark.parametrize("name", cases.OPS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_reference(ops, name, dtype, shape):
    cases.check(name, ops[name], getattr(reference, name), shape, dtype, every=False)


@pytest.mark.parametrize("name", cases.OPS)
def test_whatever_is_absent(ops, name):
    cases.check(name, ops[name], getattr(reference, name), (3, 5, 40), torch.float32)
    cases.check(name, ops[name], getattr(reference, name), (3, 5, 40), torch.float32, special=True, every=False)


@pytest.mark.parametrize("name", cases.OPS)
@pytest.mark.parametrize("shape", [(3, 700, 128), (3, 7, 20001)], ids=str)
def test_the_same_bits_in_each_run(ops, name, shape):
    arguments = next(cases.Problem(shape, torch.float32).calls(name, every=False))
    first, second = (ops[name](*arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

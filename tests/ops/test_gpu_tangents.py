# SPDX-License-Identifier: Apache-2.0
"""The tangents family on a GPU: CUDA and Triton kernels against the reference on the CPU.

Twins that run without one: tests/emulator/test_tangents.py and triton_interpreted_tangents.py.
"""

from __future__ import annotations

import pytest
import torch

from fastflat.backends import backend, kernels, reference, unavailable

from . import tangent_cases as cases

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["cuda", "triton"])
def ops(request):
    """The raw ops of one GPU backend, called with CPU tensors."""
    reason = unavailable(request.param, "cuda")
    if reason:
        pytest.skip(reason)
    with backend(request.param):
        yield tuple(over_there(getattr(kernels("cuda"), name)) for name in ("tangents_combine", "tangents_sums"))


def over_there(op):
    def call(*args):
        result = op(*(a.cuda() if isinstance(a, torch.Tensor) else a for a in args))
        return tuple(t.cpu() for t in result) if isinstance(result, tuple) else result.cpu()

    return call


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*cases.SHAPES, *cases.LONG], ids=str)
def test_against_the_reference(ops, dtype, shape):
    combine, sums = ops
    for i, terms in enumerate(cases.TERMS):
        arguments = cases.combination(terms, (0, 1, 3, 9)[i % 4], shape, dtype)
        cases.check_combine(combine, reference.tangents_combine, arguments)
    for kind in cases.KINDS:
        arguments = cases.activation(kind, "t0" if kind == 6 else "t0 t1", 3, shape, dtype, special=True)
        cases.check_combine(combine, reference.tangents_combine, arguments)
    for i, terms in enumerate(cases.SUMS):
        arguments = cases.summation(terms, (0, 1, 3, 9)[i % 4], shape, dtype)
        cases.check_sums(sums, reference.tangents_sums, arguments)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_the_same_bits_in_each_run(ops, dtype):
    arguments = cases.summation("p0 t1 mask total", 5, (64, 64, 49), dtype)
    first, second = ops[1](*arguments), ops[1](*arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

# SPDX-License-Identifier: Apache-2.0
"""The vectors family on a GPU: CUDA and Triton kernels against the reference on the CPU.

Twins that run without one: tests/emulator/test_vectors.py and triton_interpreted_vectors.py.
"""

from __future__ import annotations

import pytest
import torch

from fastflat.backends import backend, kernels, reference, unavailable

from . import vector_cases as cases

pytestmark = pytest.mark.gpu

LENGTHS = (0, 1, 5, 1025, 65537, 1 << 20)


@pytest.fixture(params=["cuda", "triton"])
def ops(request):
    """The raw ops of one GPU backend, called with CPU tensors."""
    reason = unavailable(request.param, "cuda")
    if reason:
        pytest.skip(reason)
    with backend(request.param):
        yield {
            name: over_there(getattr(kernels("cuda"), name)) for name in dir(reference) if name.startswith("vectors_")
        }


def over_there(op):
    def call(*args):
        moved = [a.cuda() if isinstance(a, torch.Tensor) else a for a in args]
        result = op(*moved).cpu()
        if op_changes_its_first(args):
            args[0].copy_(moved[0])
        return result

    return call


def op_changes_its_first(args) -> bool:
    """Of the ops here only the subtraction takes three tensors."""
    return sum(isinstance(a, torch.Tensor) for a in args) == 3


@pytest.mark.parametrize("storage", cases.STORAGES)
@pytest.mark.parametrize("counts", [*cases.COUNTS, (33, 8)], ids=str)
def test_dot_and_subtraction(ops, storage, counts):
    for n in LENGTHS:
        cases.check_dot(ops["vectors_dot"], reference.vectors_dot, storage, counts, n)
        cases.check_subtract(ops["vectors_subtract_"], reference.vectors_subtract_, storage, counts, n)
    cases.check_subtract(ops["vectors_subtract_"], reference.vectors_subtract_, storage, counts, 500, special=True)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("state", cases.STATES, ids=str)
def test_signs(ops, dtype, state):
    for k, n in ((0, 3), (1, 1), (3, 127), (3, 65537)):
        cases.check_signs(ops["vectors_rademacher"], reference.vectors_rademacher, dtype, state, k, n)


@pytest.mark.parametrize("storage", cases.STORAGES)
def test_quadratic(ops, storage):
    for k, n in ((1, 1), (3, 5), (2, 65537), (0, 8)):
        args = (ops["vectors_quadratic"], reference.vectors_quadratic, storage, k, n)
        cases.check_quadratic(*args, cases.starts(n))


@pytest.mark.parametrize("storage", cases.STORAGES)
def test_the_same_bits_in_each_run(ops, storage):
    q, w, c = cases.problem(storage, (9, 3), 1 << 20)
    first, second = ((ops["vectors_dot"](q, w), ops["vectors_subtract_"](w.clone(), q, c)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

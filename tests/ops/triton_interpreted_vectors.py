# SPDX-License-Identifier: Apache-2.0
"""The vectors kernels in Triton's interpreter: maps have the reference's bits; sums, formed in fp64, agree to 1e-12.
Not collected by itself: test_triton_interpreter.py runs it in a process of its own."""

import pytest
import torch

from fastflat.backends import reference
from fastflat.triton_kernels import vectors

from . import vector_cases as cases

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

#: Nothing, shorter than a tile, around tiles, several programs with rows on 16 bytes and off them.
LENGTHS = (0, 1, 128, 1025, 9000, 9001)


@pytest.mark.parametrize("storage", cases.STORAGES)
@pytest.mark.parametrize("counts", [*cases.COUNTS[:-2], (3, 8), (5, 9)], ids=str)
def test_dot(storage, counts):
    for n in LENGTHS if counts[1] < 3 else LENGTHS[::3]:
        cases.check_dot(vectors.vectors_dot, reference.vectors_dot, storage, counts, n)
    cases.check_dot(vectors.vectors_dot, reference.vectors_dot, storage, counts, 300, special=True)


@pytest.mark.parametrize("storage", cases.STORAGES)
@pytest.mark.parametrize("counts", [*cases.COUNTS[:-2], (3, 8), (5, 9)], ids=str)
def test_subtract(storage, counts):
    for n in LENGTHS if counts[1] < 3 else LENGTHS[::3]:
        cases.check_subtract(vectors.vectors_subtract_, reference.vectors_subtract_, storage, counts, n)
    cases.check_subtract(vectors.vectors_subtract_, reference.vectors_subtract_, storage, counts, 300, special=True)


# bf16 leaves as the integers of its bits, so that the interpreter stores it, too.
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("state", cases.STATES, ids=str)
def test_signs(dtype, state):
    for k, n in ((0, 3), (3, 0), (1, 1), (3, 127), (2, 1024), (3, 2049)):
        cases.check_signs(vectors.vectors_rademacher, reference.vectors_rademacher, dtype, state, k, n)


@pytest.mark.parametrize("storage", cases.STORAGES)
def test_quadratic(storage):
    for k, n in ((1, 1), (3, 5), (2, 9001), (0, 8)):
        cases.check_quadratic(vectors.vectors_quadratic, reference.vectors_quadratic, storage, k, n, cases.starts(n))
    cases.check_quadratic(vectors.vectors_quadratic, reference.vectors_quadratic, storage, 2, 40, [7])


def test_sums_do_not_depend_on_the_alignment_of_rows():
    """Rows on 16 bytes and off them are cut alike."""
    q, w, c = cases.problem("fp32", (3, 2), 4000)
    shifted = [torch.empty(t.numel() + 1)[1:].view(t.shape).copy_(t) for t in (q, w)]
    assert torch.equal(vectors.vectors_dot(*shifted), vectors.vectors_dot(q, w))
    assert torch.equal(vectors.vectors_subtract_(shifted[1], q, c), vectors.vectors_subtract_(w, q, c))

# SPDX-License-Identifier: Apache-2.0
"""The logits and inputs families on a GPU: CUDA and Triton kernels against the reference on the CPU.

Twins that run without one: tests/emulator/test_logits.py, test_inputs.py and the triton_interpreted modules.
"""

from __future__ import annotations

import pytest
import torch

from fastflat import _ops
from fastflat.backends import backend, kernels, unavailable

from . import inputs_cases, logits_cases

pytestmark = pytest.mark.gpu

FAMILIES = {**dict.fromkeys(logits_cases.OPS, logits_cases), **dict.fromkeys(inputs_cases.OPS, inputs_cases)}
#: Beside those of the CPU: rows that a warp, a block and none holds, many rows.
LOGITS = (*logits_cases.SHAPES, (2, 300, 1000), (2, 5, 4096), (1, 3, 50257), (3, 40000, 10))
INPUTS = (*inputs_cases.SHAPES, (64, 3, 32, 32), (3, 150529))


@pytest.fixture(params=["cuda", "triton"])
def ops(request):
    """The raw ops of one GPU backend, called with CPU tensors."""
    reason = unavailable(request.param, "cuda")
    if reason:
        pytest.skip(reason)
    there = [name for name in FAMILIES if request.param == "triton" or _ops.has_kernel(name, "cuda")]
    with backend(request.param):
        yield {name: over_there(getattr(kernels("cuda"), name)) for name in there}


def over_there(op):
    def call(*args):
        results = logits_cases.as_tuple(op(*(a.cuda() if isinstance(a, torch.Tensor) else a for a in args)))
        results = tuple(t.cpu() for t in results)
        return results if len(results) > 1 else results[0]

    return call


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", logits_cases.DTYPES, ids=str)
def test_against_the_reference(ops, name, dtype):
    if name not in ops:
        pytest.skip(f"{name} has no CUDA kernel")
    for shape in LOGITS if FAMILIES[name] is logits_cases else INPUTS:
        FAMILIES[name].check(name, ops[name], shape, dtype)
        FAMILIES[name].check(name, ops[name], shape, dtype, special=True)


@pytest.mark.parametrize("name", logits_cases.OPS)
def test_the_same_bits_in_each_run(ops, name):
    if name not in ops:
        pytest.skip(f"{name} has no CUDA kernel")
    for shape in ((2, 700, 100), (2, 7, 20001)):
        for arguments in logits_cases.Problem(shape, torch.float32).calls(name):
            first, second = (logits_cases.as_tuple(ops[name](*arguments)) for _ in range(2))
            assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second, strict=True))

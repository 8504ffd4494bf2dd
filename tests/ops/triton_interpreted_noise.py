# SPDX-License-Identifier: Apache-2.0
"""Triton's elementary functions and random draws against the reference, bit for bit. Not collected by itself:
test_noise.py runs it under Triton's interpreter in a process of its own, and compiles its kernels."""

import itertools

import pytest
import torch
import triton
import triton.language as tl

from fastflat.backends.reference import _elementary as reference_functions
from fastflat.backends.reference import _noise as reference_draws
from fastflat.triton_kernels import _elementary, _noise

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

FUNCTIONS = ["exp", "sigmoid", "log", "sine", "cosine"]
DRAWS = ["uniform_at", "uniform_run", "normal_at", "normal_run"]
HARD = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, -1e-45, 1e-310, 2.0**-126, -1.0, 88.8, -103.9]


@triton.jit
def function_kernel(y_ptr, x_ptr, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    if FUNCTION == 0:
        y = _elementary.exp(x)
    elif FUNCTION == 1:
        y = _elementary.sigmoid(x)
    elif FUNCTION == 2:
        y = _elementary.log(x)
    elif FUNCTION == 3:
        y = _elementary.sine_of_right_angles(x)
    else:
        y = _elementary.cosine_of_right_angles(x)
    tl.store(y_ptr + at, y)


@triton.jit
def draw_kernel(y_ptr, state_ptr, first, DRAW: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0) * BLOCK
    at = start + tl.arange(0, BLOCK)
    state = _noise.load_state(state_ptr)
    if DRAW == 0:
        y = _noise.uniform_at(state, first + at)
    elif DRAW == 1:
        y = _noise.uniform_run(state, first + start, BLOCK)
    elif DRAW == 2:
        y = _noise.normal_at(state, first + at)
    else:
        y = _noise.normal_run(state, first + start, BLOCK)
    tl.store(y_ptr + at, y)


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    bits = {4: torch.int32, 8: torch.int64}[want.element_size()]
    differ = (got.view(bits) != want.view(bits)) & ~(got.isnan() & want.isnan())
    assert got.dtype == want.dtype
    assert not differ.any(), f"got {got[differ][:4].tolist()}, want {want[differ][:4].tolist()}"


def expected(name: str, x: torch.Tensor) -> torch.Tensor:
    if name in ("sine", "cosine"):
        return reference_functions.sine_cosine(x)[name == "cosine"]
    return getattr(reference_functions, name)(x)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_functions(name, dtype):
    g = torch.Generator().manual_seed(0)
    if name in ("sine", "cosine"):
        x = torch.rand(4096, dtype=dtype, generator=g) - 0.5
    else:
        every = torch.randint(-(2**31), 2**31, (2048,), generator=g).to(torch.int32).view(torch.float32).to(dtype)
        range_ = torch.randn(2048 - len(HARD), dtype=dtype, generator=g) * (60 if dtype == torch.float32 else 400)
        x = torch.cat([every, range_, torch.tensor(HARD, dtype=dtype)])
    y = torch.full_like(x, 7.0)
    function_kernel[(4,)](y, x, FUNCTIONS.index(name), 1024)
    same(y, expected(name, x))


@pytest.mark.parametrize("name", DRAWS)
def test_draws(name):
    states = ([0, 0], [5, 7], [-3, 2**45 + 9], [2**63 - 1, -1])
    # Block numbers of 32 bits, of more, and a run across the border.
    for state, first in itertools.product(map(torch.tensor, states), (0, 512, 2**38, 2**35 - 256, 2**34 - 256)):
        y = torch.full((1024,), 7.0)
        draw_kernel[(2,)](y, state, first, DRAWS.index(name), 512)
        same(y, getattr(reference_draws, name.split("_")[0])(state, 1024, first))

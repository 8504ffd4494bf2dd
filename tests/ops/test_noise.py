# SPDX-License-Identifier: Apache-2.0
"""The random draws: their distribution, and that Triton has the reference's bits (tests/cpp compares C++)."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastflat.backends.reference import _noise

INTERPRETED = Path(__file__).with_name("triton_interpreted_noise.py")
N = 1 << 18
DRAWS = {"centred": _noise.centred, "normal": _noise.normal}
#: Draws that must look unrelated to those of (42, 3): a neighbour in each of the four words of seed and offset.
NEIGHBOURS = [(43, 3), (42 + 2**32, 3), (42, 4), (42, 3 + 2**32)]


def state(seed: int = 42, offset: int = 3) -> torch.Tensor:
    return torch.tensor([seed, offset])


def deviations(statistic: float, expected: float, variance: float) -> float:
    """How many standard deviations a statistic lies from what it should be."""
    return abs(statistic - expected) / math.sqrt(variance)


def chi_square(cells: torch.Tensor, count: int) -> float:
    """Standard deviations between the chi-square statistic of equally likely cells and its mean."""
    observed = torch.bincount(cells, minlength=count).double()
    mean = cells.numel() / count
    assert observed.numel() == count
    return deviations(((observed - mean) ** 2 / mean).sum().item(), count - 1, 2 * (count - 1))


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of centred draws of variance 1/12, in standard deviations of that of independent ones."""
    return deviations((a.double() * b.double()).mean().item() * 12, 0.0, 1 / a.numel())


# The states are fixed, so no limit below is met by luck on one run and missed on the next.


@pytest.mark.parametrize(("name", "fourth"), [("centred", 1 / 80), ("normal", 3 / 144)])
def test_mean_and_variance(name, fourth):
    x = DRAWS[name](state(), N).double()
    assert deviations(x.mean().item(), 0.0, 1 / 12 / N) < 4
    assert deviations((x * x).mean().item(), 1 / 12, (fourth - 1 / 144) / N) < 4


@pytest.mark.parametrize("name", DRAWS)
def test_neighbouring_elements_are_uncorrelated(name):
    x = DRAWS[name](state(), N)
    for lag in range(1, 9):
        assert correlation(x[lag:], x[:-lag]) < 4
        # The magnitudes too: Box and Muller's pairs share their radius.
        size = (x.double().square() - 1 / 12) * (3.0 if name == "centred" else 1.0)
        assert abs((size[lag:] * size[:-lag]).mean().item() / size.square().mean().item()) < 4 / math.sqrt(N)


def test_all_16_bit_values_are_equally_likely():
    u = _noise.uniform(state(), 4 * N)
    k = u * 65536 - 0.5
    assert torch.equal(k, k.round())
    assert 0 < u.min() < u.max() < 1
    assert chi_square(k.long(), 1 << 16) < 4


def test_pairs_of_neighbours_fill_the_square():
    k = (_noise.uniform(state(), 2 * N) * 256).long().view(-1, 2)
    assert chi_square(k[:, 0] * 256 + k[:, 1], 1 << 16) < 4


def test_normal_draws_have_the_normal_distribution():
    x = _noise.normal(state(), N).double() * math.sqrt(12)
    assert deviations((x**4).mean().item(), 3.0, 96 / N) < 4
    assert deviations((x**3).mean().item(), 0.0, 15 / N) < 4
    for bound in (1.0, 2.0, 3.0, 4.0):
        p = math.erfc(bound / math.sqrt(2))
        assert deviations((x.abs() > bound).double().mean().item(), p, p * (1 - p) / N) < 4
    quantile = (torch.special.ndtr(x) * 256).long()
    assert chi_square(quantile, 256) < 4
    # The largest radius: u = 2^-24.
    assert x.abs().max() <= math.sqrt(48 * math.log(2)) + 1e-6


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("neighbour", NEIGHBOURS, ids=str)
def test_draws_of_other_seeds_and_offsets_are_independent(name, neighbour):
    a, b = DRAWS[name](state(), N), DRAWS[name](state(*neighbour), N)
    assert correlation(a, b) < 4
    p = 1 / 65536 if name == "centred" else 0.0
    assert deviations((a == b).double().mean().item(), p, (p or 1e-7) / N) < 4


@pytest.mark.parametrize("name", DRAWS)
def test_a_run_is_a_part_of_the_whole(name):
    whole = DRAWS[name](state(), 1000)
    for first, count in ((0, 1), (8, 13), (504, 496), (992, 8)):
        assert torch.equal(DRAWS[name](state(), count, first), whole[first : first + count])
    assert DRAWS[name](state(), 0).shape == (0,)


# Triton ---------------------------------------------------------------------------------------------------------------


@pytest.mark.triton
def test_triton_interpreted_has_the_same_bits():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(INTERPRETED)]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "14 passed" in done.stdout


@pytest.mark.triton
@pytest.mark.parametrize("arch", [80, 90])
def test_triton_compiles_to_ieee_operations_alone(arch):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastflat.audit import _ptx

    from . import triton_interpreted_noise as kernels

    sources = [
        (kernels.function_kernel, {"y_ptr": f"*{t}", "x_ptr": f"*{t}"}, {"FUNCTION": f, "BLOCK": 512})
        for t in ("fp32", "fp64")
        for f in range(len(kernels.FUNCTIONS))
    ]
    sources += [
        (kernels.draw_kernel, {"y_ptr": "*fp32", "state_ptr": "*i64", "first": t}, {"DRAW": d, "BLOCK": 512})
        for t in ("i32", "i64")
        for d in range(len(kernels.DRAWS))
    ]
    for kernel, types, constants in sources:
        source = ASTSource(kernel, {**types, **dict.fromkeys(constants, "constexpr")}, constants)
        compiled = triton.compile(
            source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 4, "enable_fp_fusion": False}
        )
        (parsed,) = _ptx.parse(compiled.asm["ptx"])
        assert parsed.forbidden == {}, (kernel.__name__, types, constants)

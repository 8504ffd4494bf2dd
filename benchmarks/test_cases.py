# SPDX-License-Identifier: Apache-2.0
"""The cases of ``fastflat bench run`` under pytest-benchmark: ``pytest benchmarks --benchmark-compare`` and its other
options."""

import itertools

import pytest
import torch

from . import overview
from .peers import Unsupported, prepare

SIZES = (2**12, 2**16)
CASES = list(itertools.chain.from_iterable([*overview.kernels(SIZES).values(), *overview.steps().values()]))


@pytest.mark.parametrize(
    ("case", "peer"),
    [(case, peer) for case in CASES for peer in overview.peers(case.family, compiled=False)],
    ids=lambda value: getattr(value, "label", value),
)
def test_case(benchmark, case, peer):
    benchmark.group = case.label
    try:
        call = prepare(peer, case.data(torch.device("cpu")))
    except Unsupported as reason:
        pytest.skip(str(reason))
    benchmark.extra_info |= {"bytes": case.bytes, "operations": case.operations}
    benchmark(call)

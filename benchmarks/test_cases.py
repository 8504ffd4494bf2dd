# SPDX-License-Identifier: Apache-2.0
"""The cases under pytest-benchmark: ``pytest benchmarks --benchmark-compare`` and its other options."""

import pytest
import torch

from .cases import (
    bitplane,
    descent,
    fake_quantize,
    fake_quantize_list,
    general_quantize,
    identity,
    mixquant,
    sharpness,
    tangents,
    vectors,
)
from .peers import PEERS, Unsupported, prepare

SIZES = (2**12, 2**16)
CASES = [*fake_quantize.cases(SIZES, [torch.float32]), *identity.cases(SIZES, [torch.float32])]
for module in (fake_quantize_list, general_quantize, mixquant, bitplane, vectors, tangents):
    CASES += module.cases(SIZES, [torch.float32])
for module in (sharpness, descent):
    CASES += module.cases(["small"])


@pytest.mark.parametrize(
    ("case", "peer"),
    [(case, peer) for case in CASES for peer in PEERS[case.family] if peer != "compile"],
    ids=lambda value: getattr(value, "label", value),
)
def test_case(benchmark, case, peer):
    benchmark.group = case.label
    try:
        call = prepare(peer, case.data(torch.device("cpu")))
    except Unsupported as reason:
        pytest.skip(str(reason))
    benchmark.extra_info["bytes"] = case.bytes
    benchmark(call)

# SPDX-License-Identifier: Apache-2.0
"""DistributedDataParallel, FSDP2 and distributed checkpoints over gloo, in 4 and 2 processes started by torchrun."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks import needs_gloo, on_ranks

pytestmark = needs_gloo

SCRIPT = Path(__file__).with_name("distributed_run.py")
#: What each number of ranks does; four first, whose checkpoint two then load.
CHECKS = {
    4: ["synchronised", "sharded", "saves"],
    2: ["synchronised", "each_its_own_ascent", "one_rank_overflows", "sharded", "sharded_restore", "loads"],
}


@pytest.fixture(scope="session")
def results(tmp_path_factory) -> dict[int, list[dict[str, str]]]:
    folder = tmp_path_factory.mktemp("distributed")
    return {ranks: on_ranks(ranks, SCRIPT, names, folder) for ranks, names in CHECKS.items()}


@pytest.mark.parametrize(("ranks", "name"), [(ranks, name) for ranks, names in CHECKS.items() for name in names])
def test_on_ranks(results, ranks, name):
    assert [of_rank[name] for of_rank in results[ranks]] == ["passed"] * ranks

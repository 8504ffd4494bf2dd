# SPDX-License-Identifier: Apache-2.0
"""DistributedDataParallel, FSDP2 and distributed checkpoints over gloo, in 4 and 2 processes started by torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="needs a torch with gloo",
)

SCRIPT = Path(__file__).with_name("distributed_run.py")
#: What each number of ranks does; four first, whose checkpoint two then load.
CHECKS = {
    4: ["synchronised", "sharded", "saves"],
    2: ["synchronised", "each_its_own_ascent", "one_rank_overflows", "sharded", "sharded_restore", "loads"],
}


@pytest.fixture(scope="session")
def results(tmp_path_factory) -> dict[int, list[dict[str, str]]]:
    folder, found = tmp_path_factory.mktemp("distributed"), {}
    for ranks, names in CHECKS.items():
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        run = subprocess.run(
            [*command, str(SCRIPT), str(folder), *names],
            capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        file = folder / f"results-{ranks}.json"
        assert file.is_file(), run.stdout[-2000:] + run.stderr[-4000:]
        found[ranks] = json.loads(file.read_text())
    return found


@pytest.mark.parametrize(("ranks", "name"), [(ranks, name) for ranks, names in CHECKS.items() for name in names])
def test_on_ranks(results, ranks, name):
    assert [of_rank[name] for of_rank in results[ranks]] == ["passed"] * ranks

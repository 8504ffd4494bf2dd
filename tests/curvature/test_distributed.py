# SPDX-License-Identifier: Apache-2.0
"""Products summed over ranks, over gloo in 2 processes started by torchrun."""

from __future__ import annotations

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


def test_two_ranks_make_one_operator(tmp_path):
    script = Path(__file__).with_name("distributed_run.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    run = subprocess.run(
        [*command, str(tmp_path)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert {p.name for p in tmp_path.iterdir()} == {"passed-0", "passed-1"}, run.stdout[-2000:] + run.stderr[-4000:]

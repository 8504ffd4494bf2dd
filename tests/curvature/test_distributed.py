# SPDX-License-Identifier: Apache-2.0
"""Products summed over ranks, over gloo in 2 processes started by torchrun."""

from __future__ import annotations

from pathlib import Path

from tests.ranks import checks_of, needs_gloo, on_ranks


@needs_gloo
def test_two_ranks_make_one_operator(tmp_path):
    script = Path(__file__).with_name("distributed_run.py")
    (name,) = checks_of(script)
    assert on_ranks(2, script, [name], tmp_path) == [{name: "passed"}] * 2

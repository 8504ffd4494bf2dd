# SPDX-License-Identifier: Apache-2.0
"""README: its code runs, its table is the one that the committed results give."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_python_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["y"].shape == (64, 128)
    names["y"].sum().backward()
    assert names["scale"].grad.shape == (64,)


@pytest.mark.parametrize(("name", "table"), [("quantize", "markdown"), ("families", "families")])
def test_tables_are_drawn_from_the_committed_results(name, table):
    if importlib.util.find_spec("fastflat.benchmarks") is None:
        pytest.skip("fastflat.benchmarks is not installed: pip install --no-build-isolation -e .")
    from fastflat.benchmarks import figures, report

    source = re.search(rf"<!-- {name}: drawn from (\S+) -->", README)
    assert source, "run python -m fastflat.benchmarks.figures"
    result = report.read(ROOT / source[1])
    assert figures.insert(README, name, source[1], getattr(figures, table)(result)) == README
    assert result["machine"]["cpu"] in README


def test_commands_named_are_commands():
    from fastflat.cli import COMMANDS

    assert set(re.findall(r"`fastflat (\w+)", README)) == set(COMMANDS)


def test_relative_links_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target

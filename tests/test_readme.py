# SPDX-License-Identifier: Apache-2.0
"""README: its code runs, its commands and links exist. Its tables: tests/test_docs.py."""

from __future__ import annotations

import re
from pathlib import Path

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


def test_commands_named_are_commands():
    from fastflat.cli import COMMANDS

    assert set(re.findall(r"`fastflat (\w+)", README)) == set(COMMANDS)


def test_relative_links_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target

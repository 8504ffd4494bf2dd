# SPDX-License-Identifier: Apache-2.0
"""Runs triton_interpreted.py under Triton's interpreter in a process of its own and reports each of its tests."""

import ast
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

pytestmark = pytest.mark.triton

pytest.importorskip("triton")

INTERPRETED = Path(__file__).with_name("triton_interpreted.py")
NAMES = [
    node.name
    for node in ast.parse(INTERPRETED.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Failures by test function: {name: {case: message}}; a message is empty when the case passed."""
    report = tmp_path_factory.mktemp("interpreted") / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", str(INTERPRETED)]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert report.exists(), done.stdout + done.stderr
    cases = {}
    for case in ET.parse(report).iter("testcase"):
        problems = [child.get("message") + "\n" + (child.text or "") for child in case]
        cases.setdefault(case.get("name").split("[")[0], {})[case.get("name")] = "\n".join(problems)
    assert set(cases) == set(NAMES), done.stdout
    return cases


@pytest.mark.parametrize("name", NAMES)
def test_interpreted(name, results):
    wrong = {case: message for case, message in results[name].items() if message}
    assert results[name]
    assert not wrong, "\n".join(f"{case}: {message}" for case, message in wrong.items())

# SPDX-License-Identifier: Apache-2.0
"""Runs triton_interpreted.py and those of the families under Triton's interpreter, in a process each, and reports each
of their tests."""

import ast
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fastflat import _ops

pytestmark = pytest.mark.triton

pytest.importorskip("triton")

HERE = Path(__file__).parent
NAMES_OF_FAMILIES = [family.ROWS[0].family for family in _ops.FAMILIES]
MODULES = [HERE / "triton_interpreted.py", *(HERE / f"triton_interpreted_{name}.py" for name in NAMES_OF_FAMILIES)]
MODULES = [module for module in MODULES if module.exists()]


def _tests(module):
    tree = ast.parse(module.read_text())
    return [n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")]


NAMES = [pytest.param(module, name, id=f"{module.stem}-{name}") for module in MODULES for name in _tests(module)]


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    """Failures of a module by test function: {name: {case: message}}; a message is empty when the case passed."""

    def run(module, report):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", str(module)]
        # The interpreter runs small arrays: a process a core is faster than threads.
        env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert report.exists(), done.stdout + done.stderr
        cases = {}
        for case in ET.parse(report).iter("testcase"):
            problems = [child.get("message") + "\n" + (child.text or "") for child in case]
            cases.setdefault(case.get("name").split("[")[0], {})[case.get("name")] = "\n".join(problems)
        assert set(cases) == set(_tests(module)), done.stdout
        return cases

    ours = (item for item in request.session.items if item.module is request.module)
    wanted = dict.fromkeys(item.callspec.params["module"] for item in ours if hasattr(item, "callspec"))
    folder = tmp_path_factory.mktemp("interpreted")
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        runs = {module: pool.submit(run, module, folder / f"{module.stem}.xml") for module in wanted}
        yield lambda module: runs[module].result()


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_interpreted(module, name, results):
    cases = results(module)[name]
    wrong = {case: message for case, message in cases.items() if message}
    assert cases
    assert not wrong, "\n".join(f"{case}: {message}" for case, message in wrong.items())

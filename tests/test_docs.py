# SPDX-License-Identifier: Apache-2.0
"""Documentation pages: their code runs, their links lead somewhere, they speak of the versions that are installed."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
PEERS = ("brevitas", "modelopt", "torchao")


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def packages(code: str) -> set[str]:
    """Top-level packages that a block imports."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def cases() -> list:
    return [pytest.param(page, i, id=f"{page.stem}-{i}") for page in PAGES for i in range(len(blocks(page)))]


@pytest.mark.parametrize(("page", "number"), cases())
def test_python_blocks_run(page, number, monkeypatch):
    """Each after the page's first, which is common to all."""
    first, code = blocks(page)[0], blocks(page)[number]
    monkeypatch.setenv("BREVITAS_JIT", "0")
    logging.disable(logging.WARNING)
    try:
        if "fastflat.benchmarks" in first and importlib.util.find_spec("fastflat.benchmarks") is None:
            pytest.skip("fastflat.benchmarks is not installed: pip install --no-build-isolation -e .")
        for name in packages(code) & set(PEERS):
            pytest.importorskip(name, reason=f"{name} is not installed: make peers")
        if ".onnx" in code:
            pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'fastflat[export]'")
        if "init_process_group" in code:
            # Its threads outlive the group: not in a process that tests other things, and not at once (tests/ranks.py).
            text = f"{first}\nfrom tests.ranks import leave\n{code.replace('dist.destroy_process_group', 'leave')}"
            done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, cwd=ROOT)
            assert done.returncode == 0, done.stderr
            return
        names: dict = {}
        for text in (first, code) if number else (first,):
            exec(compile(text, page.name, "exec"), names)
    finally:
        logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages as built, every warning (a link that leads nowhere, a page outside the menu) an error."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_built_and_in_the_menu(site):
    menu = (site / "index.html").read_text()
    for page in PAGES:
        target = str(page.relative_to(ROOT / "docs").with_suffix(".html"))
        assert (site / target).is_file()
        assert f'href="{target}"' in menu or target == "index.html"


@pytest.mark.parametrize("module", ["curvature", "data", "distributed", "evaluate", "export", "functional",
                                    "integrations", "methods", "optim", "quant"])  # fmt: skip
def test_reference_has_every_public_name(site, module):
    page = (site / "api" / f"{'fastflat' if module == 'functional' else module}.html").read_text()
    public = importlib.import_module(f"fastflat.{module}")
    names = [n for n in public.__all__ if callable(getattr(public, n))]
    found = {n for n in names if re.search(rf'id="fastflat\.[\w.]*\b{n}"', page)}
    assert found == set(names), f"without a docstring, or not shown: {sorted(set(names) - found)}"


def test_every_peer_has_an_example():
    shown = set().union(*(packages(code) for code in blocks(ROOT / "docs" / "peers.md")))
    assert set(PEERS) <= shown


def test_versions_are_those_that_make_peers_installs():
    pins = dict(re.findall(r'"(brevitas|nvidia-modelopt|torchao)==([\d.]+)"', (ROOT / "pyproject.toml").read_text()))
    assert set(pins) == {"brevitas", "nvidia-modelopt", "torchao"}
    text = (ROOT / "docs" / "peers.md").read_text()
    for name, words in (("torchao", "torchao"), ("brevitas", "Brevitas"), ("nvidia-modelopt", "Model-Optimizer")):
        assert f"{words} {pins[name]}" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_relative_links_exist(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


DRAWN = [
    (page, name, source)
    for page in (ROOT / "README.md", *PAGES)
    for name, source in re.findall(r"<!-- ([\w-]+): drawn from (\S+) -->", page.read_text())
]


@pytest.mark.parametrize(("page", "name", "source"), DRAWN, ids=[f"{p.stem}-{n}" for p, n, _ in DRAWN])
def test_tables_are_drawn_from_the_committed_results(page, name, source):
    figures = pytest.importorskip("fastflat.benchmarks.figures", reason="pip install --no-build-isolation -e .")
    from fastflat.benchmarks import report

    result, text = report.read(ROOT / source), page.read_text()
    assert figures.insert(text, name, source, figures.TABLES[name](result)) == text
    assert result["machine"].get("gpu", result["machine"]["cpu"]) in text


def test_every_table_is_shown():
    figures = pytest.importorskip("fastflat.benchmarks.figures", reason="pip install --no-build-isolation -e .")
    assert {name for _, name, _ in DRAWN} == set(figures.TABLES)

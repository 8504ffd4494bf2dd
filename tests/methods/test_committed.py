# SPDX-License-Identifier: Apache-2.0
"""The committed report of the methods is the one that the committed runs give."""

from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="pip install 'fastflat[demo]'")

from fastflat import methods
from fastflat.cli import _methods_markdown, _methods_report
from fastflat.methods.lab import study

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "benchmarks" / "results" / "methods"
AGAIN = "; fastflat methods report --out benchmarks/results/methods --markdown docs/methods-report.md --table README.md"


@pytest.fixture(scope="module")
def entries():
    return _methods_report.entries(RUNS)


def test_page_and_table_are_drawn_from_the_runs(entries):
    page, figures = _methods_markdown.page(entries)
    assert (ROOT / "docs" / "methods-report.md").read_text() == page, "the page is old" + AGAIN
    readme = (ROOT / "README.md").read_text()
    assert _methods_markdown.inserted(readme, entries, "docs/methods-report.md") == readme, "the table is old" + AGAIN
    shown = {path.name for path in (ROOT / "docs" / "figures").glob("*.svg")}
    assert set(figures) <= shown


@pytest.mark.parametrize("name", methods.names())
def test_runs_are_of_todays_settings(name):
    """What was measured is what the code does today: another budget, grid or data needs other runs."""
    experiment = methods.get(name).experiment
    for record in study.read(study.file(RUNS, name, quick=False)):
        assert record.settings == study.fingerprint(experiment, experiment.full)


def test_every_committed_run_belongs_to_a_method():
    stems = {path.stem.removesuffix("-profile") for path in RUNS.glob("*.jsonl")}
    assert stems <= set(methods.names())

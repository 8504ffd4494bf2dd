# SPDX-License-Identifier: Apache-2.0
"""The user's guide says what its runs give, and the committed page is drawn from the committed runs."""

import re
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="pip install 'fastflat[demo]'")

from fastflat.cli import _methods_guide
from fastflat.methods.lab.goals import search
from fastflat.methods.lab.goals.catalogue import GOALS
from fastflat.methods.lab.records import read

from .goal_records import SEARCH, train

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "benchmarks" / "results" / "methods-goals.jsonl"
AGAIN = f"; fastflat methods guide --runs {RUNS.relative_to(ROOT)} --markdown docs/methods-guide.md"


def test_the_committed_page_is_drawn_from_the_committed_runs():
    page, figures = _methods_guide.page(read(RUNS), search.FULL, f"`{RUNS.relative_to(ROOT)}`")
    assert (ROOT / "docs" / "methods-guide.md").read_text() == page, "the page is old" + AGAIN
    for name in figures:
        assert (ROOT / "docs" / "figures" / name).is_file(), f"no {name}" + AGAIN


def test_committed_runs_are_of_todays_settings():
    records = read(RUNS)
    assert all(record.settings == search.FULL.settings for record in records)
    assert not records or search.whole(records, search.FULL)


def test_without_runs_no_number_is_said():
    page, figures = _methods_guide.page([], search.FULL)
    assert "**Nothing ran yet**, so that this page has no answer. `fastflat methods goals` runs it" in page
    assert not figures
    assert not re.search(r"\d %\W*\||±|\*\*Take", page)
    for goal in GOALS.values():
        assert f"## {goal.title}\n" in page


def numbers(cell):
    """The lines that a cell names: ``3-5, 9``."""
    spans = [tuple(map(int, span.split("-"))) for span in re.findall(r"\d+(?:-\d+)?", cell)]
    return {i for span in spans for i in range(span[0], span[-1] + 1)}


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return list(search.run(SEARCH, tmp_path_factory.mktemp("guide") / "runs.jsonl", train=train))


def test_a_search_that_is_not_finished_says_how_far_it_is(records):
    page, figures = _methods_guide.page(records[:30], SEARCH)
    assert "**The search is not finished: 30 of 51 trainings ran**" in page
    assert not figures
    assert "±" not in page


def test_the_page_says_what_the_runs_give(records, monkeypatch):
    """Tempered, SAM and DiGN give 2, 3 and 1 points, and half a one together; a seed moves all alike."""
    draw = _methods_guide._figure
    monkeypatch.setattr(_methods_guide, "_figure", lambda r, name, *a: draw(r, name, *a) if name == "cost" else "<svg>")
    page, figures = _methods_guide.page(records, SEARCH)
    lines = page.splitlines()
    gains = ", ".join(f"{bits} bits **+6.5 ± 0.0**" for bits in (8, 4, 3, 2))
    title = "Accuracy at the width it is trained at"
    link = f"[{title}](#accuracy-at-the-width-it-is-trained-at)"

    def rows(kind, condition, *combinations):
        """Lines of the file, which the page must name."""
        arms = {f"{condition}: {c}" for c in combinations}
        return [i for i, r in enumerate(records, 1) if r.kind == kind and r.arm in arms]

    (short,) = (line for line in lines if line.startswith(f"| {link} | tempered + sam + dign | {gains} | 4.00 x | "))
    conditions = ("bits8", "bits4", "clean", "bits2")
    wanted = {i for c in conditions for i in rows("run", c, "tempered + sam + dign", "lsq + sgd + none")}
    assert numbers(short.split(" | ")[-1]) == wanted
    over = "tempered: **+4.5 ± 0.0**; sam: **+3.5 ± 0.0**; dign: **+5.5 ± 0.0**"
    assert any(line.startswith(f"| {title} | tempered + sam + dign | {over} | together | ") for line in lines)
    flat = "| [A flat minimum](#a-flat-minimum) | lsq + gadam + none | **-5 ± 0** | 1.00 x | "
    assert any(line.startswith(flat) for line in lines)
    (alone,) = {line for line in lines if line.startswith("| tempered + sgd + none | – | – | 82.0 % (**+2.0 ± 0.0**)")}
    assert numbers(alone.split(" | ")[-1]) == set(rows("run", "clean", "tempered + sgd + none"))
    (searched,) = (line for line in lines if line.startswith("| tempered + sgd + none | 1 | "))
    assert set(rows("search", "clean", "tempered + sgd + none")) < numbers(searched.split(" | ")[-1])
    assert "**Take tempered + sam + dign** (lr 0.05, rho 0.2, smax 0.6): it gains" in page
    tuned = {tuple(line.split(" | ")[:4]): numbers(line.split(" | ")[-1]) for line in lines if line.count(" | ") == 4}
    assert tuned["| sgd", "lr", "0.1", "0.025, 0.05, 0.1, 0.2"] == set(rows("tune", "clean", "lsq + sgd + none"))
    assert tuned["| sam", "rho", "0.2", "0.05, 0.2"] == set(rows("tune", "clean", "lsq + sam + none"))
    assert set(figures) == {f"goal-{name}.svg" for name in GOALS}
    assert all(f"(figures/{name})" in page for name in figures)
    assert "tempered + sam + dign, 4.00 x" in figures["goal-cost.svg"]


def test_where_nothing_gains_the_baseline_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(_methods_guide, "_figure", lambda *args: "<svg/>")

    def alike(combination, name, seed, at, size, part):
        found = train(search.BASELINE, name, seed, {"lr": 0.1}, size, part)
        if part == "test" and combination != search.BASELINE:
            found = {k: v + (-1) ** seed * 0.001 for k, v in found.items()}
        return found

    page, _ = _methods_guide.page(list(search.run(SEARCH, tmp_path / "runs.jsonl", train=alike)), SEARCH)
    assert "**Take" not in page
    assert page.count("**Stay with the baseline**") == len(GOALS)

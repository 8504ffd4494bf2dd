# SPDX-License-Identifier: Apache-2.0
"""``fastflat methods``."""

import json
import re

import pytest

from fastflat import methods
from fastflat.methods.lab.goals import search

from ..methods import goal_records, toy


@pytest.fixture
def one(monkeypatch):
    """The registry holds the toy alone; a function changes it."""

    def use(**options):
        method, ran = toy.make(**options)
        monkeypatch.setattr(methods, "get", lambda name: method)
        monkeypatch.setattr(methods, "methods", lambda: (method,))
        return ran

    return use


def test_list(command, tmp_path):
    status, out, _ = command("methods", "list", "--json", tmp_path / "a.json")
    assert status == 0
    assert len(out.splitlines()) == len(methods.names())
    assert {row["name"] for row in json.loads((tmp_path / "a.json").read_text())} == set(methods.names())


@pytest.mark.parametrize("name", methods.names())
def test_show(command, name):
    status, out, _ = command("methods", "show", name)
    assert status == 0
    for word in (methods.get(name).arxiv, "```python", "Claim: ", "Recipe: ", "Experiment: "):
        assert word in out


def test_check(command, one, tmp_path):
    one()
    status, out, _ = command("methods", "check", "--json", tmp_path / "a.json")
    assert status == 0
    assert "ok   one: want 1, got 1" in out
    assert json.loads((tmp_path / "a.json").read_text())[0]["passed"] is True
    one(checked=1.5)
    status, out, _ = command("methods", "check", "toy")
    assert status == 1
    assert "FAIL one: want 1, got 1.5" in out
    assert "0 of 1" in out


def test_run_and_report(command, one, tmp_path):
    ran = one(better=9.0)
    status, out, _ = command("methods", "run", "toy", "--out", tmp_path / "r")
    assert status == 0
    assert "toy: reproduced" in out
    assert len(ran) == 14
    ran.clear()
    assert command("methods", "run", "toy", "--out", tmp_path / "r")[0] == 0
    assert not ran
    (tmp_path / "read.md").write_text("before\n<!-- methods: start -->\nold\n<!-- methods: end -->\nafter\n")
    status, out, _ = command(
        "methods", "report", "--out", tmp_path / "r", "--markdown", tmp_path / "t.md", "--table", tmp_path / "read.md"
    )
    assert status == 0
    assert "1 of 1 methods have runs" in out
    page = (tmp_path / "r" / "report.html").read_text()
    assert "On &lt;toys&gt;" in page
    assert "&lt;new&gt;" in page
    assert "<new>" not in page
    assert "<toys>" not in page
    assert not re.search(r"""(src|href)=["'](?!#|https://arxiv)""", page.replace("xlink:href", "href"))
    (entry,) = json.loads((tmp_path / "r" / "report.json").read_text())
    assert entry["verdict"] == "reproduced"
    assert entry["costs"] == []
    text = (tmp_path / "t.md").read_text()
    assert "## toy" in text
    assert r"On \<toys\> ([2101.00001](https://arxiv.org/abs/2101.00001))" in text
    assert "**Answer: reproduced.**" in text
    assert "(figures/toy.svg)" in text
    assert r"- chosen on validation examples: base: lr 0.1; \<new\>: lr 0.3" in text
    assert "at an end of what was tried" not in text
    assert (tmp_path / "figures" / "toy.svg").read_text().count("<svg") == 1
    lines = (tmp_path / "read.md").read_text().splitlines()
    assert [lines[0], lines[-1], len(lines)] == ["before", "after", 7]
    assert lines[4] == (
        r"| [toy](t.md#toy) | On \<toys\> ([2101.00001](https://arxiv.org/abs/2101.00001)) | reproduced"
        r" | - |"
    )


def test_all_without_names(command, one, tmp_path):
    one()
    status, out, _ = command("methods", "run", "--out", tmp_path)
    assert status == 0
    assert "toy: reproduced" in out


def test_a_profile_stands_in_the_report(command, one, tmp_path, monkeypatch):
    """The time of a step comes from rounds beside each other, not from runs hours apart."""
    ran = one(better=9.0)
    command("methods", "run", "toy", "--out", tmp_path)
    ran.clear()
    status, out, _ = command("methods", "profile", "--rounds", "3", "--out", tmp_path)
    assert status == 0
    assert out == "toy: <new> 2.00 x a step of base, its passes 2.00 x (+0 %)\n"
    assert [(name, seed, steps) for name, seed, _, steps in ran] == [
        (name, n, steps) for n in range(3) for name, steps in (("base", 11), ("<new>", 5))
    ]
    kept = (tmp_path / "toy-profile.jsonl").read_text()
    (tmp_path / "toy-profile.jsonl").write_text(kept.replace('"seconds_per_step": 2.0', '"seconds_per_step": 2.5'))
    command("methods", "report", "--out", tmp_path)
    (entry,) = json.loads((tmp_path / "report.json").read_text())
    assert entry["costs"] == [{"arm": "<new>", "measured": 2.5, "passes": 2.0}]
    assert len(entry["runs"]) == 14


def test_quick_runs_are_named_so(command, one, tmp_path):
    ran = one()
    status, out, _ = command("methods", "run", "toy", "--quick", "--out", tmp_path)
    assert status == 0
    assert "too few runs" in out
    assert [(name, steps) for name, _, _, steps in ran] == [("base", 11), ("<new>", 5)]
    command("methods", "report", "--out", tmp_path)
    assert "(quick settings)" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "bitta"], "NAME must be that of a method, got 'bitta'; did you mean bitat?"),
        (["check", "sam", "--json", "{tmp}/no/a.json"], "must name a file in an existing folder"),
        (["report", "--out", "{tmp}"], "must hold runs, got none; fastflat methods run NAME makes them"),
        (["run", "sam", "--out", "{tmp}/file"], "--out must be a folder, got the file"),
        (["run", "sam", "--seeds", "0"], "0 is not in the range"),
        (["profile", "sam", "--rounds", "0"], "0 is not in the range"),
        (["goals", "--runs", "{tmp}"], "--runs must be a file, got the folder"),
        (["guide", "--runs", "{tmp}/none", "--markdown", "{tmp}/a.md"], "--runs must be a file of runs, got"),
        (["guide", "--markdown", "{tmp}/no/a.md"], "must name a file in an existing folder"),
        (["guide"], "Missing option '--markdown'"),
        (["guide", "--runs", "{tmp}/file", "--markdown", "{tmp}/a.md"], "line 1 of"),
    ],
)
def test_bad_input_gets_one_line(command, tmp_path, arguments, message):
    (tmp_path / "file").write_text("kept")
    status, _, err = command("methods", *(a.format(tmp=tmp_path) for a in arguments))
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "kept"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_broken_file_of_runs(command, one, tmp_path):
    one()
    (tmp_path / "toy.jsonl").write_text("not JSON\n")
    for words in (["run", "toy"], ["report"]):
        status, _, err = command("methods", *words, "--out", tmp_path)
        assert status == 2
        assert "line 1 of" in err
        assert err.count("\n") == 1
    assert (tmp_path / "toy.jsonl").read_text() == "not JSON\n"


def test_a_page_without_marks_stays_as_it_is(command, one, tmp_path):
    one()
    command("methods", "run", "toy", "--out", tmp_path)
    (tmp_path / "read.md").write_text("no marks\n")
    before = sorted(tmp_path.iterdir())
    status, _, err = command("methods", "report", "--out", tmp_path, "--table", tmp_path / "read.md")
    assert status == 2
    assert "must hold the lines <!-- methods: start --> and" in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "read.md").read_text() == "no marks\n"


def test_goals_and_guide(command, tmp_path, monkeypatch):
    made = []

    def counted(*args):
        made.append(args)
        return goal_records.train(*args)

    monkeypatch.setattr(search, "QUICK", goal_records.SEARCH)
    monkeypatch.setattr(search, "_measured", counted)
    runs = tmp_path / "new" / "runs.jsonl"
    status, out, _ = command("methods", "goals", "--quick", "--runs", runs)
    assert status == 0
    count = len(runs.read_text().splitlines())
    assert f"{count} trainings in {runs}" in out
    assert "search clean: tempered + sam + dign, seed 1000: validation_accuracy 0.865" in out
    assert made
    made.clear()
    assert command("methods", "goals", "--quick", "--runs", runs)[0] == 0
    assert not made
    status, out, _ = command("methods", "guide", "--quick", "--runs", runs, "--markdown", tmp_path / "g.md")
    assert status == 0
    assert f"{count} trainings, 8 figures" in out
    assert "# Which method for which goal" in (tmp_path / "g.md").read_text()
    figures = list((tmp_path / "figures").glob("goal-*.svg"))
    assert len(figures) == 8
    assert all(path.read_text().startswith("<svg") for path in figures)

# SPDX-License-Identifier: Apache-2.0
"""The runner of ``make matrix``: what it counts, records, goes on from, and says when something stands in the way."""

import json

import pytest

from build_tools import matrix


@pytest.mark.parametrize(
    ("said", "want"),
    [
        ("....\n12 passed, 3 skipped in 4.2s\nneed a GPU: 3 tests did not run\n", (12, 0, 3)),
        ("FAILED a::b - 3 passed\n== 1 failed, 2 passed, 1 error in 1s ==", (2, 2, 0)),
        ("no tests ran in 0.1s", (0, 0, 0)),
        ("", (0, 0, 0)),
    ],
)
def test_counts(said, want):
    assert tuple(matrix.counts(said).values()) == want


def found(green=True, **changes):
    return {
        "python": "3.12.1",
        "torch": "2.10.0",
        "same_libraries": True,
        "passed": 9,
        "failed": 0,
        "skipped": 1,
        "green": green,
        "seconds": 1,
        "date": "2026-01-01",
        **changes,
    }


def test_goes_on_from_its_record_until_the_wheel_changes(tmp_path, monkeypatch, capsys):
    wheel, record, ran = tmp_path / "x.whl", tmp_path / "records" / "matrix.json", []
    wheel.write_bytes(b"one")
    monkeypatch.setattr(matrix, "interpreter", lambda name: f"/bin/{name}")

    def pair(wheel, python, torch, tests, folder, workers):
        ran.append((python, torch))
        return found(green=torch != "2.11.0", failed=int(torch == "2.11.0"))

    monkeypatch.setattr(matrix, "pair", pair)
    words = [str(wheel), "--pythons", "p1 p2", "--torches", "2.10.0 2.11.0", "--tests", "t", "--record", str(record)]
    assert matrix.main(words) == 1
    assert ran == [(f"/bin/{p}", t) for p in ("p1", "p2") for t in ("2.10.0", "2.11.0")]
    kept = json.loads(record.read_text())
    assert (kept["wheel"], len(kept["pairs"])) == ("x.whl", 4)
    assert kept["pairs"][0]["asked"] == {"python": "p1", "torch": "2.10.0"}
    assert capsys.readouterr().out.splitlines()[1].endswith("9 passed, 1 failed, 1 skipped, the same libraries, 1 s")
    ran.clear()
    assert matrix.main(words) == 1
    assert {t for _, t in ran} == {"2.11.0"}  # what was green is not repeated
    wheel.write_bytes(b"two")
    ran.clear()
    matrix.main(words)
    assert len(ran) == 4


def test_one_line_where_something_is_missing(tmp_path, capsys):
    wheel = tmp_path / "x.whl"
    rest = ["--pythons", "python9.9", "--torches", "2.10.0", "--tests", "t"]
    assert matrix.main([str(wheel), *rest]) == 2
    wheel.touch()
    assert matrix.main([str(wheel), *rest]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("fastflat: the wheel must exist, got ")
    assert said[1] == "fastflat: PYTHONS must name installed Pythons, got 'python9.9'"
    shim = tmp_path / "python9.9"
    shim.write_text("#!/bin/sh\necho 'python9.9: switch it on first' >&2\necho more >&2\nexit 127\n")
    shim.chmod(0o755)
    assert matrix.main([str(wheel), "--pythons", str(shim), *rest[2:]]) == 2
    want = f"fastflat: PYTHONS must name Pythons that start, got '{shim}': python9.9: switch it on first\n"
    assert capsys.readouterr().err == want


def test_an_environment_goes_when_its_torch_cannot_be_had(tmp_path, monkeypatch):
    called = []

    def call(command):
        called.append(command)
        (tmp_path / "env").mkdir(parents=True, exist_ok=True)
        if "install" in command:
            raise matrix.MatrixError("no torch==0.1")

    monkeypatch.setattr(matrix, "_call", call)
    with pytest.raises(matrix.MatrixError, match="no torch"):
        matrix.pair(tmp_path / "x.whl", "python", "0.1", ["t"], tmp_path / "env", 1)
    assert called[1][-len(matrix.NEEDS) - 1] == "torch==0.1"
    assert not (tmp_path / "env").exists()


def test_the_table_of_a_page():
    pairs = [found(), found(torch="2.14.1", date="2026-01-02"), found(python="3.13.0", failed=2, same_libraries=False)]
    record = {"wheel": "x.whl", "pairs": pairs}
    assert matrix.table(record).splitlines() == [
        "`x.whl`, 2026-01-01 to 2026-01-02:",
        "",
        "| Python | torch 2.10.0 | torch 2.14.1 |",
        "| --- | --- | --- |",
        "| 3.12.1 | 9 passed, 0 failed | 9 passed, 0 failed |",
        "| 3.13.0 | 9 passed, 2 failed, other libraries | not run |",
    ]
    page = "before\n<!-- matrix: start -->\nold\n<!-- matrix: end -->\nafter\n"
    once = matrix.inserted(page, record, "x.md")
    assert once.startswith("before\n<!-- matrix: start -->\n\n`x.whl`")
    assert once.endswith("end -->\nafter\n")
    assert "old" not in once
    assert matrix.inserted(once, record, "x.md") == once
    with pytest.raises(matrix.MatrixError, match=r"x\.md must hold the lines"):
        matrix.inserted("no marks", record, "x.md")


def test_a_page_is_written_when_the_pairs_are_done(tmp_path, monkeypatch, capsys):
    wheel, record, page = tmp_path / "x.whl", tmp_path / "matrix.json", tmp_path / "x.md"
    wheel.write_bytes(b"one")
    page.write_text("".join(matrix.MARKS))
    monkeypatch.setattr(matrix, "interpreter", lambda name: name)
    monkeypatch.setattr(matrix, "pair", lambda *_: found())
    words = [str(wheel), "--pythons", "p", "--torches", "t", "--tests", "t", "--page", str(page)]
    assert matrix.main(words) == 2
    assert capsys.readouterr().err == "fastflat: a page is drawn from a record: --record must be given with --page\n"
    assert matrix.main([*words, "--record", str(record)]) == 0
    assert "| 3.12.1 | 9 passed, 0 failed |" in page.read_text()


def test_the_committed_record_is_whole_and_drawn():
    """Every Python that is supported under the oldest and the newest torch: one wheel, green, the same libraries."""
    record = json.loads((matrix.ROOT / "benchmarks" / "results" / "wheels" / "matrix.json").read_text())
    pairs = {(p["python"].rpartition(".")[0], p["torch"].partition("+")[0]): p for p in record["pairs"]}
    assert set(pairs) == {(p, t) for p in ("3.10", "3.11", "3.12", "3.13") for t in ("2.10.0", "2.14.1")}
    for found in pairs.values():
        assert found["green"]
        assert found["same_libraries"]
        assert found["passed"] > 4000
        assert found["failed"] == 0
    page = (matrix.ROOT / "docs" / "install.md").read_text()
    assert matrix.inserted(page, record, "install.md") == page

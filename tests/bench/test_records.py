# SPDX-License-Identifier: Apache-2.0
"""Records: their schema, what is refused, the comparison of two, the page of one."""

import copy
import html
import json
import re
from pathlib import Path

import pytest
import torch

from fastflat.cli import bench

ROOT = Path(__file__).parents[2]
COMMITTED = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
CPU = torch.device("cpu")


@pytest.fixture
def validator():
    jsonschema = pytest.importorskip("jsonschema", reason="pip install 'fastflat[test]'")
    schema = json.loads(bench.package("report").SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def record(benchmarks, **fields):
    """Two peers of one case and one that has no form of it."""
    case = {
        "family": "fake_quantize", "device": "cpu", "threads": 1, "dtype": "fp32", "granularity": "channel",
        "passes": "both", "elements": 2**12, "shape": [64, 64], "copy_seconds": 1e-6,
    }  # fmt: skip
    numbers = {
        "seconds": 4e-6, "q1": 3.9e-6, "q3": 4.1e-6, "best": 3.8e-6, "rounds": 5, "calls": 9, "timing": "host",
        "bytes": 81920, "operations": 65536, "bandwidth": 2e10, "elements_per_second": 1e9, "copies": 4.0,
        "of_copy_bandwidth": 0.6, "of_roofline": 0.6, "over_floor": None, "peak_bytes": 16384, "buffers": 1,
    }  # fmt: skip
    rows = [{**case, "peer": "fastflat", **numbers}, {**case, "peer": "eager", **numbers, "seconds": 4.05e-6}]
    rows.append({**case, "peer": "torchao", "unsupported": "ValueError: torchao is not installed"})
    facts = benchmarks.machine.describe(CPU)
    effort = vars(benchmarks.measure.QUICK)
    return {
        "format": 1, "benchmark": "fake_quantize", "machine": facts, "device": "cpu", "allocator": "default",
        "effort": effort, "rows": rows, **fields,
    }  # fmt: skip


def save(path, result):
    path.write_text(json.dumps(result))
    return path


# Schema ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_records_keep_the_schema_and_are_read(validator, path):
    assert [error.message for error in validator.iter_errors(json.loads(path.read_text()))] == []
    assert bench.package("report").read(path)["rows"]


def test_there_are_committed_records():
    assert len(COMMITTED) >= 7


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.update(format=2),
        lambda r: r.pop("machine"),
        lambda r: r["machine"].pop("cpu"),
        lambda r: r["rows"][0].update(seconds=0),
        lambda r: r["rows"][0].update(seconds="fast"),
        lambda r: r["rows"][0].pop("seconds"),
        lambda r: r["rows"][0].pop("peer"),
        lambda r: r["rows"][0].update(surprise=1),
        lambda r: r["rows"][0].update(timing="by eye"),
        lambda r: r.update(rows=None),
    ],
)
def test_the_schema_can_fail(benchmarks, validator, change):
    result = json.loads(json.dumps(record(benchmarks)))
    assert not list(validator.iter_errors(result))
    change(result)
    assert list(validator.iter_errors(result))


def test_every_field_of_the_schema_is_described():
    schema = json.loads(bench.package("report").SCHEMA.read_text())
    for name, part in schema["$defs"].items():
        for field, what in part.get("properties", {}).items():
            assert what.get("description"), f"{name}.{field}"


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("", "something else"),
        ("[]", "something else"),
        ("\x00\xff", "something else"),
        ("[" * 100000, "something else"),
        ('{"rows": []}', "something else"),
        ('{"format": 99, "rows": []}', "format 99"),
        ('{"format": 1, "rows": []}', "results without their machine"),
    ],
)
def test_other_files_are_refused_in_one_line(run, tmp_path, text, got):
    file, page = tmp_path / "x.json", tmp_path / "x.html"
    file.write_text(text, encoding="latin-1")
    for arguments in (("compare", file, file), ("page", file, page)):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert err == f"fastflat: bench: {file} must be results of format 1, got {got}\n"
    assert not page.exists()


@pytest.mark.parametrize(
    ("change", "got"),
    [
        ({"rows": [1]}, "rows that are no list of objects"),
        ({"rows": {}}, "rows that are no list of objects"),
        ({"rows": [{"peer": "a", "seconds": -1}]}, "seconds -1 in row 0 of rows"),
        ({"rows": [{"peer": "a", "q1": None}]}, "q1 None in row 0 of rows"),
        ({"rows": [{"peer": "a", "best": True}]}, "best True in row 0 of rows"),
        ({"rows": [{}]}, "row 0 without its peer"),
        ({"roofline": 3}, "roofline that are no list of objects"),
        ({"machine": {"cpu": "x"}}, "results without their machine"),
    ],
)
def test_records_that_were_damaged_are_refused(benchmarks, tmp_path, change, got):
    file = save(tmp_path / "x.json", {**record(benchmarks), **change})
    with pytest.raises(ValueError, match=re.escape(f"{file} must be results of format 1, got {got}")):
        benchmarks.report.read(file)


# Comparison -----------------------------------------------------------------------------------------------------------


def test_compare(run, tmp_path, benchmarks):
    """Ratios of medians with their quartiles' verdict, rows of one record only, machines that differ."""
    old, new = record(benchmarks), record(benchmarks)
    new["rows"] = copy.deepcopy(old["rows"])
    new["rows"][0] |= {"seconds": 3e-6, "q1": 2.9e-6, "q3": 3.1e-6, "copies": 2.0}
    old["rows"].append({**old["rows"][0], "elements": 2**13})
    new["rows"].append({**new["rows"][0], "granularity": "tensor"})
    new["machine"] = {**old["machine"], "cpu": "another", "torch": "9.9"}
    code, out, _ = run("compare", save(tmp_path / "a", old), save(tmp_path / "b", new))
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    name = "fake_quantize cpu 2^12 fp32 channel both threads 1"
    assert [*name.split(), "fastflat", "4", "us", "3", "us", "0.75", "0.50", "faster"] in lines
    assert [*name.split(), "eager", "4.05", "us", "4.05", "us", "1.00", "1.00", "quartiles", "overlap"] in lines
    assert "2 rows in both: 1 faster, 1 quartiles overlap" in out
    assert "only in old (1): fake_quantize cpu 2^13 fp32 channel both threads 1 fastflat" in out
    assert "only in new (1): fake_quantize cpu 2^12 fp32 tensor both threads 1 fastflat" in out
    assert f"cpu differs: {old['machine']['cpu']} -> another" in out
    assert "torch differs" in out
    assert "other machines: of the two ratios" in out


@pytest.mark.parametrize(
    ("spans", "verdict"),
    [
        (((1.0, 2.0, 3.0), (2.5, 4.0, 5.0)), "quartiles overlap"),
        (((1.0, 2.0, 3.0), (3.0, 4.0, 5.0)), "quartiles overlap"),
        (((1.0, 2.0, 3.0), (3.1, 4.0, 5.0)), "slower"),
        (((3.1, 4.0, 5.0), (1.0, 2.0, 3.0)), "faster"),
    ],
)
def test_verdicts(benchmarks, spans, verdict):
    old, new = (dict(zip(("q1", "seconds", "q3"), span)) for span in spans)
    assert bench.package("comparison").Pair((), old, new).verdict == verdict


def test_records_that_share_nothing_are_refused(run, tmp_path, benchmarks):
    old, new = record(benchmarks), record(benchmarks)
    new["rows"] = [{**row, "elements": 2**20} for row in new["rows"]]
    code, _, err = run("compare", save(tmp_path / "a", old), save(tmp_path / "b", new))
    assert code == 2
    assert "must share a row, got none" in err


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_a_record_compared_with_itself_is_the_same_in_every_row(path):
    comparison, report = bench.package("comparison"), bench.package("report")
    result = report.read(path)
    found = comparison.compare(result, result)
    rows = [*result["rows"], *result.get("roofline", ())]
    assert len(found.pairs) == sum("seconds" in row for row in rows)  # no two rows have one key
    assert all(pair.ratio == 1 and pair.overlap for pair in found.pairs)
    assert (found.only_old, found.only_new, found.machines) == ([], [], [])


# Page -----------------------------------------------------------------------------------------------------------------

pytest.importorskip("plotly", reason="pip install 'fastflat[bench]'")


def figures(text):
    """What is drawn: the data of every figure of a page."""
    found = re.findall(r'<script type="application/json" data-figure="[\w-]+">(.*?)</script>', text, re.DOTALL)
    return [json.loads(figure) for figure in found]


def body(text):
    return text[text.index("\n<body>\n") :]


def test_page_shows_the_numbers_and_the_machine(run, tmp_path, benchmarks):
    file, page = save(tmp_path / "x.json", record(benchmarks)), tmp_path / "x.html"
    code, out, _ = run("page", file, page)
    assert (code, out) == (0, f"wrote {page}\n")
    text = page.read_text()
    assert html.escape(benchmarks.machine.line(benchmarks.machine.describe(CPU)).split(",")[0]) in body(text)
    times = figures(text)[0]
    assert [(trace["name"], trace["x"]) for trace in times["data"]] == [("fastflat", [4e-6]), ("eager", [4.05e-6])]
    assert times["data"][0]["error_x"]["array"] == pytest.approx([1e-7])
    assert times["layout"]["xaxis"]["title"]["text"] == "time of a call; whiskers: quartiles"
    for axis in ("tickvals", "ticktext"):
        assert len(times["layout"]["xaxis"][axis]) == len(times["layout"]["xaxis"]["tickvals"])
    assert "<td>4 us</td>" in body(text)
    assert not re.search(r'(?:src|href)="(?!#)', body(text))


def test_page_escapes_what_a_record_says(benchmarks):
    evil = '</script><script>alert("1")</script><img src=x onerror=alert(2)>'
    result = record(benchmarks)
    for row in result["rows"]:
        row |= {"granularity": evil, "peer": f"{row['peer']}{evil}"}
    result["machine"] = {**result["machine"], "cpu": evil}
    result |= {"allocator": evil, "benchmark": evil, "complete": False, "stopped": evil}
    text = body(bench.package("page").html(result))
    assert "alert(" in text
    assert "<script>alert" not in text
    assert "<img" not in text
    # plotly reads a subset of HTML in names: it gets entities.
    assert all("<" not in trace["name"] for figure in figures(text) for trace in figure["data"])


def test_sizes_have_a_menu_of_cases(benchmarks):
    result = record(benchmarks)
    result["rows"] = [
        {**row, "elements": 2**e, "granularity": g}
        for row in result["rows"] for e in (12, 14, 16) for g in ("tensor", "channel")
    ]  # fmt: skip
    drawn = [f for f in figures(bench.package("page").html(result)) if "updatemenus" in f["layout"]]
    assert [button["label"] for button in drawn[0]["layout"]["updatemenus"][0]["buttons"]] == ["tensor", "channel"]
    assert [trace["visible"] for trace in drawn[0]["data"]] == [True, True, False, False]
    assert drawn[0]["layout"]["xaxis"]["ticktext"] == ["2^12", "2^14", "2^16"]


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_records_have_a_page(path):
    page, report = bench.package("page"), bench.package("report")
    parts = page.parts(report.read(path))
    assert parts
    for part in parts:
        assert part["figures"]
        assert all(len(line) == len(part["head"]) for line in part["lines"])


def test_a_page_that_cannot_be_drawn_leaves_the_old_file(tmp_path, benchmarks, monkeypatch):
    page = bench.package("page")
    target = tmp_path / "x.html"
    target.write_text("old")
    monkeypatch.setattr(page, "html", lambda result: (_ for _ in ()).throw(KeyError("x")))
    with pytest.raises(KeyError):
        page.write(target, record(benchmarks))
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]

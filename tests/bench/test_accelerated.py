# SPDX-License-Identifier: Apache-2.0
"""bench accelerate: three forms of one step, what they compute and what the rows say."""

import copy
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import fastflat as ff
from fastflat.cli import bench

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*reduce_range")
NAMES = ("torch.ao", "torch.ao-unfused", "torchao", "brevitas", "lsq")


@pytest.mark.parametrize("name", NAMES)
def test_the_three_forms(benchmarks, name):
    """All quantizers are swapped and compute the same; without them the step is another."""
    models = bench.package("peer_models")
    package, make = models.SUBJECTS[name]
    pytest.importorskip(package, reason=f"{package} is not installed: make peers")
    subject = make(2)
    subject.loss(subject.model)
    theirs, ours, plain = subject.model, copy.deepcopy(subject.model), subject.without(subject.model)
    report = ff.accelerate(ours)
    assert report.swapped
    assert not report.left
    torch.manual_seed(0)
    batch = torch.randn(2, 128, 512) if name == "torchao" else torch.randn(2, 3, 32, 32)
    expected, found = theirs(batch), ours(batch)
    assert torch.equal(expected, found)
    assert not torch.allclose(expected, plain(batch))


def test_rows_and_table(benchmarks, tmp_path, monkeypatch):
    accelerated = bench.package("accelerated")
    monkeypatch.setattr(accelerated, "_SETTLING", 1)
    file = tmp_path / "accelerate.json"
    options = ["accelerate", "--networks", "lsq", "--batch", "2", "--threads", "1", "--quick", "--json", str(file)]
    result = CliRunner().invoke(bench.bench, options)
    assert result.exit_code == 0, result.output
    record = json.loads(file.read_text())
    jsonschema = pytest.importorskip("jsonschema", reason="pip install 'fastflat[test]'")
    schema = Path(accelerated.__file__).with_name("schema.json")
    jsonschema.validate(record, json.loads(schema.read_text()))
    rows = {row["peer"]: row for row in record["rows"]}
    assert list(rows) == ["fp32", "theirs", "fastflat"]
    assert rows["fastflat"]["speedup"] > 0
    assert rows["fastflat"]["of_cap"] > 0
    assert "of the cap" in result.output


def test_a_library_that_is_not_there(benchmarks, monkeypatch):
    accelerated = bench.package("accelerated")
    monkeypatch.setitem(accelerated.SUBJECTS, "torchao", ("no_such_library", None))
    rows = accelerated.rows("torchao", 1, bench.package("measure").QUICK)
    assert {row["unsupported"].split(":")[0] for row in rows} == {"no_such_library"}

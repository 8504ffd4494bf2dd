# SPDX-License-Identifier: Apache-2.0
"""``fastflat bench run`` as a user meets it: every device, every part, what it writes, and what ends it early."""

import json
import os
import re
import signal

import pytest

from fastflat.cli import _bench_run, bench

from .fake_cuda import FakeCuda

SMALL = ("--quick", "--threads", "1", "--sizes", "2^10")


@pytest.fixture
def gpus(benchmarks, monkeypatch):
    """Two GPUs that are stand-ins, without caches to speak of."""
    fake = FakeCuda(2, cache=1 << 10)
    monkeypatch.setattr(bench.package("devices"), "CUDA", fake)
    monkeypatch.setattr(benchmarks.machine, "_gpu_state", lambda index: {"driver": f"610.{index}"})
    return fake


@pytest.fixture
def tiny(benchmarks, monkeypatch):
    """Networks and lists that take no time."""
    networks, step, products = (bench.package(name) for name in ("networks", "step", "product_cases"))
    small = step.Network(lambda: networks.ConvNet(3, (4, 5)), (3, 8, 8), ("fc",))
    monkeypatch.setattr(_bench_run, "networks", lambda: {"resnet20": small, "transformer": small})
    made = {"small": products.Network(lambda: networks.mlp(6, 5, 10), (7, 6))}
    monkeypatch.setattr(products, "NETWORKS", made)
    monkeypatch.setitem(bench.package("cases.sharpness").LISTS, "small", ((10,),) * 10)
    effort = benchmarks.measure.Effort(0.0, (2, 2), 0.0)
    monkeypatch.setattr(_bench_run, "_step_effort", lambda quick: effort)
    overview = bench.package("overview")
    first = {family: names and names[:1] for family, names in overview.KERNELS.items()}
    monkeypatch.setattr(overview, "KERNELS", first)


def schema():
    jsonschema = pytest.importorskip("jsonschema", reason="pip install 'fastflat[test]'")
    text = (bench.package("report").SCHEMA).read_text()
    return jsonschema.Draft202012Validator(json.loads(text))


def test_all_devices_have_their_rows(run, tmp_path, swift, own_memory, tiny, gpus):
    target = tmp_path / "run.json"
    narrow = ("--only", "kernels", "--families", "identity")
    code, out, _ = run("run", "--device", "all", *narrow, *SMALL, "--json", target)
    assert code == 0
    result = json.loads(target.read_text())
    assert list(result["machines"]) == ["cuda:0", "cuda:1", "cpu"]
    for field in ("roofline", "rows"):
        assert list(dict.fromkeys(row["device"] for row in result[field])) == ["cuda:0", "cuda:1", "cpu"]
    assert "bench identity on cuda:1" in [line.strip() for line in out.splitlines()]


def test_every_part_on_a_gpu(run, tmp_path, benchmarks, swift, own_memory, tiny, gpus):
    target, page = tmp_path / "run.json", tmp_path / "run.html"
    code, out, _ = run("run", "--device", "cuda", *SMALL, "--json", target, "--html", page)
    assert code == 0
    result = json.loads(target.read_text())
    assert [(error.json_path, error.message) for error in schema().iter_errors(result)] == []
    assert result["complete"] is True
    assert list(result["machines"]) == ["cuda:0"]
    assert result["gpu"] == "Fake H100, sm_90"
    assert {row["device"] for row in result["roofline"]} == set(result["machines"])
    overview = bench.package("overview")
    wanted = {*overview.KERNELS, *overview.STEPS, "step", "curvature"}
    assert {row["family"] for row in result["rows"]} == wanted
    assert {row["device"] for row in result["rows"]} == {"cuda:0"}
    ours = [row for row in result["rows"] if row["peer"] == "fastflat"]
    assert all("seconds" in row for row in ours)
    assert all(row["of_roofline"] >= 0 for row in ours if "elements" in row)
    assert {row["timing"] for row in result["rows"] if "timing" in row} <= {"events", "graph"}
    assert {row["optimizer"] for row in result["rows"] if row["family"] == "step"} == {"sgd", "sam", "sam-loop"}
    # sm_90 was measured; the kernels for the others were not, and are marked.
    assert {row["arch"] for row in result["audited"]} == {"sm_80", "sm_100", "sm_120"}
    assert {row["status"] for row in result["audited"]} == {"audited, not run"}
    lines = [line.strip() for line in out.splitlines()]
    assert lines.index("bench roofline") < lines.index("bench fake_quantize")
    assert "bench: GPU kernels that were audited, not run" in lines
    assert any(line.startswith("Fake H100, sm_90, driver 610.0") for line in lines)
    text = page.read_text()
    assert "driver 610.0" in text
    own = text[text.index("\n<body>\n") :]
    assert not re.search(r'(?:src|href)="(?!#)', own)  # needs no other file and no network
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.html", "run.json"]


def test_a_device_that_disappears_leaves_its_rows(run, tmp_path, benchmarks, swift, own_memory, tiny, gpus):
    """One clear line; what was measured before, and what other devices give after, is written and marked."""
    gpus.lost_after = 40
    target, page = tmp_path / "run.json", tmp_path / "run.html"
    families = ("--only", "kernels", "--families", "identity,fake_quantize,liq")
    code, out, err = run("run", "--device", "cuda:0,cpu", *families, *SMALL, "--json", target, "--html", page)
    assert code == 2
    said = err.splitlines()[-1]
    assert re.fullmatch(
        r"fastflat: bench: cuda:0 no longer answers: CUDA error: the GPU has fallen off the bus; \d+ rows measured"
        r" before are kept, marked incomplete",
        said,
    )
    result = json.loads(target.read_text())
    assert not list(schema().iter_errors(result))
    assert result["complete"] is False
    assert result["stopped"].startswith("cuda:0 no longer answers")
    lost = {row["family"] for row in result["rows"] if row["device"] == "cuda:0"}
    kept = {row["family"] for row in result["rows"] if row["device"] == "cpu"}
    assert kept == {"identity", "fake_quantize", "liq"}
    assert lost < kept
    assert f"{len(result['rows'])} rows measured before" in said
    assert "incomplete: cuda:0 no longer answers" in out
    assert "Incomplete: cuda:0 no longer answers" in page.read_text()


def test_a_device_that_is_lost_at_once_writes_no_file_of_nothing(run, tmp_path, swift, own_memory, gpus):
    gpus.lost_after = 0
    target = tmp_path / "run.json"
    code, _, err = run("quantize", "--device", "cuda", "--quick", "--sizes", "2^7", "--json", target)
    assert code == 2
    assert "cuda:0 no longer answers" in err.splitlines()[-1]
    assert err.splitlines()[-1].endswith("; no row was measured before")
    assert not target.exists()


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt():
    raise KeyboardInterrupt


def fail():
    raise ValueError("bench: a defect")


@pytest.mark.parametrize(
    ("ends", "code", "stopped"),
    [
        (interrupt, 130, "interrupted"),
        (terminate, 143, "terminated"),
        (fail, 2, "ValueError: bench: a defect"),
    ],
)
def test_whatever_ends_a_run_keeps_its_rows(
    run, tmp_path, benchmarks, monkeypatch, swift, own_memory, ends, code, stopped
):
    real, seen = benchmarks.run.rows, []

    def rows(*arguments):
        seen.append(1)
        if len(seen) == 3:
            ends()
        return real(*arguments)

    monkeypatch.setattr(benchmarks.run, "rows", rows)
    before, target = signal.getsignal(signal.SIGTERM), tmp_path / "x.json"
    arguments = ("--quick", "--sizes", "2^7", "--threads", "1", "--peers", "mul", "--json", target)
    assert run("quantize", *arguments)[0] == code
    result = json.loads(target.read_text())
    assert (result["complete"], result["stopped"], len(result["rows"])) == (False, stopped, 2)
    assert signal.getsignal(signal.SIGTERM) is before


def test_parts_and_families_narrow_a_run(run, tmp_path, swift, own_memory, tiny):
    target = tmp_path / "run.json"
    code, out, _ = run("run", "--only", "kernels", "--families", "liq", *SMALL, "--json", target)
    assert code == 0
    result = json.loads(target.read_text())
    assert {row["family"] for row in result["rows"]} == {"liq"}
    assert "audited" not in result
    assert "compile" not in {row["peer"] for row in result["rows"]}  # quick compiles nothing
    assert "audited" not in out


def test_a_run_refuses_red_kernels_of_any_part(run, tmp_path, benchmarks, monkeypatch, own_memory):
    monkeypatch.setattr(benchmarks.gate, "mistakes", lambda device, dtypes: [])
    monkeypatch.setattr(benchmarks.gate, "step_mistakes", lambda device, dtypes: ["weights of it"])
    monkeypatch.setattr(benchmarks.run, "rows", lambda *_: pytest.fail("timed"))
    target = tmp_path / "x.json"
    code, _, err = run("run", "--quick", "--json", target)
    assert code == 2
    assert err == "fastflat: bench: refused, the kernels differ from the reference in weights of it\n"
    assert not target.exists()


def test_a_page_without_plotly_is_refused_before_the_measurement(run, monkeypatch, benchmarks, own_memory):
    from fastflat.cli import _bench

    real = _bench.importlib.util.find_spec
    monkeypatch.setattr(_bench.importlib.util, "find_spec", lambda n: None if n == "plotly" else real(n))
    monkeypatch.setattr(benchmarks.run, "rows", lambda *_: pytest.fail("timed"))
    code, _, err = run("run", "--quick", "--html", "x.html")
    assert code == 2
    assert "plotly is not installed; pip install 'fastflat[bench]'" in err

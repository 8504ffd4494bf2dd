# SPDX-License-Identifier: Apache-2.0
"""Training steps: every variant is the same network at the same weights, and says what it costs."""

import pytest
import torch

from fastflat.cli import _bench_run, bench

CPU = torch.device("cpu")


@pytest.fixture
def step(benchmarks):
    return benchmarks.step


def network(step, signed=False):
    networks = bench.package("networks")
    if signed:
        return step.Network(lambda: networks.Transformer(8, 2, 1), (3, 8), ("fc",), signed=True)
    return step.Network(lambda: networks.ConvNet(3, (4, 5)), (3, 8, 8), ("fc",))


def losses(step, case, variants, monkeypatch):
    """Losses of a second step of each variant, in turn; a step of SAM has two."""
    calls, missing = step.steps(case, variants, CPU)
    real, found = step.F.cross_entropy, {}
    for key, call in calls.items():
        seen = []
        monkeypatch.setattr(step.F, "cross_entropy", lambda y, t, seen=seen: seen.append(real(y, t)) or seen[-1])
        call()
        monkeypatch.setattr(step.F, "cross_entropy", real)
        found[key] = [loss.item() for loss in seen]
    return found, missing


@pytest.mark.parametrize("signed", [False, True])
def test_quantizers_stand_in_the_same_network(step, monkeypatch, signed):
    """With 12 bits they hardly change its loss; those of a library that is not installed say so."""
    case = step.TrainingCase("tiny", network(step, signed), 4, bits=12)
    found, missing = losses(step, case, [(peer, "sgd") for peer in step.QUANTIZERS], monkeypatch)
    plain = found["fp32", "sgd"][0]
    assert found["view", "sgd"] == found["identity", "sgd"] == [plain]
    for peer in ("fastflat", "fastflat-list", "eager", "builtin", "torchao", "brevitas"):
        if (peer, "sgd") in missing:
            assert peer in ("torchao", "brevitas")
            assert "is not installed" in missing[peer, "sgd"]
            continue
        assert found[peer, "sgd"][0] == pytest.approx(plain, rel=1e-2)
        assert found[peer, "sgd"][0] != plain
    assert found["fastflat", "sgd"] == found["fastflat-list", "sgd"]
    assert found["mul", "sgd"] != [plain]


def test_both_sams_climb_alike_and_come_back(step, monkeypatch):
    case = step.TrainingCase("tiny", network(step), 8, optimizers=step.OPTIMIZERS)
    found, _ = losses(step, case, case.variants(["fp32", "fastflat", "builtin"]), monkeypatch)
    assert set(found) == {("builtin", "sgd")} | {(p, o) for p in ("fp32", "fastflat") for o in step.OPTIMIZERS}
    for peer in ("fp32", "fastflat"):
        (plain,), (first, second), (ours, _) = (found[peer, o] for o in step.OPTIMIZERS)
        assert first == pytest.approx(plain, rel=1e-6)  # the weights are where they were, after a step
        assert ours == pytest.approx(plain, rel=1e-6)
        assert second > plain
    plain, loop, ours = (found["fp32", o] for o in step.OPTIMIZERS)
    assert ours[1] == pytest.approx(loop[1], rel=1e-4)


def test_compiled_variants_are_few(step):
    """Each takes long to compile."""
    case = step.TrainingCase("t", network(step), 4, mode="compile", optimizers=step.OPTIMIZERS)
    wanted = [("fp32", "sgd"), ("eager", "sgd"), ("fastflat", "sgd"), ("eager", "sam-loop"), ("fastflat", "sam")]
    assert case.variants(["fp32", "eager", "torchao", "fastflat"]) == wanted


def test_rows(step, benchmarks):
    case = step.TrainingCase("tiny", network(step), 4, optimizers=("sgd", "sam"))
    effort = benchmarks.measure.Effort(0.0, (2, 2), 0.0)
    rows = {(r["peer"], r["optimizer"]): r for r in step.rows(case, ["fp32", "identity", "fastflat"], 1, effort, CPU)}
    for (peer, _), row in rows.items():
        assert row["samples_per_second"] == pytest.approx(4 / row["seconds"])
        assert (row["overhead"] is None) == (peer == "fp32")
    assert rows["identity", "sgd"]["of_identity"] == pytest.approx(1)
    assert rows["fastflat", "sam"]["of_identity"] is None
    assert rows["fastflat", "sgd"]["peak_bytes"] > 0


@pytest.mark.usefixtures("compiling")
def test_compiled_steps_learn_the_same(step, monkeypatch):
    found = {}
    for mode in step.MODES:
        case = step.TrainingCase("tiny", network(step), 4, mode=mode)
        found[mode], missing = losses(step, case, [("fastflat", "sgd")], monkeypatch)
        assert not missing
    assert found["compile"]["fastflat", "sgd"] == pytest.approx(found["eager"]["fastflat", "sgd"], rel=1e-3)


def test_what_cannot_be_is_named_and_our_own_failure_is_not_hidden(step, monkeypatch):
    def fails(*_):
        raise RuntimeError("no such form\nand more")

    case = step.TrainingCase("tiny", network(step), 4)
    monkeypatch.setattr(step, "_prepared", fails)
    calls, missing = step.steps(case, [("eager", "sgd")], CPU)
    assert not calls
    assert missing == {("eager", "sgd"): "RuntimeError: no such form"}
    with pytest.raises(RuntimeError, match="no such form"):
        step.steps(case, [("fastflat", "sgd")], CPU)


def test_networks_are_those_of_the_names(benchmarks):
    """ResNet-20 and ResNet-18 as published (the latter for 10 classes), six layers of a transformer; the layers that
    are skipped exist."""
    counts = {"resnet20": 269_722, "resnet18": 11_173_962}
    before = torch.random.get_rng_state()
    for name, of in _bench_run.networks().items():
        model = of.make()
        assert {n for n, _ in model.named_modules()} >= set(of.skip)
        if name in counts:
            assert sum(p.numel() for p in model.parameters()) == counts[name]
        else:
            assert len(model.layers) == 6
            assert of.signed
    case = benchmarks.step.TrainingCase("t", network(benchmarks.step), 4)
    torch.random.set_rng_state(before)
    case.data(CPU)
    assert torch.equal(torch.random.get_rng_state(), before)

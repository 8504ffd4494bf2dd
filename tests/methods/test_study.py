# SPDX-License-Identifier: Apache-2.0
"""A study tunes every arm alike, goes on where it stopped, and says what its runs show."""

import dataclasses
import math

import pytest

from fastflat.methods import Arm, Claim
from fastflat.methods.lab import study, verdict

from .toy import make


def test_arms_are_tuned_alike_with_equal_passes(tmp_path):
    method, ran = make()
    records = list(study.run(method, method.experiment.full, tmp_path / "a.jsonl"))
    assert study.size(method.experiment, method.experiment.full) == 2 * (3 + 3)
    assert len(records) == 2 * (3 + 1 + 3)
    for name, best, beyond, steps in (("base", 0.1, 0.05, 101), ("<new>", 0.3, 0.45, 50)):
        own = [r for r in ran if r[0] == name]
        assert [(seed, choice["lr"]) for _, seed, choice, _ in own] == [
            *((study.TUNING_SEED, lr) for lr in (0.2, 0.1, 0.3, beyond)),
            *((seed, best) for seed in range(3)),
        ]
        assert {n for *_, n in own} == {steps}


def test_finished_runs_are_not_trained_again(tmp_path):
    method, ran = make()
    path = tmp_path / "a.jsonl"
    going = study.run(method, method.experiment.full, path)
    first = [next(going) for _ in range(5)]
    going.close()
    ran.clear()
    records = list(study.run(method, method.experiment.full, path))
    assert records[:5] == first
    assert len(ran) == 9
    more = dataclasses.replace(method.experiment.full, seeds=4)
    ran.clear()
    list(study.run(method, more, path))
    assert [(name, seed) for name, seed, *_ in ran] == [("base", 3), ("<new>", 3)]
    assert len(study.read(path)) == 16


def test_runs_that_were_tuned_by_another_metric_are_refused(tmp_path):
    method, _ = make()
    path = tmp_path / "a.jsonl"
    list(study.run(method, method.experiment.full, path))
    other = dataclasses.replace(method, experiment=dataclasses.replace(method.experiment, tuned_on="margin"))
    before = path.read_bytes()
    for again in (lambda: list(study.run(other, method.experiment.full, path)), lambda: study.runs(other, path)):
        with pytest.raises(ValueError, match=f"must hold runs of {method.name} tuned by margin, got others"):
            again()
    assert path.read_bytes() == before


def test_other_settings_are_refused_and_nothing_is_lost(tmp_path):
    method, _ = make()
    path = tmp_path / "a.jsonl"
    list(study.run(method, method.experiment.quick, path))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="must hold runs of these settings, got others in passes, tune"):
        list(study.run(method, method.experiment.full, path))
    path.write_bytes(before + b"{}\n")
    with pytest.raises(ValueError, match=r"line 3 of .* must be a run of a study"):
        list(study.run(method, method.experiment.quick, path))
    assert path.read_bytes() == before + b"{}\n"


def test_a_diverged_run_is_kept_and_holds_no_claim(tmp_path):
    method, _ = make()
    e = method.experiment

    def diverges(seed, settings):
        raise ArithmeticError("the loss is nan")

    e = dataclasses.replace(e, arms=(e.arms[0], Arm("<new>", diverges, 2)))
    method = dataclasses.replace(method, experiment=e)
    list(study.run(method, e.full, tmp_path / "a.jsonl"))
    records = study.read(tmp_path / "a.jsonl")
    found = verdict.findings(records, e)
    assert math.isnan(found[0].difference)
    assert verdict.verdict(found) == "not"


def test_an_arm_without_its_metrics_is_refused(tmp_path):
    method, _ = make()
    e = dataclasses.replace(method.experiment, arms=(Arm("base", lambda *_: {"a": 1}), method.experiment.arms[1]))
    with pytest.raises(ValueError, match="arm base must give seconds_per_step, validation_accuracy, got a"):
        list(study.run(dataclasses.replace(method, experiment=e), e.full, tmp_path / "a.jsonl"))


@pytest.mark.parametrize(("better", "answer"), [(0.7, "partly"), (9.0, "reproduced"), (-1.0, "not")])
def test_verdict(tmp_path, better, answer):
    """The loss of one seed is worse by 1/2: a mean difference of better - 1/6 with a standard error of 1/6."""
    method, _ = make(better)
    records = list(study.run(method, method.experiment.full, tmp_path / "a.jsonl"))
    accuracy, loss = verdict.findings(records, method.experiment)
    assert accuracy.difference == pytest.approx(better)
    assert accuracy.error == pytest.approx(0, abs=1e-12)
    assert loss.difference == pytest.approx(better - 1 / 6)
    assert loss.error == pytest.approx(1 / 6)
    assert verdict.verdict([accuracy, loss]) == answer
    (cost,) = verdict.costs(list(study.profile(method, 3, tmp_path / "p.jsonl")), method.experiment)
    assert (cost.measured, cost.passes) == (2, 2)


def test_two_seeds_are_too_few(tmp_path):
    method, _ = make()
    two = dataclasses.replace(method.experiment.full, seeds=2)
    records = list(study.run(method, two, tmp_path / "a.jsonl"))
    assert verdict.verdict(verdict.findings(records, method.experiment)) == "open"
    assert verdict.finding(records, Claim("loss", "base", "nobody")).seeds == 0


def test_points_that_an_arm_reads_alike_are_one_training(tmp_path):
    """A baseline knows no strength: its tuning trains once a rate, and its file says both points."""
    method, _ = make()
    ran = []

    def arm(name, reads):
        def run(seed, settings):
            values = [settings.choice[key] for key in reads]
            ran.append((name, seed, *values))
            good = -abs(values[0] - 0.1)
            return {"seconds_per_step": 1.0, "validation_accuracy": good, "test_accuracy": seed, "loss": 0.0}

        return Arm(name, run)

    experiment = dataclasses.replace(
        method.experiment,
        arms=(arm("base", ["lr"]), arm("<new>", ["lr", "strength"])),
        grid={"lr": (0.1, 0.05, 0.2), "strength": (1.0, 2.0)},
    )
    method = dataclasses.replace(method, experiment=experiment)
    path = tmp_path / "a.jsonl"
    records = list(study.run(method, experiment.full, path))
    assert len(records) == len(study.read(path)) == study.size(experiment, experiment.full) == 18
    tuned = [r for r in ran if r[1] == study.TUNING_SEED]
    assert tuned == [
        *(("base", 1000, lr) for lr in (0.1, 0.05, 0.2)),
        *(("<new>", 1000, lr, strength) for lr in (0.1, 0.05, 0.2) for strength in (1.0, 2.0)),
    ]
    assert len(ran) == 9 + 6


@pytest.mark.parametrize(
    ("best", "tried", "chosen", "enclosed"),
    [
        ({"lr": 11, "strength": 1.5}, [(4, 2), (8, 2), (16, 2), (8, 4)], (8, 2), True),
        ({"lr": 0.2, "strength": 2.1}, [(0.5, 2), (0.25, 2), (0.125, 2), (0.25, 4)], (0.25, 2), True),
        ({"lr": 1e9, "strength": 1e9}, [(4, 2), (8, 2), (16, 2), (32, 2)], (32, 2), False),
        ({"lr": 2, "strength": 0.9}, [(4, 1), (2, 0.5)], (2, 1), True),
    ],
)
def test_an_arm_looks_beyond_the_end_of_the_grid(tmp_path, best, tried, chosen, enclosed):
    method, _ = make()

    def arm(name):
        def run(seed, settings):
            good = -sum(abs(math.log(settings.choice[key] / best[key])) for key in best)
            return {"seconds_per_step": 1.0, "validation_accuracy": good, "test_accuracy": seed, "loss": 0.0}

        return Arm(name, run)

    experiment = dataclasses.replace(
        method.experiment, arms=(arm("base"), arm("<new>")), grid={"lr": (1.0, 2.0), "strength": (1.0, 2.0)}
    )
    method = dataclasses.replace(method, experiment=experiment)
    path = tmp_path / "a.jsonl"
    list(study.run(method, experiment.full, path))
    for name in ("base", "<new>"):
        own = [r for r in study.read(path) if r.arm == name]
        tuned = [r for r in own if r.kind == "tune"]
        assert [(r.choice["lr"], r.choice["strength"]) for r in tuned[4:]] == tried
        assert [tuple(r.choice.values()) for r in own if r.kind == "run"] == [chosen] * 3
        assert (study.further(experiment, tuned) is None) == enclosed


def test_runs_of_a_point_that_is_no_longer_the_best_go(tmp_path):
    method, ran = make()
    path = tmp_path / "a.jsonl"
    records = list(study.run(method, method.experiment.full, path))
    stale = [dataclasses.replace(r, choice={"lr": 0.2}) if r.kind == "run" else r for r in records]
    path.write_text("".join(r.line() for r in stale))
    ran.clear()
    list(study.run(method, method.experiment.full, path))
    assert len(ran) == 6
    kept = [(r.arm, r.seed, r.choice["lr"]) for r in study.read(path) if r.kind == "run"]
    assert kept == [(name, seed, lr) for name, lr in (("base", 0.1), ("<new>", 0.3)) for seed in range(3)]

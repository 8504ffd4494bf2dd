# SPDX-License-Identifier: Apache-2.0
"""Combinations are what they say, the search picks by its rule and goes on where it stopped, gains are its runs'."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from fastflat import methods, optim
from fastflat.methods import lab
from fastflat.methods.lab.goals import answers, parts, search, training
from fastflat.methods.lab.goals.catalogue import GOALS
from fastflat.methods.lab.goals.parts import BASELINE, Combination
from fastflat.methods.lab.records import Record, read
from fastflat.quant import quantizers

from .goal_records import SEARCH, train

OPTIMIZERS = {"sgd": optim.SGD, "sam": methods.SAM, "hero": methods.HERO, "gadam": methods.Gadam}
SIZE = training.Size(passes=12, images=40, test_images=20, hard=6, batch=8)


@pytest.fixture
def few_images(monkeypatch):
    g = torch.Generator().manual_seed(0)

    def part(count):
        return torch.rand(count, 1, 28, 28, generator=g), torch.arange(count) % 4

    split = lab.Split(part(40), part(12), part(20), 4)
    monkeypatch.setattr(lab, "images", lambda train, test: split)


def point(combination):
    return search.point(combination, search.tuned([], search.FULL))


# Combinations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "loss"),
    [*((name, "dign") for name in parts.OPTIMIZERS), *(("sam", name) for name in parts.LOSSES if name != "dign")],
)
def test_a_training_takes_the_passes_that_it_says(few_images, monkeypatch, optimizer, loss):
    """So many calls of the loss a step, so many passes in each, and all together no more than allowed."""
    combination = Combination("lsq", optimizer, loss)
    objective, net, calls, passes = parts.Joined.loss, training.ConvNet, [], []

    def counted(self, model, x, y):
        calls.append(len(x))
        return objective(self, model, x, y)

    def forward(module, inputs):
        passes.append(len(inputs[0]) if torch.is_grad_enabled() else 0)

    def made(*args):
        model = net(*args)
        model.fc.register_forward_pre_hook(forward)
        return model

    monkeypatch.setattr(training, "ConvNet", made)
    monkeypatch.setattr(parts.Joined, "loss", counted)
    done, _ = training.trained(combination, training.CONDITIONS["tail"], 0, point(combination), SIZE)
    steps = int(12 / combination.passes)
    assert len(done.losses) == max(1, steps)
    assert type(done.optimizer) is OPTIMIZERS[optimizer]
    assert len(calls) == len(done.losses) * parts.OPTIMIZERS[optimizer].passes
    # Forward passes with a graph: the clean one, that of the noisy copy, or the two whose gradients are differentiated.
    assert sum(passes) == sum(calls) * {"dign": 2, "cure": 3}.get(loss, 1)


@pytest.mark.parametrize("quantizer", parts.QUANTIZERS)
def test_quantizers_are_those_of_their_methods(few_images, quantizer):
    combination = Combination(quantizer, "sam", "symreg")
    done, _ = training.trained(combination, training.CONDITIONS["bits4"], 0, point(combination), SIZE)
    found = [q for _, q in quantizers(done.model)]
    assert len(found) == 6  # weights and inputs of the three inner convolutions
    assert {q.spec.bits for q in found} == {4}
    assert {q.spec.estimator for q in found} == {"lsq" if quantizer == "lsq" else "ewgs"}
    learned = [isinstance(q.delta, nn.Parameter) for q in found]
    assert all(learned) == any(learned) == (quantizer != "lsq")
    if quantizer != "lsq":
        left = {round(float(q.nu), 6) for q in found}
        # Half at first, a factor e less every fifth of the steps.
        assert left == ({round(0.5 * math.exp(-6 / max(1, round(6 / 5))), 6)} if quantizer == "tempered" else {0.0})


@pytest.mark.parametrize("loss", ["symreg", "dign", "cure", "vs"])
def test_losses_are_not_cross_entropy(few_images, loss):
    firsts = []
    for name in ("none", loss):
        combination = Combination(loss=name)
        done, _ = training.trained(combination, training.CONDITIONS["tail"], 0, point(combination), SIZE)
        firsts.append(done.losses[0])
    assert firsts[1] != firsts[0]
    assert firsts[1] > firsts[0] or loss == "vs"  # penalties are positive


def test_gadam_is_measured_at_its_average(few_images, monkeypatch):
    inside = []
    monkeypatch.setattr(lab, "loss_accuracy", lambda model, data: inside.append(model.fc.weight.clone()) or (1.0, 0.5))
    combination, kept = Combination(optimizer="gadam"), []
    trained = training.trained
    monkeypatch.setattr(training, "trained", lambda *args: kept.append(trained(*args)) or kept[-1])
    training.measured(combination, training.CONDITIONS["bits8"], 0, point(combination), SIZE, "test")
    ((done, _),) = kept
    assert torch.equal(inside[0], done.optimizer.state[done.model.fc.weight]["average"])
    assert not torch.equal(inside[0], done.model.fc.weight)


@pytest.mark.parametrize(("name", "part"), [("clean", "validation"), ("clean", "test"), ("tail", "test")])
def test_everything_that_a_goal_reads_is_measured(few_images, monkeypatch, name, part):
    """On the images that it says, and nothing of the others."""
    if part == "validation":
        monkeypatch.setattr(lab, "top_eigenvalue", lambda *args, **options: 1.0)
    found = training.measured(BASELINE, training.CONDITIONS[name], 0, point(BASELINE), SIZE, part)
    wanted = {goal.chosen[1] for goal in GOALS.values() if goal.chosen[0] == name}
    if part == "test":
        wanted = {r.metric for goal in GOALS.values() for r in goal.readings if r.condition == name}
    assert wanted <= set(found)
    assert not [metric for metric in found if metric.startswith("test" if part == "validation" else "validation")]
    assert all(0 <= v <= 1 for metric, v in found.items() if metric.startswith(part))


def test_goals_and_parts_name_methods():
    named = {method for goal in GOALS.values() for method in goal.methods}
    named |= {part.method for table in parts.KINDS.values() for part in table.values()} - {None}
    assert named <= set(methods.names())


def test_the_parts_alone():
    assert BASELINE.alone() == Combination("ewgs").alone() == ()
    assert Combination("ewgs", "sam").alone() == (Combination("ewgs"), Combination(optimizer="sam"))
    assert Combination("lsq", "hero", "cure").passes == 15


# The search ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("goals") / "runs.jsonl"
    return path, list(search.run(SEARCH, path, train=train))


def test_the_search_picks_by_its_rule(whole):
    _, records = whole
    assert search.tuned(records, SEARCH) == {
        "sgd": {"lr": 0.1},
        "sam": {"lr": 0.05, "rho": 0.2},
        "gadam": {"lr": 0.001},
        "dign": {"smax": 0.6},
    }
    first = search.ranking(records, GOALS["width"], SEARCH)
    assert first[:3] == [
        Combination("tempered", "sam", "dign"),
        Combination("tempered", "sam"),
        Combination("lsq", "sam", "dign"),
    ]
    assert len(first) == 11  # without the baseline
    cheap = search.ranking(records, GOALS["cost"], SEARCH)
    # Gadam gives nothing, so that of two equal ones the one that changes less comes first.
    assert cheap == [Combination("tempered"), Combination("tempered", "gadam"), Combination(optimizer="gadam")]
    flat = search.ranking(records, GOALS["sharpness"], SEARCH)
    assert flat[0] == Combination(optimizer="gadam")  # the flattest within a point of validation accuracy
    assert Combination(optimizer="gadam", loss="dign") not in flat


def test_runs_are_the_best_two_the_baseline_and_parts_alone(whole):
    _, records = whole
    best = Combination("tempered", "sam", "dign")
    alone = [Combination("tempered"), Combination(optimizer="sam"), Combination(loss="dign")]
    assert search.finalists(records, GOALS["width"], SEARCH) == [BASELINE, best, Combination("tempered", "sam"), *alone]
    chosen = search.runs(records, SEARCH)
    assert len(chosen) == len(set(chosen))
    assert [c for name, c in chosen if name == "bits2"] == [BASELINE, best, Combination("tempered", "sam")]
    ran = [(r.arm, r.seed) for r in records if r.kind == "run"]
    assert ran == [(search.key(*row), seed) for row in chosen for seed in range(3)]
    assert {r.seed for r in records if r.kind == "search"}.isdisjoint(range(3))
    assert not [m for r in records if r.kind in ("tune", "search") for m in r.metrics if m.startswith("test")]
    assert len(records) == search.size(SEARCH, records)


def test_finished_trainings_are_not_made_again(tmp_path):
    made = []

    def counted(*args):
        made.append(args[:3])
        return train(*args)

    path = tmp_path / "runs.jsonl"
    going = search.run(SEARCH, path, train=counted)
    first = [next(going) for _ in range(20)]
    going.close()
    assert read(path) == first
    records = list(search.run(SEARCH, path, train=counted))
    assert records[:20] == first
    assert records == read(path)
    # What was tuned at the chosen point is searched, too: the baseline, SAM, Gadam and DiGN alone.
    assert len(made) == len(records) - 4
    made.clear()
    assert list(search.run(SEARCH, path, train=counted)) == records
    assert not made
    other = dataclasses.replace(SEARCH, size=dataclasses.replace(SEARCH.size, passes=7))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="must hold runs of these settings, got others in passes"):
        next(search.run(other, path, train=counted))
    assert path.read_bytes() == before


def test_a_training_that_diverges_loses(tmp_path):
    def diverges(combination, name, seed, at, size, part):
        if combination.optimizer == "sam" and part == "validation":
            raise ArithmeticError("the loss is nan")
        if combination.loss == "dign" and part == "test":
            return dict.fromkeys(train(combination, name, seed, at, size, part), math.nan)
        return train(combination, name, seed, at, size, part)

    records = list(search.run(SEARCH, tmp_path / "runs.jsonl", train=diverges))
    assert [r.arm for r in records] == [r.arm for r in read(tmp_path / "runs.jsonl")]
    ranked = search.ranking(records, GOALS["width"], SEARCH)
    assert not [c for c in ranked if c.optimizer == "sam"]
    assert ranked[0] == Combination("tempered", loss="dign")
    assert {g.answer for g in answers.gains(records, GOALS["width"], ranked[0])} == {"less"}
    assert answers.recommended(records, GOALS["width"], SEARCH) != ranked[0]


# Answers ------------------------------------------------------------------------------------------------------------


def of(values):
    """Runs of accuracies by arm."""
    return [
        Record("run", f"clean: {name}", seed, {}, {"test_accuracy": v}, {}, {})
        for name, row in values.items()
        for seed, v in enumerate(row)
    ]


@pytest.mark.parametrize(
    ("values", "mean", "error", "answer"),
    [
        ([0.9, 0.8, 0.85], 0.1, 0.0, "more"),
        ([0.83, 0.7, 0.8], 0.08 / 3, math.sqrt((0.01 + 0.64 + 0.49) / 9 / 6) / 10, "same"),
        ([0.6, 0.5, 0.55], -0.2, 0.0, "less"),
        ([0.9, 0.8], 0.1, 0.0, "open"),
        ([0.9, math.nan, 0.85], math.nan, math.nan, "less"),
    ],
)
def test_a_gain_is_the_difference_over_seeds(values, mean, error, answer):
    goal = GOALS["cost"]
    records = of({str(BASELINE): [0.8, 0.7, 0.75], "ewgs + sgd + none": values})
    found = answers.gain(records, goal, goal.readings[0], Combination("ewgs"))
    assert found.mean == pytest.approx(mean, nan_ok=True)
    assert found.error == pytest.approx(error, abs=1e-4, nan_ok=True)
    assert (found.answer, found.seeds) == (answer, len(values))


def test_what_is_said_where_the_baseline_diverged():
    records = of({str(BASELINE): [0.8, math.nan, 0.75], "ewgs + sgd + none": [0.9, 0.9, 0.9]})
    assert answers.gain(records, GOALS["cost"], GOALS["cost"].readings[0], Combination("ewgs")).answer == "open"


def test_a_part_alone_is_taken_where_it_does_as_well(whole):
    _, records = whole
    width = GOALS["width"]
    assert answers.recommended(records, width, SEARCH) == Combination("tempered", "sam", "dign")
    rows = answers.beyond_parts(records, width, Combination("tempered", "sam", "dign"))
    assert [alone.changed for alone, _ in rows] == [("quantizer",), ("optimizer",), ("loss",)]
    assert {g.answer for _, found in rows for g in found} == {"more"}
    # As good as its optimizer alone.
    best, sam = "clean: tempered + sam + dign", [r for r in records if r.arm == "clean: lsq + sam + none"]
    weaker = [r for r in records if r.kind != "run" or r.arm != best]
    weaker += [dataclasses.replace(r, arm=best) for r in sam if r.kind == "run"]
    assert answers.recommended(weaker, width, SEARCH) == Combination(optimizer="sam")


def test_pairs_and_their_interaction(whole):
    _, records = whole
    (qo, ql, ol) = answers.pairs(records, GOALS["labels"], SEARCH)
    assert [p.names for p in (qo, ql, ol)] == [("tempered", "sam"), ("tempered", "dign"), ("sam", "dign")]
    # What the toy's parts give adds up, but for the half point of tempered with sam.
    assert qo.together == pytest.approx(0.005 * (1 - 1 / 2) * (1 - 1 / 3))
    assert ol.together == pytest.approx(0, abs=1e-12)
    assert answers.cost(records, Combination("tempered", "sam", "dign")) == 4

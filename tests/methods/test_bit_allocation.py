# SPDX-License-Identifier: Apache-2.0
"""Bit allocation: least by brute force, within its budget, and the loss of a quadratic rises as it says."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastflat import methods


def table(draw, layers, widths, descending):
    made = {}
    for layer in range(layers):
        values = sorted(draw(st.lists(st.floats(0, 1e6), min_size=len(widths), max_size=len(widths))))
        made[f"layer{layer}"] = dict(zip(widths, reversed(values) if descending else values, strict=True))
    return made


@st.composite
def problems(draw):
    layers = draw(st.integers(1, 4))
    widths = draw(st.lists(st.integers(1, 16), min_size=1, max_size=4, unique=True))
    scores, costs = table(draw, layers, widths, True), table(draw, layers, widths, False)
    least = sum(min(c.values()) for c in costs.values())
    most = sum(max(c.values()) for c in costs.values())
    return scores, costs, least + draw(st.floats(0, 1.1)) * (most - least)


def brute_force(scores, costs, budget, accept=lambda bits: True):
    best = math.inf
    for choice in itertools.product(*(scores[name] for name in scores)):
        bits = dict(zip(scores, choice, strict=True))
        if math.fsum(costs[n][b] for n, b in bits.items()) <= budget and accept(bits):
            best = min(best, math.fsum(scores[n][b] for n, b in bits.items()))
    return best


@settings(max_examples=150, deadline=None)
@given(problems())
def test_is_the_least_of_all_choices(problem):
    scores, costs, budget = problem
    found = methods.allocate_bits(scores, costs, budget)
    assert set(found.bits) == set(scores)
    # The solver's own tolerance: a budget is kept to a millionth of itself.
    assert found.cost <= budget * (1 + 2e-6)
    spread = sum(max(s.values()) - min(s.values()) for s in scores.values())
    assert found.score <= brute_force(scores, costs, budget * (1 - 1e-12)) + 1e-6 * spread
    assert found.score >= brute_force(scores, costs, budget * (1 + 2e-6)) - 1e-6 * spread


def test_groups_have_one_width():
    scores = {"a": {2: 9.0, 8: 0.0}, "b": {2: 1.0, 8: 0.0}, "c": {2: 4.0, 8: 0.0}}
    costs = {name: {2: 2, 8: 8} for name in scores}
    free = methods.allocate_bits(scores, costs, 18)
    assert free.bits == {"a": 8, "b": 2, "c": 8}
    tied = methods.allocate_bits(scores, costs, 18, same=[("a", "b")])
    assert tied.bits == {"a": 8, "b": 8, "c": 2}
    assert (tied.score, tied.cost, tied.budget) == (4.0, 18, 18)


def test_more_budget_never_scores_worse():
    generator = torch.Generator().manual_seed(0)
    scores = {f"l{i}": {b: float(torch.rand((), generator=generator)) * 4.0**-b for b in (2, 4, 8)} for i in range(30)}
    sizes = {name: 10 + i for i, name in enumerate(scores)}
    costs = {name: {b: sizes[name] * b for b in (2, 4, 8)} for name in scores}
    total = sum(sizes.values())
    found = [methods.allocate_bits(scores, costs, total * b) for b in (2, 3, 4, 5, 6, 8)]
    assert all(a.score >= b.score for a, b in itertools.pairwise(found))
    assert set(found[0].bits.values()) == {2}
    assert set(found[-1].bits.values()) == {8}
    assert all(f.cost <= f.budget for f in found)


def test_rounding_errors_are_those_of_the_rounded_weights():
    w = torch.randn(5, 3, 3, generator=torch.Generator().manual_seed(0))
    errors = methods.rounding_errors({"w": w, "scalar": torch.tensor(0.3)}, bits=(2, 8), scale="absmax")
    for b in (2, 8):
        most = 2 ** (b - 1) - 1
        scale = w.abs().amax((1, 2), keepdim=True) / most
        expected = ((w / scale).round().clamp(-most - 1, most) * scale - w).double().square().sum()
        assert errors["w"][b] == pytest.approx(float(expected), rel=1e-4)
    assert errors["scalar"][8] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_scales_of_least_error(bits):
    w = torch.randn(5, 3, 40, generator=torch.Generator().manual_seed(0))
    w[3] *= 100
    q = methods.rounded(w, bits)
    assert q.shape == w.shape
    for row, found in zip(w, q, strict=True):
        assert len(found.unique()) <= 2**bits
        error = float((found - row).square().sum())
        # No clipping of the range on a fine grid does better.
        for share in torch.linspace(0.05, 1.2, 47):
            s = float(row.abs().max() * share) / max(2 ** (bits - 1) - 1, 1)
            other = (row / s).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * s
            assert error <= float((other - row).square().sum()) * 1.03
    assert (
        float((q - w).square().sum()) <= methods.rounding_errors({"w": w}, (bits,), scale="absmax")["w"][bits] * 1.001
    )
    assert methods.rounding_errors({"w": w}, (bits,))["w"][bits] == pytest.approx(
        float((q - w).double().square().sum())
    )


def test_rounding_is_refused_in_one_line():
    with pytest.raises(ValueError, match="scale must be 'mse' or 'absmax', got 'least'"):
        methods.rounded(torch.ones(3, 3), 4, scale="least")


def test_scores_predict_the_rise_of_a_quadratic():
    """Isotropic blocks: the loss rises by half the score, exactly."""
    generator = torch.Generator().manual_seed(1)
    weights = {"a": torch.randn(40, 10, generator=generator), "b": torch.randn(7, 7, generator=generator)}
    curvature = {"a": 3.0, "b": 50.0}
    traces = {name: curvature[name] * w.numel() for name, w in weights.items()}
    errors = methods.rounding_errors(weights, bits=(3, 4))
    scores = methods.sensitivities(traces, {name: w.numel() for name, w in weights.items()}, errors)
    for name in weights:
        for b in (3, 4):
            assert 0.5 * scores[name][b] == pytest.approx(0.5 * curvature[name] * errors[name][b])
    negative = methods.sensitivities({"a": -1.0, "b": 1.0}, {"a": 400, "b": 49}, errors)
    assert negative["a"] == {3: 0.0, 4: 0.0}


@pytest.mark.parametrize(
    ("scores", "costs", "budget", "message"),
    [
        ({"a": {2: 1.0}}, {"a": {2: 5.0}}, 4, "budget must be at least the cheapest choice, 5, got 4"),
        ({"a": {2: 1.0}}, {"a": {2: 5.0}}, math.nan, "budget must be at least the cheapest choice, 5, got nan"),
        ({"a": {2: 1.0}}, {"a": {3: 5.0}}, 4, r"costs must have the widths \[2\] for 'a', got \[3\]"),
        ({"a": {2: 1.0}}, {}, 4, r"costs must have the widths \[2\] for 'a', got none"),
        ({"a": {2: math.nan}}, {"a": {2: 1.0}}, 4, "scores must be finite and at least 0, got nan for 'a' at 2"),
        ({"a": {2: 1.0}}, {"a": {2: -1.0}}, 4, "costs must be finite and at least 0, got -1.0 for 'a' at 2"),
        ({"a": {}}, {"a": {}}, 4, "scores must have a width for 'a', got none"),
        ({}, {"a": {2: 1.0}}, 4, "costs must have the layers of scores, got a beside"),
    ],
)
def test_bad_tables(scores, costs, budget, message):
    with pytest.raises(ValueError, match=message):
        methods.allocate_bits(scores, costs, budget)


def test_bad_groups_and_traces():
    scores, costs = {"a": {2: 1.0}, "b": {4: 1.0}}, {"a": {2: 1.0}, "b": {4: 1.0}}
    with pytest.raises(ValueError, match="same must name layers of scores, got 'c'"):
        methods.allocate_bits(scores, costs, 9, same=[("a", "c")])
    with pytest.raises(ValueError, match="must have the same widths"):
        methods.allocate_bits(scores, costs, 9, same=[("a", "b")])
    with pytest.raises(ValueError, match="must have every layer of errors, got no 'b'"):
        methods.sensitivities({"a": 1.0}, {"a": 1, "b": 1}, {"a": {2: 1.0}, "b": {2: 1.0}})
    with pytest.raises(ValueError, match="traces must be finite, got nan for 'a'"):
        methods.sensitivities({"a": math.nan}, {"a": 1}, {"a": {2: 1.0}})


def test_nothing_to_allocate():
    assert methods.allocate_bits({}, {}, 0.0).bits == {}

# SPDX-License-Identifier: Apache-2.0
"""Calibration: tables made by hand, streams that are calibrated, scores in closed form."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.nn import functional as F

from fastflat.evaluate import brier_score, calibration_error, negative_log_likelihood, reliability


def test_a_table_made_by_hand():
    confidence = torch.tensor([0.1, 0.2, 0.2, 0.9, 1.0, 0.0], dtype=torch.float64)
    correct = torch.tensor([False, True, False, True, True, False])
    table = reliability(confidence, correct, bins=5)
    # (0, 0.2] holds its upper end, and what has confidence 0
    assert table.count == (4, 2)
    assert table.lower == (0.0, 0.8)
    assert table.upper == (0.2, 1.0)
    assert table.accuracy == (0.25, 1.0)
    assert table.confidence == pytest.approx((0.125, 0.95), abs=1e-12)
    assert table.error == pytest.approx(4 / 6 * 0.125 + 2 / 6 * 0.05, abs=1e-12)
    assert table.largest == pytest.approx(0.125, abs=1e-12)
    assert json.loads(json.dumps(table.as_dict()))["count"] == [4, 2]
    assert str(table).endswith("expected calibration error 0.1000")


def test_equal_mass_has_equal_counts_and_ties_share_a_bin():
    confidence = torch.linspace(0.1, 0.9, 12)
    table = reliability(confidence, confidence > 0.5, bins=4, kind="mass")
    assert table.count == (3, 3, 3, 3)
    tied = reliability(torch.full((10,), 0.5), torch.arange(10) < 5, bins=5, kind="mass")
    assert tied.count == (10,)  # cut by order, their error would be 0.5
    assert tied.error == 0
    assert reliability(torch.zeros(3), torch.zeros(3), bins=2, kind="mass").error == 0
    few = reliability(torch.tensor([0.2, 0.7]), torch.tensor([1.0, 0.0]), bins=15, kind="mass")
    assert few.count == (1, 1)
    assert few.error == pytest.approx((0.8 + 0.7) / 2)


@pytest.mark.parametrize("kind", ["width", "mass"])
def test_a_calibrated_stream_has_no_error_in_the_limit(kind):
    g = torch.Generator().manual_seed(0)
    errors = []
    for n in (1000, 100_000):
        p = torch.rand(n, generator=g, dtype=torch.float64)
        errors.append(reliability(p, torch.rand(n, generator=g, dtype=torch.float64) < p, kind=kind).error)
    assert errors[1] < 0.006
    assert errors[1] < errors[0] / 4
    p = torch.rand(100_000, generator=g, dtype=torch.float64)
    always = reliability(p, torch.rand(100_000, generator=g, dtype=torch.float64) < p.square(), kind=kind).error
    assert always == pytest.approx(1 / 2 - 1 / 3, abs=0.006)  # mean of p - p^2


def test_scores_of_logits_in_closed_form():
    p = torch.tensor([[0.72, 0.18, 0.1], [0.1, 0.63, 0.27], [0.25, 0.25, 0.5]], dtype=torch.float64)
    y = torch.tensor([0, 2, 2])
    z = p.log() + torch.tensor([[3.0], [-2.0], [500.0]], dtype=torch.float64)
    brier = (0.28**2 + 0.18**2 + 0.1**2) + (0.1**2 + 0.63**2 + 0.73**2) + (0.25**2 * 2 + 0.5**2)
    assert brier_score(z, y) == pytest.approx(brier / 3, rel=1e-12)
    assert negative_log_likelihood(z, y) == pytest.approx(-(math.log(0.72) + math.log(0.27) + math.log(0.5)) / 3)
    assert negative_log_likelihood(z, y) == pytest.approx(float(F.cross_entropy(z, y)), rel=1e-12)
    assert calibration_error(z, y, bins=1) == pytest.approx(abs(2 / 3 - (0.72 + 0.63 + 0.5) / 3), rel=1e-12)
    assert calibration_error(z, y, bins=10) == pytest.approx((0.28 + 0.63 + 0.5) / 3, rel=1e-12)
    assert brier_score(torch.tensor([[1000.0, -1000.0]]), torch.tensor([1])) == 2


def test_decomposition_is_exact_where_forecasts_within_a_bin_agree():
    g = torch.Generator().manual_seed(1)
    forecasts = torch.tensor([0.05, 0.35, 0.55, 0.75, 0.95], dtype=torch.float64)
    confidence = forecasts[torch.randint(0, 5, (400,), generator=g)]
    correct = torch.rand(400, generator=g) < 0.6
    parts = reliability(confidence, correct, bins=10).decomposition()
    whole = float((confidence - correct.double()).square().mean())
    assert parts["reliability"] - parts["resolution"] + parts["uncertainty"] == pytest.approx(whole, rel=1e-12)
    assert parts["uncertainty"] == pytest.approx(float(correct.double().var(correction=0)), rel=1e-12)


C, R = torch.tensor([0.5, 0.9]), torch.tensor([True, False])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: reliability(C, R, bins=0), "bins must be an integer of at least 1, got 0"),
        (lambda: reliability(C, R, kind="size"), "kind must be 'width' or 'mass', got 'size'"),
        (lambda: reliability(C * 2, R), "confidence must lie in 0 to 1, got 1 to 1.8"),
        (lambda: reliability(C * math.nan, R), "confidence must lie in 0 to 1, got nan"),
        (lambda: reliability(C[:0], R[:0]), "confidence must be .*at least one example"),
        (lambda: reliability(C, R[:1]), r"correct must be \[N\].*got \[1\]"),
        (lambda: reliability(0.5, R), "confidence must be a tensor, got float"),
        (lambda: brier_score(torch.zeros(2, 3), torch.tensor([0, 3])), "labels must lie in 0 to 2.*got 0 to 3"),
        (lambda: brier_score(torch.zeros(2, 3), torch.tensor([0])), "labels must be a tensor of 2 integers"),
        (lambda: brier_score(torch.zeros(2), torch.tensor([0, 1])), r"logits must be a floating tensor \[N, C\]"),
        (lambda: brier_score(torch.zeros(0, 3), torch.zeros(0).long()), "data must hold at least one example"),
        (lambda: brier_score(torch.zeros(2, 0), torch.tensor([0, 1])), "logits must have at least one class"),
        (
            lambda: calibration_error(torch.tensor([[0.0, math.nan], [0, 0]]), torch.tensor([0, 1])),
            "logits must be numbers, got NaN for 1 of 2 examples",
        ),
    ],
)
def test_bad_input_is_one_line(call, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        call()
    assert "\n" not in str(caught.value)

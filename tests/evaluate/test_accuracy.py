# SPDX-License-Identifier: Apache-2.0
"""Accuracy by rank, class and group, and evaluation over batches."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastflat.evaluate import (
    brier_score,
    calibration_error,
    confusion_matrix,
    evaluate,
    group_accuracy,
    per_class_accuracy,
    topk_accuracy,
)

from .models import convolutional, images, quantized, unchanged


class Table(nn.Module):
    """Logits that are given: inputs are their rows."""

    def __init__(self, logits):
        super().__init__()
        self.register_buffer("logits", logits)

    def forward(self, x):
        return self.logits[x]


def test_topk_counts_equal_logits_in_the_order_of_classes():
    z = torch.tensor([[3.0, 2.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0.0, 5.0, 5.0]])
    y = torch.tensor([1, 0, 1, 2])
    assert [topk_accuracy(z, y, k) for k in (1, 2, 3, 9)] == [0.25, 1.0, 1.0, 1.0]
    big = torch.randn(500, 20, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(500) % 20
    for k in (1, 5):
        want = (big.topk(k).indices == labels[:, None]).any(1).double().mean()
        assert topk_accuracy(big, labels, k) == float(want)


def test_confusion_and_classes_by_hand():
    predicted, labels = torch.tensor([0, 1, 1, 2, 0, 0]), torch.tensor([0, 1, 0, 2, 2, 2])
    assert confusion_matrix(predicted, labels, 4).tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [2, 0, 1, 0], [0, 0, 0, 0]]
    z = F.one_hot(predicted, 4).double()
    assert per_class_accuracy(z, labels) == (0.5, 1.0, 1 / 3, None)


def test_groups_by_counts():
    shares, counts = (0.9, 0.8, 0.5, None, 0.1), (500, 101, 100, 20, 19)
    assert group_accuracy(shares, counts) == {"head": pytest.approx(0.85), "medium": 0.5, "tail": 0.1}
    assert group_accuracy(shares[:2], counts[:2]) == {"head": pytest.approx(0.85), "medium": None, "tail": None}
    thirds = group_accuracy((0.1, 0.2, 0.3, 0.4), torch.tensor([10, 40, 30, 20]), bounds=None)
    assert thirds == {"head": 0.2, "medium": pytest.approx(0.35), "tail": 0.1}


def test_evaluation_is_that_of_all_logits_at_once():
    g = torch.Generator().manual_seed(0)
    z, y = 2 * torch.randn(101, 7, generator=g), torch.randint(0, 6, (101,), generator=g)  # class 6 has no example
    data = [(torch.arange(i, min(i + 25, 101)), y[i : i + 25]) for i in range(0, 101, 25)]
    found = evaluate(Table(z), data, top=(1, 3), counts=range(1, 8), bounds=None)
    assert found.examples == 101
    assert found.accuracy == topk_accuracy(z, y) == found.top[1]
    assert found.top[3] == topk_accuracy(z, y, 3)
    assert found.loss == pytest.approx(float(F.cross_entropy(z.double(), y)), rel=1e-12)
    assert found.brier == pytest.approx(brier_score(z, y), rel=1e-12)
    assert found.calibration == pytest.approx(calibration_error(z, y), rel=1e-12)
    assert found.per_class == per_class_accuracy(z, y)
    assert found.per_class[6] is None
    assert found.balanced == pytest.approx(sum(found.per_class[:6]) / 6)
    assert found.groups["head"] == found.per_class[5]  # of classes 6 and 5 the former has no example
    assert int(found.confusion.sum()) == 101
    there = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert there["top"]["3"] == found.top[3]
    assert str(found).startswith(f"{found.accuracy:.2%} of 101 examples, top-3 {found.top[3]:.2%}, balanced")


@pytest.mark.parametrize("make", [convolutional, quantized])
def test_the_model_is_as_before_and_is_evaluated_in_evaluation_mode(make):
    model, (x, y) = make().train(), images(20)
    model[2].eval()
    data = [(x[:11], y[:11]), (x[11:], y[11:])]
    with unchanged(model):
        found = evaluate(model, data)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            close = evaluate(model, data)

        class Broken:
            def __iter__(self):
                yield x, y
                torch.rand(1)
                raise KeyError("broken")

        with pytest.raises(KeyError):
            evaluate(model, Broken())
    assert evaluate(model.eval(), data).as_dict() == found.as_dict()
    assert close.loss == pytest.approx(found.loss, rel=0.05)
    assert close.loss != found.loss


def test_inputs_may_be_arguments_and_keywords():
    class Two(nn.Module):
        def forward(self, a, b):
            return a + b

    a, b, y = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    one, two = evaluate(Two(), [((a, b), y)]), evaluate(Two(), [({"a": a, "b": b}, y)])
    assert one.loss == two.loss == pytest.approx(float(F.cross_entropy(a + b, y)), rel=1e-6)


Z, Y = torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])
ALL = torch.arange(4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: evaluate(Table(Z), []), "evaluate: data must hold at least one batch, got none"),
        (lambda: evaluate(Table(Z), [(ALL[:0], Y[:0])]), "data must hold at least one example, got none"),
        (lambda: evaluate(Table(Z), torch.zeros(3)), r"data must be an iterable of \(inputs, targets\)"),
        (lambda: evaluate(Table(Z), [ALL]), r"data must yield pairs \(inputs, targets\), got Tensor"),
        (
            lambda: evaluate(Table(Z), [(ALL, Y + 1)]),
            "labels must lie in 0 to 2, the classes of the logits, got 1 to 3",
        ),
        (lambda: evaluate(Table(Z), [(ALL, Y - 1)]), "labels must lie in 0 to 2.*got -1 to 1"),
        (lambda: evaluate(Table(Z), [(ALL, Y.float())]), "labels must be a tensor of 4 integers"),
        (lambda: evaluate(Table(Z * math.nan), [(ALL, Y)]), "logits must be numbers, got NaN for 4 of 4"),
        (lambda: evaluate(Table(Z), [(ALL, Y)], top=(0,)), "top must be an integer of at least 1, got 0"),
        (lambda: evaluate(Table(Z), [(ALL, Y)], counts=(5, 0, 1)), "counts must be positive, got 0 for class 1"),
        (lambda: evaluate(Table(Z), [(ALL, Y)], counts=(5, 1)), "counts must have one number for each of 3 classes"),
        (lambda: evaluate(Z, [(ALL, Y)]), "model must be a torch.nn.Module, got Tensor"),
        (lambda: group_accuracy((1.0,), (5,), bounds=(3, 9)), r"bounds must be \(many, few\) with many >= few"),
        (lambda: confusion_matrix(Y, Y, 2), "predicted must lie in 0 to 1, got 0 to 2"),
        (lambda: confusion_matrix(Y, Y[:2], 3), "labels must have 4 elements, as predicted, got 2"),
        (lambda: confusion_matrix(Y.float(), Y, 3), r"predicted must be integers \[N\], got torch.float32"),
    ],
)
def test_bad_input_is_one_line(call, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        call()
    assert "\n" not in str(caught.value)

# SPDX-License-Identifier: Apache-2.0
"""Long tails and wrong labels: as many as asked for, the rest as it was."""

import pytest
import torch

from fastflat.data import Dataset, long_tailed, noisy_labels


def some(counts=(600, 600, 600)):
    y = torch.cat([torch.full((n,), c) for c, n in enumerate(counts)])
    y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(9))]
    x = torch.arange(len(y)).view(-1, 1, 1, 1) % 256
    classes = tuple("abcdef"[: len(counts)])
    return Dataset("d", x.to(torch.uint8), y, x[:4].to(torch.uint8), y[:4], classes, "here")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_tail_falls_geometrically_to_the_ratio():
    d = some()
    found = long_tailed(d, 100, generator())
    assert found.train_y.bincount().tolist() == [600, 60, 6]
    assert found.name == "d-tail100"
    assert torch.equal(found.test_y, d.test_y)
    whole = [(int(x), int(y)) for x, y in zip(d.train_x.flatten(), d.train_y, strict=True)]
    there = iter(whole)  # what stays keeps its order and its label
    kept = zip(found.train_x.flatten().tolist(), found.train_y.tolist(), strict=True)
    assert all(any(pair == other for other in there) for pair in kept)
    assert torch.equal(long_tailed(d, 100, generator()).train_x, found.train_x)
    assert not torch.equal(long_tailed(d, 100, generator(1)).train_x, found.train_x)
    assert torch.equal(long_tailed(d, 1, generator()).train_x, d.train_x)


def test_labels_are_wrong_as_often_as_asked_and_evenly():
    d = some()
    found = noisy_labels(d, 0.4, generator())
    wrong = found.train_y != d.train_y
    assert int(wrong.sum()) == 720
    assert torch.equal(found.train_x, d.train_x)
    assert torch.equal(found.test_y, d.test_y)
    pairs = (d.train_y * 3 + found.train_y)[wrong].bincount(minlength=9)
    assert pairs[[0, 4, 8]].tolist() == [0, 0, 0]
    assert int(pairs[[1, 2, 3, 5, 6, 7]].min()) > 80  # 120 each on average
    assert torch.equal(noisy_labels(d, 0.0, generator()).train_y, d.train_y)
    assert not bool((noisy_labels(d, 1.0, generator()).train_y == d.train_y).any())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: long_tailed(some(), 0.5, generator()), "ratio must be at least 1, largest class to smallest, got 0.5"),
        (lambda: long_tailed(some(), float("nan"), generator()), "ratio must be at least 1"),
        (lambda: long_tailed(some(), 1e4, generator()), "class 2 must keep 1 to 600 training images, got 0"),
        (lambda: long_tailed(some((600, 10, 600)), 2, generator()), "class 1 must keep 1 to 10 .*got 424"),
        (lambda: long_tailed(some((5,)), 2, generator()), "a long tail needs at least 2 classes, got 1"),
        (lambda: noisy_labels(some(), -0.1, generator()), "share must lie in 0 to 1, got -0.1"),
        (lambda: noisy_labels(some(), 1.5, generator()), "share must lie in 0 to 1, got 1.5"),
        (lambda: noisy_labels(some((5,)), 0.1, generator()), "wrong labels need at least 2 classes, got 1"),
    ],
)
def test_bad_input_is_one_line(call, message):
    with pytest.raises(ValueError, match=message):
        call()

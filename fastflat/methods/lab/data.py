# SPDX-License-Identifier: Apache-2.0
"""Data of the experiments: real images in three parts, noisy labels, long tails, two moons."""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
from torch import Tensor

from fastflat import data
from fastflat.data import Batches, Dataset
from fastflat.data.dataset import by_class


@dataclasses.dataclass(frozen=True)
class Split:
    """Training, validation and test examples as floats; the validation part chooses, the test part is reported.

    Attributes:
        train, validation, test: (inputs, class numbers).
        classes: how many.
    """

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one input."""
        return tuple(self.train[0].shape[1:])

    def batches(self, part: str, size: int = 500) -> list[tuple[Tensor, Tensor]]:
        """A part in batches, in order."""
        x, y = getattr(self, part)
        return list(zip(x.split(size), y.split(size), strict=True))


@functools.lru_cache(maxsize=4)
def images(train: int, test: int, name: str = "fashion-mnist", share: float = 0.2) -> Split:
    """Images of a packaged set, normalised, with validation images beside the training ones.

    Args:
        train, test: how many; classes as in the whole.
        name: of :data:`fastflat.data.NAMED`, or a path.
        share: validation images beside the training ones, as a share of these.

    Raises:
        OSError: the data are not at hand; one line says where they come from.
    """
    return split(data.load(name), train, test, share)


def split(dataset: Dataset, train: int, test: int, share: float = 0.2) -> Split:
    """The first images of a data set in three parts; see :func:`images`."""
    held = max(1, round(train * share))
    dataset = dataset.first(train + held, test)
    if len(dataset.train_y) <= held:
        raise ValueError(f"methods: {dataset.name} must hold more than {held} training images, got no more")
    order = by_class(dataset.train_y)
    kept, aside = order[held:], order[:held]
    statistics = dataclasses.replace(dataset, train_x=dataset.train_x[kept], train_y=dataset.train_y[kept]).statistics()

    def floats(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        ((x, y),) = Batches(x, y, len(x), *statistics)
        return x, y

    return Split(
        floats(dataset.train_x[kept], dataset.train_y[kept]),
        floats(dataset.train_x[aside], dataset.train_y[aside]),
        floats(dataset.test_x, dataset.test_y),
        len(dataset.classes),
    )


def noisy_labels(y: Tensor, share: float, classes: int, seed: int) -> Tensor:
    """Labels of which a share, chosen by ``seed``, is replaced by another class drawn evenly (symmetric noise)."""
    if not 0 <= share <= 1:
        raise ValueError(f"methods: share of noisy labels must lie in 0 to 1, got {share}")
    g = torch.Generator().manual_seed(seed)
    changed = torch.randperm(len(y), generator=g)[: round(share * len(y))]
    y = y.clone()
    y[changed] = (y[changed] + torch.randint(1, classes, (len(changed),), generator=g)) % classes
    return y


def with_noisy_labels(parts: Split, share: float, seed: int) -> Split:
    """The same with noise in the training and validation labels; test labels stay."""
    (x, y), (vx, vy) = parts.train, parts.validation
    noisy = noisy_labels(y, share, parts.classes, seed), noisy_labels(vy, share, parts.classes, seed + 1)
    return dataclasses.replace(parts, train=(x, noisy[0]), validation=(vx, noisy[1]))


def long_tailed(parts: Split, ratio: float) -> Split:
    """The same with ``n_0 ratio^(-c/(C-1))`` training images of class c: the first class stays, the last keeps one in
    ``ratio``. Validation and test parts stay balanced (Cui et al. 2019, arXiv 1901.05555)."""
    if ratio < 1:
        raise ValueError(f"methods: ratio of a long tail must be at least 1, got {ratio}")
    x, y = parts.train
    kept = []
    for c in range(parts.classes):
        members = (y == c).nonzero().flatten()
        count = max(1, round(len(members) * ratio ** (-c / max(parts.classes - 1, 1))))
        kept.append(members[:count])
    at = torch.cat(kept).sort().values
    return dataclasses.replace(parts, train=(x[at], y[at]))


def two_moons(train: int = 400, test: int = 4000, noise: float = 0.2, seed: int = 0) -> Split:
    """Two interleaved half circles of radius 1 in Gaussian noise; validation examples as many as training ones."""

    def draw(count: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        y = torch.arange(count) % 2
        angle = math.pi * torch.rand(count, generator=g)
        upper = torch.stack([angle.cos(), angle.sin()], 1)
        lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], 1)
        x = torch.where(y[:, None] == 0, upper, lower) + noise * torch.randn(count, 2, generator=g)
        return x, y

    g = torch.Generator().manual_seed(seed)
    return Split(draw(train, g), draw(train, g), draw(test, g), 2)

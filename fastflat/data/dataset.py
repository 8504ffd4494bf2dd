# SPDX-License-Identifier: Apache-2.0
"""Labelled images in memory: :class:`Dataset`, deterministic splits, checksums."""

from __future__ import annotations

import dataclasses
import hashlib

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images and labels, split in two.

    Attributes:
        name: short name for tables and run folders.
        train_x, test_x: uint8 ``[N, C, H, W]``.
        train_y, test_y: int64 ``[N]``, classes from 0.
        classes: names of the classes.
        source: where the data came from, in words.
        mirrors: whether a mirrored image keeps its class (clothes do, digits do not).
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: tuple[str, ...]
    source: str
    mirrors: bool = True

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            x, y = getattr(self, part + "_x"), getattr(self, part + "_y")
            if x.dtype != torch.uint8 or x.dim() != 4:
                raise ValueError(
                    f"data: {self.name}: {part} images must be uint8 [N, C, H, W], got {x.dtype} {list(x.shape)}"
                )
            if y.dtype != torch.int64 or y.shape != x.shape[:1]:
                raise ValueError(
                    f"data: {self.name}: {part} labels must be int64 [{len(x)}], got {y.dtype} {list(y.shape)}"
                )
            if not len(x):
                raise ValueError(f"data: {self.name}: the {part} split must hold images, got none")
            if int(y.min()) < 0 or int(y.max()) >= len(self.classes):
                got = f"{int(y.min())} to {int(y.max())}"
                raise ValueError(f"data: {self.name}: labels must lie in 0 to {len(self.classes) - 1}, got {got}")
        if self.train_x.shape[1:] != self.test_x.shape[1:]:
            got = f"{list(self.train_x.shape[1:])} and {list(self.test_x.shape[1:])}"
            raise ValueError(f"data: {self.name}: train and test images must have one shape, got {got}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image."""
        return tuple(self.train_x.shape[1:])

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel of the training images scaled to [0, 1], fp32 ``[C]``."""
        x = self.train_x.movedim(1, 0).flatten(1)
        # Integer sums: exact, so the same on every machine and with every number of threads.
        n = x.shape[1]
        total = x.long().sum(1).double()
        squares = x.long().square().sum(1).double()
        mean = total / n
        deviation = (squares / n - mean * mean).clamp(min=0).sqrt()
        return (mean / 255).float(), (deviation / 255).clamp(min=1 / 255).float()

    def checksum(self) -> str:
        """First 16 hex digits of the SHA-256 of all arrays: whether two runs saw the same data."""
        digest = hashlib.sha256()
        for t in (self.train_x, self.train_y, self.test_x, self.test_y):
            digest.update(str(tuple(t.shape)).encode())
            digest.update(t.contiguous().numpy().data)
        return digest.hexdigest()[:16]

    def first(self, train: int | None, test: int | None) -> Dataset:
        """The same data with at most `train` and `test` images, classes in the proportions of the whole."""
        if (train is None or train >= len(self.train_x)) and (test is None or test >= len(self.test_x)):
            return self
        kept = {}
        for part, n in (("train", train), ("test", test)):
            x, y = getattr(self, part + "_x"), getattr(self, part + "_y")
            if n is not None and n < 1:
                raise ValueError(f"data: the number of {part} images must be at least 1, got {n}")
            order = torch.arange(len(y)) if n is None or n >= len(y) else by_class(y)[:n].sort().values
            kept |= {part + "_x": x[order], part + "_y": y[order]}
        return dataclasses.replace(self, **kept)


def split(x: Tensor, y: Tensor, test_share: float = 0.2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(train_x, train_y, test_x, test_y): the same share of every class, by a fixed rule without a random generator."""
    order = by_class(y)
    test = max(1, round(len(y) * test_share))
    if test >= len(y):
        raise ValueError(f"data: a split needs at least 2 images, got {len(y)}")
    train_at, test_at = order[test:].sort().values, order[:test].sort().values
    return x[train_at], y[train_at], x[test_at], y[test_at]


def by_class(y: Tensor) -> Tensor:
    """An order of the indices in which every prefix holds the classes in nearly their overall proportions.

    Within a class the order is that of a hash of the index (Knuth's multiplicative), which no library version changes.
    """
    index = torch.arange(len(y))
    mixed = (index * 2654435761) % 2**32
    hashed = torch.argsort(mixed ^ (mixed >> 15), stable=True)
    counts = torch.bincount(y)
    rank = torch.empty(len(y), dtype=torch.float64)
    labels = y[hashed]
    for c in range(len(counts)):
        members = hashed[labels == c]
        rank[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / max(len(members), 1)
    return hashed[torch.argsort(rank[hashed], stable=True)]

# SPDX-License-Identifier: Apache-2.0
"""Training sets made harder: a long tail of rare classes, wrong labels. Test splits stay as they are."""

from __future__ import annotations

import dataclasses

import torch

from fastflat.data.dataset import Dataset


def long_tailed(dataset: Dataset, ratio: float, generator: torch.Generator) -> Dataset:
    """Class c keeps ``floor(n ratio^(-c/(C-1)))`` of its training images, n being the size of the largest class: class
    0 keeps all, the last the ratio-th part.

    Args:
        dataset: of at least two classes.
        ratio: of the first class's size to the last's, at least 1.
        generator: chooses the images, which stay in order.

    Raises:
        ValueError: an argument is not as above, or a class has fewer images than it should keep.

    Source: Cui et al., CVPR 2019 (arXiv:1901.05555), section 5.1.
    """
    classes = len(dataset.classes)
    if classes < 2:
        raise ValueError(f"data: {dataset.name}: a long tail needs at least 2 classes, got {classes}")
    if not ratio >= 1:
        raise ValueError(f"data: ratio must be at least 1, largest class to smallest, got {ratio}")
    counts = torch.bincount(dataset.train_y, minlength=classes).tolist()
    kept = []
    for c, there in enumerate(counts):
        want = int(max(counts) * ratio ** (-c / (classes - 1)) + 1e-9)
        if not 1 <= want <= there:
            raise ValueError(f"data: {dataset.name}: class {c} must keep 1 to {there} training images, got {want}")
        members = (dataset.train_y == c).nonzero()[:, 0]
        kept.append(members[torch.randperm(there, generator=generator)[:want]])
    at = torch.cat(kept).sort().values
    name = f"{dataset.name}-tail{ratio:g}"
    return dataclasses.replace(dataset, name=name, train_x=dataset.train_x[at], train_y=dataset.train_y[at])


def noisy_labels(dataset: Dataset, share: float, generator: torch.Generator) -> Dataset:
    """``round(share N)`` training images get the label of another class, each other class equally likely.

    Args:
        dataset: of at least two classes.
        share: of wrong labels, 0 to 1.
        generator: chooses images and labels.

    Raises:
        ValueError: an argument is not as above.
    """
    classes = len(dataset.classes)
    if classes < 2:
        raise ValueError(f"data: {dataset.name}: wrong labels need at least 2 classes, got {classes}")
    if not 0 <= share <= 1:
        raise ValueError(f"data: share must lie in 0 to 1, got {share}")
    count = round(share * len(dataset.train_y))
    at = torch.randperm(len(dataset.train_y), generator=generator)[:count]
    labels = dataset.train_y.clone()
    labels[at] = (labels[at] + torch.randint(1, classes, (count,), generator=generator)) % classes
    return dataclasses.replace(dataset, name=f"{dataset.name}-noisy{100 * share:g}", train_y=labels)

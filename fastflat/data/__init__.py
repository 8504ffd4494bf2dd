# SPDX-License-Identifier: Apache-2.0
"""Real data for training and tests, from packages or the user's files; nothing is fetched unless asked for."""

from __future__ import annotations

from fastflat.data.batches import Batches
from fastflat.data.composite import fashion_mnist_m
from fastflat.data.dataset import Dataset
from fastflat.data.files import from_path
from fastflat.data.harder import long_tailed, noisy_labels
from fastflat.data.packaged import digits, download_fashion_mnist, fashion_mnist, mnist_5k
from fastflat.data.text import Text, sotu, windows

#: Data sets by name; any other name is taken as a path.
NAMED = {"fashion-mnist": fashion_mnist, "fashion-mnist-m": fashion_mnist_m, "mnist-5k": mnist_5k, "digits": digits}

__all__ = [
    "NAMED",
    "Batches",
    "Dataset",
    "Text",
    "download_fashion_mnist",
    "from_path",
    "load",
    "long_tailed",
    "noisy_labels",
    "sotu",
    "windows",
]


def load(name: str, *, size: int | None = None, download: bool = False) -> Dataset:
    """A data set by name (:data:`NAMED`), ``"auto"`` for the first of Fashion-MNIST and MNIST-5k at hand, or a path.

    Args:
        name: as above.
        size: side to which the images of a folder are resized.
        download: unpack Debian's Fashion-MNIST into the cache folder first if it is wanted and not there; with
            ``"auto"`` a failure of that falls through to the next.

    Raises:
        OSError, ValueError: the data are missing or broken; one line.
    """
    if name == "auto":
        reasons = []
        for candidate in ("fashion-mnist", "mnist-5k"):
            try:
                return load(candidate, download=download)
            except OSError as error:
                reasons.append(str(error).removeprefix("data: "))
        raise FileNotFoundError(f"data: no data set is at hand: {'; '.join(reasons)}")
    if name.startswith("fashion-mnist") and name in NAMED and download:
        download_fashion_mnist()
    return NAMED[name]() if name in NAMED else from_path(name, size)

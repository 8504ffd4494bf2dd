# SPDX-License-Identifier: Apache-2.0
"""Fashion-MNIST-M: clothes over colour photographs, a composite that is harder than clothes on black.

Each garment stands at an offset of 0 to 4 pixels on 32x32 and is subtracted from a random crop of a photograph, channel
by channel, absolute differences (as MNIST-M: Ganin and Lempitsky, ICML 2015). The photographs of the two splits differ.
On the first 10 000 + 2000 images ridge regression reaches 27 % and 5 nearest neighbours 46 % (both 82 % on black).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastflat.data.dataset import Dataset
from fastflat.data.packaged import fashion_mnist, inside

_SIDE = 32
_IMAGE, _PHOTO = ("skimage", "data/"), ("sklearn", "datasets/images/")
#: Photographs by split.
PHOTOS = {
    "train": (
        (*_IMAGE, "coffee.png"),
        (*_IMAGE, "chelsea.png"),
        (*_IMAGE, "motorcycle_left.png"),
        (*_IMAGE, "ihc.png"),
        (*_IMAGE, "hubble_deep_field.jpg"),
        (*_PHOTO, "china.jpg"),
    ),
    "test": (
        (*_IMAGE, "astronaut.png"),
        (*_IMAGE, "rocket.jpg"),
        (*_IMAGE, "retina.jpg"),
        (*_PHOTO, "flower.jpg"),
    ),
}
#: Of all arrays: the composite is the same everywhere, or refused.
CHECKSUM = "9894df7cd299b1bd"


def fashion_mnist_m() -> Dataset:
    """60 000 + 10 000 colour 32x32 images in Fashion-MNIST's 10 classes, the same arrays on every machine.

    Needs Fashion-MNIST, and scikit-image and scikit-learn for their photographs, whose terms stand in these packages.
    Nothing is drawn from a random generator.

    Raises:
        FileNotFoundError: one of these is missing.
        ValueError: the arrays are not those of :data:`CHECKSUM`.
    """
    plain = fashion_mnist()
    photos = {split: [_photo(*where) for where in PHOTOS[split]] for split in PHOTOS}
    train, test = composed(plain.train_x, photos["train"], 1), composed(plain.test_x, photos["test"], 2)
    source = f"composite of {plain.source} and photographs of scikit-image and scikit-learn"
    made = Dataset("fashion-mnist-m", train, plain.train_y, test, plain.test_y, plain.classes, source)
    if made.checksum() != CHECKSUM:
        raise ValueError(
            f"data: Fashion-MNIST-M must have the checksum {CHECKSUM}, got {made.checksum()}: other photographs or"
            " another JPEG decoder; Pillow's own wheels give the right one"
        )
    return made


def composed(garments: Tensor, photos: list[Tensor], salt: int) -> Tensor:
    """Composites ``[N, 3, 32, 32]`` of garments ``[N, 1, h, w]`` and photographs ``[3, H, W]``, all uint8.

    Photograph, zoom, crop and offset of an image follow from a hash of its index and the salt, which no library version
    changes. Crops are 32, 64 or 96 pixels wide, every 1st, 2nd or 3rd pixel.
    """
    n, _, height, width = garments.shape
    draw = _hashed(n, 6, salt)
    which, zoom = draw[:, 0] % len(photos), 1 + draw[:, 1] % 3
    made = torch.zeros(n, 3, _SIDE, _SIDE, dtype=torch.uint8)
    step = torch.arange(_SIDE)
    for p, photo in enumerate(photos):
        rows, columns = photo.shape[1:]
        for z in (1, 2, 3):
            at = ((which == p) & (zoom == z)).nonzero()[:, 0]
            top = draw[at, 2] % (rows - z * _SIDE + 1)
            left = draw[at, 3] % (columns - z * _SIDE + 1)
            pixel = (top[:, None] + z * step)[:, :, None] * columns + (left[:, None] + z * step)[:, None, :]
            made[at] = photo.flatten(1)[:, pixel.flatten()].view(3, len(at), _SIDE, _SIDE).movedim(0, 1)
    down, right = draw[:, 4] % (_SIDE - height + 1), draw[:, 5] % (_SIDE - width + 1)
    for d in range(_SIDE - height + 1):
        for r in range(_SIDE - width + 1):
            at = ((down == d) & (right == r)).nonzero()[:, 0]
            place = (at, slice(None), slice(d, d + height), slice(r, r + width))
            under, garment = made[place], garments[at]
            made[place] = torch.maximum(under, garment) - torch.minimum(under, garment)
    return made


def _hashed(n: int, k: int, salt: int) -> Tensor:
    """Numbers ``[n, k]`` below 2^31, as good as random, of position and salt (multiply and shift, three rounds)."""
    x = ((torch.arange(n * k) + 1) * 2654435761 % 2**32) ^ (salt * 40503)
    for factor in (0x45D9F3B, 0x2C1B3C6D, 0x297A2D39):
        x = ((x ^ (x >> 16)) * factor) % 2**32
    return ((x ^ (x >> 16)) >> 1).view(n, k)


def _photo(package: str, folder: str, name: str) -> Tensor:
    """A colour photograph, uint8 ``[3, H, W]``."""
    path = inside(package, folder + name)
    try:
        from PIL import Image
    except ImportError:
        raise FileNotFoundError(
            "data: the Python package pillow must be installed, got none; pip install pillow"
        ) from None
    with Image.open(path) as image:
        image = image.convert("RGB")
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return data.view(image.height, image.width, 3).movedim(-1, 0).contiguous()

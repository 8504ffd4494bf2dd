# SPDX-License-Identifier: Apache-2.0
"""The composite of clothes and photographs; its checksum is tested with those of the other data sets."""

import pytest
import torch

from fastflat.data import composite, packaged
from fastflat.data.composite import composed


def test_each_image_is_a_crop_less_a_garment_somewhere_inside():
    garments = torch.full((60, 1, 28, 28), 200, dtype=torch.uint8)
    rows, columns = torch.arange(100)[:, None], torch.arange(120)[None]
    photo = torch.stack([rows.expand(100, 120), columns.expand(100, 120), torch.full((100, 120), 7)]).to(torch.uint8)
    made = composed(garments, [photo], 1).long()
    places, zooms, corners = set(), set(), set()
    for image in made:
        covered = image[2] == 193  # |7 - 200|
        assert int(covered.sum()) == 28 * 28
        assert bool((image[2][~covered] == 7).all())
        top, left = covered.nonzero()[0].tolist()
        assert bool(covered[top : top + 28, left : left + 28].all())
        places.add((top, left))
        crop = torch.where(covered, 200 - image, image)
        zoom = int(crop[0, 1, 0] - crop[0, 0, 0])
        first = crop[:2, 0, 0]
        assert torch.equal(crop[0], (first[0] + zoom * torch.arange(32))[:, None].expand(32, 32))
        assert torch.equal(crop[1], (first[1] + zoom * torch.arange(32))[None].expand(32, 32))
        zooms.add(zoom)
        corners.add((zoom, *first.tolist()))
    assert zooms == {1, 2, 3}
    assert len(places) > 15  # of 25
    assert len(corners) > 50


def test_every_photograph_serves_and_the_salt_matters():
    garments = torch.zeros(60, 1, 28, 28, dtype=torch.uint8)
    photos = [torch.full((3, 96, 96), k, dtype=torch.uint8) for k in (10, 20, 30)]
    one, again, other = composed(garments, photos, 1), composed(garments, photos, 1), composed(garments, photos, 2)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    counts = [int((one[:, 0, 0, 0] == k).sum()) for k in (10, 20, 30)]
    assert sum(counts) == 60
    assert min(counts) > 10


def test_splits_share_no_photograph():
    assert not set(composite.PHOTOS["train"]) & set(composite.PHOTOS["test"])


def test_what_is_missing_or_different_is_one_line(monkeypatch):
    try:
        plain = packaged.fashion_mnist()
    except FileNotFoundError as error:
        pytest.skip(f"not on this machine: {error}")
    few = plain.first(50, 20)
    monkeypatch.setattr(composite, "fashion_mnist", lambda: few)
    monkeypatch.setattr(composite, "_photo", lambda *where: torch.zeros(3, 96, 96, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"Fashion-MNIST-M must have the checksum 9894df7cd299b1bd, got .*Pillow"):
        composite.fashion_mnist_m()
    monkeypatch.undo()
    monkeypatch.setattr(composite, "fashion_mnist", lambda: few)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="the Python package scikit-image must be installed"):
        composite.fashion_mnist_m()

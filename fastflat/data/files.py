# SPDX-License-Identifier: Apache-2.0
"""The user's own data: an ``.npz``, a folder of images, IDX files (MNIST's format), CIFAR's binary batches."""

from __future__ import annotations

import gzip
import math
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from fastflat.data.dataset import Dataset, split

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
_IDX = ("train-images", "train-labels", "t10k-images", "t10k-labels")
_CIFAR = {"data_batch_1.bin": (1, 10), "train.bin": (2, 100)}


def from_path(path: str | Path, size: int | None = None) -> Dataset:
    """The data at a path, whatever of the above lies there.

    Args:
        path: an ``.npz`` file, or a folder.
        size: side to which images of a folder are resized; ``None`` wants them all of one size.

    Raises:
        FileNotFoundError, ValueError: nothing is there, or it is not what it should be; one line that names the file.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"data: path must exist, got {str(path)!r}")
    if path.is_dir():
        if any(path.glob("train-images*")):
            return idx_folder(path)
        if any((path / name).is_file() for name in _CIFAR):
            return cifar_folder(path)
        return image_folder(path, size)
    return npz(path)


def npz(path: Path) -> Dataset:
    """Arrays ``x_train, y_train, x_test, y_test``, or ``x, y`` to be split: images ``[N, H, W]``, ``[N, H, W, C]`` or
    ``[N, C, H, W]`` in uint8 or in floats from 0 to 1, labels ``[N]`` of integers. Nothing in it is executed."""
    import numpy

    try:
        with numpy.load(path, allow_pickle=False) as archive:
            if not hasattr(archive, "files"):
                raise ValueError("it holds one array")
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"data: {path} must be an .npz of plain arrays, got: {reason}") from None
    if {"x_train", "y_train", "x_test", "y_test"} <= arrays.keys():
        parts = []
        for part in ("train", "test"):
            parts += _arrays(path, arrays[f"x_{part}"], arrays[f"y_{part}"])
    elif {"x", "y"} <= arrays.keys():
        parts = split(*_arrays(path, arrays["x"], arrays["y"]))
    else:
        names = ", ".join(sorted(arrays)) or "nothing"
        raise ValueError(f"data: {path} must hold x_train, y_train, x_test, y_test or x, y, got {names}")
    classes = int(max(parts[1].max(), parts[3].max())) + 1
    return Dataset(path.stem, *parts, tuple(map(str, range(classes))), f"file {path.name}")


def _arrays(path: Path, x, y) -> tuple[Tensor, Tensor]:
    import numpy

    if x.ndim not in (3, 4) or not len(x) or 0 in x.shape:
        raise ValueError(f"data: {path}: images must be [N, H, W], [N, H, W, C] or [N, C, H, W], got {list(x.shape)}")
    if x.dtype.kind == "f":
        if not (numpy.isfinite(x).all() and x.min() >= 0 and x.max() <= 1):
            raise ValueError(f"data: {path}: images in floats must lie in 0 to 1, got {x.min()} to {x.max()}")
        x = numpy.rint(x * 255).astype(numpy.uint8)
    if x.dtype != numpy.uint8:
        raise ValueError(f"data: {path}: images must be uint8, or floats from 0 to 1, got {x.dtype}")
    if x.ndim == 3:
        x = x[:, None]
    elif x.shape[-1] in (1, 3, 4) and x.shape[1] not in (1, 3, 4):
        x = x.transpose(0, 3, 1, 2)
    y = y.reshape(len(y)) if y.ndim == 2 and y.shape[1] == 1 else y
    if y.ndim != 1 or len(y) != len(x) or y.dtype.kind not in "iu":
        raise ValueError(f"data: {path}: labels must be {len(x)} integers, got {y.dtype} {list(y.shape)}")
    if int(y.min()) < 0 or int(y.max()) >= 100_000:
        raise ValueError(f"data: {path}: labels must lie in 0 to 99999, got {int(y.min())} to {int(y.max())}")
    return torch.from_numpy(numpy.ascontiguousarray(x)), torch.from_numpy(y.astype(numpy.int64))


def image_folder(path: Path, size: int | None = None) -> Dataset:
    """``path/train/<class>/*`` and ``path/test/<class>/*``, or ``path/<class>/*`` to be split. Classes are sorted by
    name; images that are all gray give one channel, else three."""
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise ValueError("data: a folder of images needs Pillow; pip install pillow") from None
    if (path / "train").is_dir() and (path / "test").is_dir():
        roots = [path / "train", path / "test"]
    else:
        roots = [path]
    names = sorted(p.name for p in roots[0].iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise ValueError(f"data: {path} must hold a folder of images for each class, got no folder")
    files = [[_images(root / name) for name in names] for root in roots]
    opened = [[_open(file, size) for file in group] for per_class in files for group in per_class]
    flat = [image for group in opened for image in group]
    mode = "L" if all(image.mode in ("L", "1") for image in flat) else "RGB"
    sizes = {image.size for image in flat}
    if len(sizes) > 1:
        some = ", ".join(f"{w}x{h}" for w, h in sorted(sizes)[:3])
        raise ValueError(f"data: {path}: images must have one size, got {some}; --image-size N resizes them")
    parts = []
    for at, per_class in enumerate(files):
        groups = opened[at * len(names) : (at + 1) * len(names)]
        x = torch.stack([_pixels(image.convert(mode)) for group in groups for image in group])
        y = torch.tensor([label for label, group in enumerate(per_class) for _ in group])
        parts += [x, y]
    if len(roots) == 1:
        parts = split(*parts)
    return Dataset(path.resolve().name, *parts, tuple(names), f"folder {path.name}")


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"data: {folder} must be a folder of images, got nothing there")
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    if not files:
        raise ValueError(f"data: {folder} must hold images ({', '.join(SUFFIXES[:3])}, ...), got none")
    return files


def _open(file: Path, size: int | None):
    from PIL import Image

    try:
        with Image.open(file) as image:
            image.load()
            image = image.convert("RGB") if image.mode not in ("L", "1", "RGB") else image.copy()
            return image if size is None else image.convert("RGB" if image.mode == "RGB" else "L").resize((size, size))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"data: {file} must be an image, got: {str(error).splitlines()[0]}") from None


def _pixels(image) -> Tensor:
    channels = len(image.getbands())
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return data.view(image.height, image.width, channels).movedim(-1, 0).contiguous()


def idx_folder(path: Path) -> Dataset:
    """MNIST's own files, gzipped or not, under their usual names."""
    parts = []
    for stem in _IDX:
        found = sorted(path.glob(f"{stem}*"))
        if not found:
            raise ValueError(f"data: {path} must hold {', '.join(s + '*' for s in _IDX)}, got no {stem}*")
        parts.append(idx(_bytes(found[0]), str(found[0])))
    for stem, part, axes in zip(_IDX, parts, (3, 1, 3, 1), strict=True):
        if part.dim() != axes:
            raise ValueError(f"data: {path}: {stem} must have {axes} axes, got {part.dim()}")
    images = (parts[0].unsqueeze(1), parts[2].unsqueeze(1))
    labels = (parts[1].long(), parts[3].long())
    classes = tuple(map(str, range(int(max(t.max() for t in labels)) + 1)))
    name = path.resolve().name
    return Dataset(name, images[0], labels[0], images[1], labels[1], classes, f"folder {path.name}", mirrors=False)


def idx(raw: bytes, path: str) -> Tensor:
    """An array of unsigned bytes in IDX format: 0, 0, 8, number of axes, their big-endian lengths, the data."""
    axes = raw[3] if len(raw) > 3 else 0
    start = 4 + 4 * axes
    if raw[:3] != b"\0\0\x08" or not 1 <= axes <= 4 or len(raw) < start:
        raise ValueError(f"data: {path} must be an IDX file of unsigned bytes, got another header")
    shape = [int.from_bytes(raw[4 + 4 * k : 8 + 4 * k], "big") for k in range(axes)]
    if len(raw) - start != math.prod(shape) or 0 in shape:
        raise ValueError(f"data: {path} must hold {math.prod(shape)} bytes for {shape}, got {len(raw) - start}")
    return torch.frombuffer(bytearray(raw[start:]), dtype=torch.uint8).view(shape)


def cifar_folder(path: Path) -> Dataset:
    """CIFAR-10's or CIFAR-100's binary version: records of label bytes and 3x32x32 pixels."""
    first = next(name for name in _CIFAR if (path / name).is_file())
    labels, classes = _CIFAR[first]
    train = (
        [first]
        if labels == 2
        else [f"data_batch_{k}.bin" for k in range(1, 6) if (path / f"data_batch_{k}.bin").is_file()]
    )
    test = ["test.bin"] if labels == 2 else ["test_batch.bin"]
    parts = []
    for files in (train, test):
        raw = b"".join(_bytes(path / name) for name in files)
        width = labels + 3 * 32 * 32
        if not raw or len(raw) % width:
            raise ValueError(f"data: {path}: {files[0]} must hold records of {width} bytes, got {len(raw)} bytes")
        table = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, width)
        parts += [table[:, labels:].reshape(-1, 3, 32, 32).contiguous(), table[:, labels - 1].long()]
    return Dataset(f"cifar-{classes}", *parts, tuple(map(str, range(classes))), f"folder {path.name}")


def _bytes(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError) as error:
        raise ValueError(f"data: {path} must be a readable file, got: {error}") from None

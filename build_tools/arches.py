# SPDX-License-Identifier: Apache-2.0
"""For which GPU architectures the CUDA library is compiled."""

from __future__ import annotations

import re
from collections.abc import Mapping

# One entry per generation: code for x.0 runs on every x.y, and the kernels use nothing that a minor version adds.
# The newest also as PTX, which the driver compiles for GPUs that did not exist at build time.
_DEFAULTS = (
    ((13, 0), "7.5 8.0 9.0 10.0 11.0 12.0+PTX"),  # 13.0 dropped everything before 7.5, and renamed 10.1 to 11.0
    ((12, 8), "7.0 7.5 8.0 9.0 10.0 12.0+PTX"),  # 12.8 knows Blackwell
    ((12, 0), "7.0 7.5 8.0 9.0+PTX"),
)

_ARCH = re.compile(r"(\d+)\.(\d)([af]?)(\+PTX)?")


def choose(env: Mapping[str, str], nvcc: str, known: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Architectures such as ``("8.0", "9.0+PTX")`` for the toolkit version `nvcc`.

    ``FASTFLAT_ARCHS`` decides, else ``TORCH_CUDA_ARCH_LIST``, else the default of the toolkit; ``all`` are those that
    the toolkit knows, and PTX of the newest. No GPU is asked: the machine that builds need not have one. Raises
    ValueError on a name that is not ``MAJOR.MINOR[a|f][+PTX]``, and on an architecture that is not among `known`.
    """
    for name in ("FASTFLAT_ARCHS", "TORCH_CUDA_ARCH_LIST"):
        wanted = re.split(r"[\s;,]+", env.get(name, "").strip(" ;,"))
        if wanted == ["all"]:
            if not known:
                raise ValueError(f"{name}=all needs an nvcc that lists its architectures, got nvcc {nvcc}")
            ordered = sorted(known, key=lambda arch: tuple(map(int, arch.split("."))))
            return (*ordered[:-1], f"{ordered[-1]}+PTX")
        if wanted != [""]:
            for arch in wanted:
                if not _ARCH.fullmatch(arch):
                    raise ValueError(
                        f"{name}: an architecture must be MAJOR.MINOR with an optional a or f and +PTX, as in"
                        f" '8.0 9.0a 12.0+PTX', got {arch!r}"
                    )
                if known and ".".join(_ARCH.fullmatch(arch).groups()[:2]) not in known:
                    raise ValueError(f"{name}: nvcc {nvcc} knows {', '.join(known)}, got {arch!r}")
            return tuple(dict.fromkeys(wanted))
    version = tuple(int(part) for part in nvcc.split(".")[:2])
    for since, arches in _DEFAULTS:
        if version >= since:
            return tuple(arches.split())
    raise ValueError(f"nvcc must be at least {'.'.join(map(str, _DEFAULTS[-1][0]))}, got {nvcc}")


def gencode(arches: tuple[str, ...]) -> list[str]:
    """The nvcc options for `arches`: machine code for each, and PTX where ``+PTX`` asks for it."""
    options = []
    for arch in arches:
        major, minor, suffix, ptx = _ARCH.fullmatch(arch).groups()
        number = f"{major}{minor}{suffix}"
        options.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if ptx:
            options.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return options

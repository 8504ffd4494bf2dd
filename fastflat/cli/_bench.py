# SPDX-License-Identifier: Apache-2.0
"""What the commands of ``fastflat bench`` share: options, how they are read, and what is refused."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import torch

import fastflat

#: The folder of a checkout, where it is one.
ROOT = Path(fastflat.__file__).resolve().parent.parent
_SMALLEST, _LARGEST = 2**7, 2**28


def package(name: str = "") -> Any:
    """A module of ``fastflat.benchmarks``; of a checkout's folder ``benchmarks`` where fastflat is not installed.

    Raises:
        ImportError: there is neither.
    """
    whole = "fastflat.benchmarks"
    if importlib.util.find_spec(whole) is None:
        file = ROOT / "benchmarks" / "__init__.py"
        if not file.is_file():
            raise ImportError(f"{whole} is not installed; pip install --no-build-isolation -e .")
        spec = importlib.util.spec_from_file_location(whole, file, submodule_search_locations=[str(file.parent)])
        module = importlib.util.module_from_spec(spec)
        sys.modules[whole] = module
        spec.loader.exec_module(module)
        fastflat.benchmarks = module
    return importlib.import_module(f"{whole}.{name}" if name else whole)


_FILE = click.Path(path_type=Path)
THREADS = click.option("--threads", default="1,all", show_default=True, help="Numbers of threads of the CPU: 1,4,all.")
DEVICE = click.option(
    "--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, several, or all: every GPU, then the CPU."
)
ALLOCATOR = click.option(
    "--allocator",
    type=click.Choice(["tuned", "default"]),
    default="tuned",
    show_default=True,
    help="tuned: fastflat.tune_host_memory() first; default: as the C library came.",
)
QUICK = click.option("--quick", is_flag=True, help="Fewer rounds.")
GATE = click.option(
    "--gate", is_flag=True, help="Run the ops' test files first, and refuse if they are red (in a checkout)."
)
_JSON = click.option("--json", "json_file", type=_FILE, help="Write every row to this file.")
_HTML = click.option("--html", "html_file", type=_FILE, help="Write a page with interactive figures to this file.")


def files(command: Callable) -> Callable:
    """The options ``--json`` and ``--html``."""
    return _JSON(_HTML(command))


# Reading the command line ---------------------------------------------------------------------------------------------


def parse_sizes(text: str) -> list[int]:
    """``2^12,4096`` and ranges ``2^12..2^24`` of powers of two, every k-th with ``/k``."""
    sizes: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"2\^(\d+)(?:\.\.2\^(\d+)(?:/([1-9]\d*))?)?|(\d+)", part.strip())
        if not found:
            raise ValueError(f"bench: --sizes must be like 2^12,2^20 or 2^12..2^24/2, got {part.strip()!r}")
        first, last, stride, plain = found.groups()
        if plain:
            sizes.append(int(plain))
        else:
            exponents = range(int(first), int(last or first) + 1, int(stride or 1))
            if len(exponents) == 0 or exponents[-1] > 63:
                raise ValueError(f"bench: --sizes must ascend and end at 2^63 at most, got {part.strip()!r}")
            sizes += [2**exponent for exponent in exponents]
    for size in sizes:
        if size & (size - 1) or not _SMALLEST <= size <= _LARGEST:
            raise ValueError(f"bench: --sizes must be powers of two from {_SMALLEST} to {_LARGEST}, got {size}")
    return list(dict.fromkeys(sizes))


def parse_counts(text: str, option: str = "k") -> list[int]:
    """``1,8``: numbers."""
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not (part.isdecimal() and 1 <= int(part) <= 1024):
            raise ValueError(f"bench: --{option} must be numbers from 1 to 1024, got {part!r}")
    return list(dict.fromkeys(map(int, parts)))


def parse_threads(text: str) -> list[int]:
    """``1,4,all``: all means as many as PyTorch takes by itself."""
    most = torch.get_num_threads()
    counts = []
    for part in (part.strip() for part in text.split(",")):
        if part != "all" and not (part.isdecimal() and 1 <= int(part) <= 1024):
            raise ValueError(f"bench: --threads must be numbers from 1 to 1024 or all, got {part!r}")
        counts.append(most if part == "all" else int(part))
    return list(dict.fromkeys(counts))


def threads_of(device: Any, counts: list[int]) -> list[int]:
    """Those of the CPU; a GPU is measured once, with the host's threads as they are."""
    return counts if device.kind == "cpu" else [torch.get_num_threads()]


def known(option: str, text: str, names: Any) -> list[str]:
    chosen = [part.strip() for part in text.split(",")]
    for name in chosen:
        if name not in names:
            raise ValueError(f"bench: --{option} must be of {', '.join(names)}, got {name!r}")
    return list(dict.fromkeys(chosen))


def writable(json_file: Path | None, html_file: Path | None) -> None:
    """Refuse now what would fail after the measurement."""
    for option, target in (("json", json_file), ("html", html_file)):
        if target is not None and (target.is_dir() or not target.resolve().parent.is_dir()):
            raise ValueError(f"bench: --{option} must name a file in an existing folder, got {target}")
    if html_file is not None:
        needs("plotly")


def needs(*names: str) -> None:
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"bench: {name} is not installed; pip install 'fastflat[bench]'")


# Before the measurement -----------------------------------------------------------------------------------------------


def memory(allocator: str) -> str:
    """The allocator's state in words."""
    if allocator == "default":
        return "default"
    done = fastflat.tune_host_memory()
    return f"tuned: {done.reason}" if done.applied else f"default: {done.reason}"


def gate(devices: Sequence[Any], dtypes: list[torch.dtype], tested: Sequence[str], ops: bool, steps: bool) -> None:
    """Refuse if quantizers (`ops`) or optimizers' `steps` differ from the reference on one of the devices, or if the
    test file of one of the `tested` families is red."""
    checks = package("gate")
    for family in tested:
        tests = ROOT / "tests" / "ops" / f"test_{family}.py"
        if not tests.is_file():
            raise ValueError(f"bench: --gate must run in a checkout with tests/ops/{tests.name}, got none")
        red = checks.tests_are_red(tests)
        if red:
            raise click.ClickException(f"bench: refused, the op's tests are red: {red}")
    for device in devices:
        with device.active():
            wrong = checks.mistakes(device.place, dtypes) if ops else []
            wrong += checks.step_mistakes(device.place, dtypes) if steps else []
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise click.ClickException(f"bench: refused, the kernels differ from the reference in {wrong[0]}{more}")

# SPDX-License-Identifier: Apache-2.0
"""Where a benchmark ran: the line without which a number means nothing."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import fastflat
from fastflat import _load


def describe(device: torch.device) -> dict[str, Any]:
    """Processor, cores, instruction sets, versions, compiler, load; the GPU where one is measured."""
    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "isa": _load.cpu_isa() or "none",
        "torch_isa": torch.backends.cpu.get_cpu_capability().lower(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastflat": fastflat.__version__,
        "commit": _commit(),
        "compiler": _compiler(),
        "backend": fastflat.choose("fake_quantize", device.type)[0],
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = f"{properties.name}, sm_{properties.major}{properties.minor}"
        facts["cuda"] = torch.version.cuda
    return facts


def line(facts: dict[str, Any]) -> str:
    """The facts in one line."""
    where = facts.get("gpu") or f"{facts['cpu']}, {facts['cores']} cores, {facts['isa']}"
    built = f", {facts['compiler']}" if facts["compiler"] else ""
    load = f", load {facts['load']}" if facts["load"] is not None else ""
    return (
        f"{where}; torch {facts['torch']} ({facts['torch_isa']}), python {facts['python']}, {facts['system']};"
        f" fastflat {facts['fastflat']} ({facts['backend']}{built}){load}"
    )


def busy(facts: dict[str, Any]) -> str | None:
    """A warning where other programs ran when the measurement began."""
    load, cores = facts["load"], facts["cores"]
    if load is None or load < 0.75:
        return None
    return f"busy machine: load {load} on {cores} cores when it began; repeat these figures on an idle one"


def slug(facts: dict[str, Any]) -> str:
    """A file name for results of this machine."""
    parts = [facts.get("gpu") or facts["cpu"], "" if "gpu" in facts else f"{facts['cores']}-cores-{facts['isa']}"]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")


def _cpuinfo(field: str) -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    found = re.search(rf"^{field}\s*:\s*(.*)$", text, flags=re.MULTILINE)
    return found[1].strip() if found else ""


def _cpu_model() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _compiler() -> str:
    """The host compiler: as the build wrote it down, else as it signed the library."""
    told = _load.build_info().get("compiler")
    if told:
        return str(told)
    library = _load.status()["cpu"].path
    signed = (
        re.search(rb"(?:GCC: \([^)]*\) [\d.]+|clang version [\d.]+)", Path(library).read_bytes()) if library else None
    )
    return signed[0].decode() if signed else ""


def _commit() -> str | None:
    """The commit of a checkout, marked where the tree differs from it."""
    root = Path(fastflat.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=root,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return None
    return done.stdout.strip() or None

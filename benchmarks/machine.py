# SPDX-License-Identifier: Apache-2.0
"""Where a benchmark ran: the line without which a number means nothing."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import fastflat
from fastflat import _load

from . import devices

#: What nvidia-smi is asked for: name in the facts, its own name.
_QUERIES = {"driver": "driver_version", "clock_sm": "clocks.sm", "clock_sm_most": "clocks.max.sm",
            "clock_memory": "clocks.mem", "power_limit": "power.limit", "persistence": "persistence_mode"}  # fmt: skip


def describe(device: torch.device | devices.Device) -> dict[str, Any]:
    """Processor, cores, instruction sets, clocks as found, versions, compiler, load, date; the GPU where one is
    measured."""
    device = devices.of(device)
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
        "backend": fastflat.choose("fake_quantize", device.place.type)[0],
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "clocks": _cpu_clocks(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }
    if device.module is not None:
        properties = device.module.get_device_properties(device.place)
        facts["gpu"] = f"{properties.name}, sm_{properties.major}{properties.minor}"
        facts["gpu_memory"], facts["gpu_cache"] = properties.total_memory, properties.L2_cache_size
        facts["cuda"] = torch.version.cuda
        facts |= _gpu_state(int(device.name.partition(":")[2] or 0))
    return facts


def line(facts: dict[str, Any]) -> str:
    """The facts in one line."""
    where = facts.get("gpu") or f"{facts['cpu']}, {facts['cores']} cores, {facts['isa']}"
    built = f", {facts['compiler']}" if facts.get("compiler") else ""
    load = f", load {facts['load']}" if facts.get("load") is not None else ""
    clocks = f", {facts['clocks']}" if facts.get("clocks") else ""
    if facts.get("gpu"):
        clocks = f", driver {facts['driver']}" if facts.get("driver") else ""
        if facts.get("clock_sm"):
            clocks += f", SM {facts['clock_sm']} of {facts['clock_sm_most']}, memory {facts['clock_memory']}"
        clocks += f", CUDA {facts['cuda']}" if facts.get("cuda") else ""
    where += clocks
    if facts.get("commit") and "date" in facts:
        load += f"; commit {facts['commit']}, {facts['date']}"
    return (
        f"{where}; torch {facts['torch']} ({facts['torch_isa']}), python {facts['python']}, {facts['system']};"
        f" fastflat {facts['fastflat']} ({facts['backend']}{built}){load}"
    )


def busy(facts: dict[str, Any]) -> str | None:
    """A warning where other programs ran when the measurement began."""
    load, cores = facts.get("load"), facts["cores"]
    if load is None or load < 0.75:
        return None
    return f"busy machine: load {load} on {cores} cores when it began; repeat these figures on an idle one"


def slug(facts: dict[str, Any]) -> str:
    """A file name for results of this machine."""
    parts = [facts.get("gpu") or facts["cpu"], "" if "gpu" in facts else f"{facts['cores']}-cores-{facts['isa']}"]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")


def _cpu_clocks() -> str:
    """Clock of the first core as found, with the governor that steers it where the system tells."""
    found = _cpuinfo("cpu MHz")
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    words = [f"{float(found):.0f} MHz"] if found else []
    words += [governor.read_text().strip()] if governor.is_file() else []
    return ", ".join(words)


def _gpu_state(index: int) -> dict[str, str]:
    """Driver, clocks and power limit as nvidia-smi finds them; nothing where it does not answer.

    Its numbering is that of all GPUs of the machine: one that is visible by its place or its UUID is asked by that.
    """
    visible = [part.strip() for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()]
    which = visible[index] if index < len(visible) else str(index)
    command = ["nvidia-smi", f"--id={which}", f"--query-gpu={','.join(_QUERIES.values())}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    if done.returncode or len(values) != len(_QUERIES):
        return {}
    return dict(zip(_QUERIES, values, strict=True))


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

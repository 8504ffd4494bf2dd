# SPDX-License-Identifier: Apache-2.0
"""``fastflat doctor``: what is installed and built, which backend computes what here, and why not the others."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import warnings
from pathlib import Path
from typing import Any

import click
import torch

import fastflat
from fastflat import _load, _ops, data
from fastflat.backends import unavailable
from fastflat.cli import _runs
from fastflat.data import packaged

_PACKAGES = ("torch", "triton", "numpy", "click", "tqdm", "matplotlib", "jinja2", "pillow")


@click.command("doctor")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the same facts to this file.")
def doctor(json_file: Path | None) -> None:
    """Show versions, what was built and with what, and which backend computes each operator on each device, and why.

    \b
    Examples:
      fastflat doctor
      fastflat doctor --json doctor.json
    """
    if json_file is not None and not json_file.resolve().parent.is_dir():
        raise ValueError(f"doctor: --json must name a file in an existing folder, got {json_file}")
    found = facts()
    for line in text(found):
        click.echo(line)
    if json_file is not None:
        _runs.write(json_file.resolve(), json.dumps(found, indent=1) + "\n")


def facts() -> dict[str, Any]:
    """Everything that the command tells, as plain values."""
    return {
        "versions": {"fastflat": fastflat.__version__, "python": platform.python_version(), **_versions()},
        "machine": _machine(),
        "gpus": _gpus(),
        "build": _load.build_info(),
        "libraries": {
            name: {"loaded": part.loaded, "reason": part.reason, "remedy": part.remedy}
            for name, part in _load.status().items()
        },
        "backends": fastflat.backends(),
        "operators": _operators(),
        "evidence": _evidence(),
        "data": _data(),
    }


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _machine() -> dict[str, Any]:
    return {
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "isa": _load.cpu_isa(),
        "isa_cap": os.environ.get("FASTFLAT_CPU_ISA"),
        "torch_cuda": torch.version.cuda,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def _gpus() -> list[dict[str, Any]]:
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        gpus.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "cuda_library_has_code": _load.has_code_for(capability),
            }
        )
    return gpus


def _operators() -> dict[str, dict[str, dict[str, str]]]:
    """For each kind of tensor and operator: who computes, and why."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    table: dict[str, dict[str, dict[str, str]]] = {}
    with warnings.catch_warnings():
        # What the fallback warning says is in the table.
        warnings.simplefilter("ignore", fastflat.FallbackWarning)
        for device in devices:
            table[device] = {}
            for op in _ops.OPS:
                try:
                    name, reason = fastflat.choose(op, device)
                except RuntimeError as error:  # FASTFLAT_STRICT=1 forbids the reference
                    name, reason = "none", str(error).removeprefix("fastflat: ")
                table[device][op] = {"backend": name, "reason": reason}
    return table


def _evidence() -> dict[str, str]:
    """How far each backend has shown itself on this machine; nothing is claimed that did not happen here."""
    status, built = _load.status(), _load.build_info().get("arches") or []
    evidence = {"reference": "runs here", "cpu": "runs here" if status["cpu"].loaded else status["cpu"].reason}
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    if status["cuda"].loaded and gpu:
        evidence["cuda"] = f"loaded; runs on {gpu}"
    elif built:
        evidence["cuda"] = f"compiled for {', '.join(built)}; no GPU here to run it"
    else:
        evidence["cuda"] = status["cuda"].reason
    reason = unavailable("triton", "cuda" if gpu else "cpu")
    evidence["triton"] = (f"runs on {gpu}" if gpu else "interpreted on CPU tensors") if reason is None else reason
    return evidence


def _data() -> dict[str, str]:
    found = {}
    folder = packaged.fashion_folder()
    found["fashion-mnist"] = str(folder) if folder else "not here; fastflat train --download"
    for name in ("mnist-5k", "digits"):
        try:
            data.NAMED[name]()
            found[name] = "here"
        except (FileNotFoundError, ValueError) as error:
            found[name] = str(error).removeprefix("data: ")
    return found


def text(found: dict[str, Any]) -> list[str]:
    """The facts as lines."""
    machine, versions = found["machine"], found["versions"]
    lines = [
        "versions   " + ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items()),
        f"machine    {machine['system']}, {machine['architecture']}, {machine['processor']}",
        f"           {machine['cores']} cores, {machine['threads']} threads, our CPU loops for"
        f" {machine['isa'] or 'nothing (library missing)'}, PyTorch's for {machine['vector_instructions']}"
        + (f", FASTFLAT_CPU_ISA={machine['isa_cap']}" if machine["isa_cap"] else ""),
    ]
    for gpu in found["gpus"]:
        covered = "covered" if gpu["cuda_library_has_code"] else "not covered"
        about = f"{gpu['name']}, {gpu['memory_gib']} GiB, capability {gpu['capability']}"
        lines.append(f"GPU        {about}: {covered} by our library")
    if not found["gpus"]:
        lines.append(f"GPU        none; this torch was built {_cuda(machine['torch_cuda'])}")
    build = found["build"]
    if build:
        lines.append(
            f"build      fastflat {build.get('version')}, {build.get('compiler') or 'no compiler'},"
            f" nvcc {build.get('nvcc') or 'missing'}, for {', '.join(build.get('arches') or []) or 'no GPU'}"
        )
    for name, part in found["libraries"].items():
        mend = f"; {part['remedy']}" if part["remedy"] else ""
        lines.append(f"library    {name}: {part['reason']}{mend}")
    for name, state in found["backends"].items():
        lines.append(f"backend    {name}: {state}")
    for device, table in found["operators"].items():
        groups: dict[tuple[str, str], list[str]] = {}
        for op, entry in table.items():
            groups.setdefault((entry["backend"], entry["reason"]), []).append(op)
        for (name, reason), ops in groups.items():
            lines.append(f"{device + ' ops':<11}{name} ({reason}): {', '.join(ops)}")
    for name, state in found["evidence"].items():
        lines.append(f"evidence   {name}: {state}")
    for name, state in found["data"].items():
        lines.append(f"data       {name}: {state}")
    return lines


def _cuda(version: str | None) -> str:
    return f"with CUDA {version}" if version else "without CUDA"

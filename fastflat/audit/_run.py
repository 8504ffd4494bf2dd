# SPDX-License-Identifier: Apache-2.0
"""The audit as a whole: compile, measure, compare, report."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from fastflat.audit import _budget, _cuda, _traffic, _triton
from fastflat.audit._facts import Facts

#: Architectures that Triton and a current nvcc both compile for.
ARCHES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120")
#: Those with a committed budget, and the default.
BUDGETED = ("sm_80", "sm_90", "sm_100", "sm_120")


@dataclasses.dataclass
class Report:
    """What an audit found. ``failures`` maps the name of a kernel or measurement to its broken rules."""

    toolchain: dict[str, str]
    kernels: list[Facts] = dataclasses.field(default_factory=list)
    traffic: list[_traffic.Traffic] = dataclasses.field(default_factory=list)
    failures: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    runs: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return not self.failures

    def status(self, language: str, family: str) -> str:
        """What has been shown of the kernels of a family, in this audit or on a recorded GPU; nothing is assumed."""
        shown = []
        if any(f.language == language and f.family == family for f in self.kernels):
            shown.append("compiled")
        if any(t.language == language and t.family == family for t in self.traffic):
            shown.append("emulated" if language == "cuda" else "interpreted")
        shown.append(self.runs.get(f"{language}/{family}", "never ran on a GPU"))
        return ", ".join(shown)

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        content = dataclasses.asdict(self)
        content["passed"] = self.passed
        families = sorted({(f.language, f.family) for f in self.kernels})
        content["status"] = {f"{language}/{family}": self.status(language, family) for language, family in families}
        return content


def audit(
    arches: Iterable[str] = BUDGETED,
    *,
    update_budget: bool = False,
    traffic: bool = True,
    progress: Callable[[str], None] = lambda line: None,
) -> Report:
    """Compiles all kernels for ``arches`` and holds them against their budgets.

    Args:
        arches: names such as ``"sm_90"``.
        update_budget: write the budgets anew from what was found; no rule is relaxed by it.
        traffic: also run the kernels on the CPU and count bytes per element.
        progress: called with one line at each step.

    Raises:
        ValueError: an unknown architecture, a budget file that cannot be read.
        RuntimeError: a compiler that fails, a kernel that no launch reaches.
    """
    arches = tuple(dict.fromkeys(arches))
    for arch in arches:
        if arch not in ARCHES:
            raise ValueError(f"fastflat audit: arch must be one of {', '.join(ARCHES)}, got {arch}")
    root = _triton.checkout()
    budgets = _budget.folder(root)
    if update_budget and root is None:
        raise ValueError("fastflat audit: --update-budget needs a checkout, got an installed package")
    report = Report({"triton": importlib.metadata.version("triton")})
    cache = root / "build" / "audit" if root else Path(tempfile.gettempdir(), f"fastflat-audit-{os.getuid()}")
    if root is not None:
        os.environ.setdefault("TRITON_CACHE_DIR", str(cache / "triton"))
    languages = {"triton"}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:  # nvcc works beside Triton's compiler
        pending = []
        if root is None:
            report.notes.append("CUDA sources are only in a checkout: Triton kernels alone were compiled")
        elif _cuda.nvcc() is None:
            report.notes.append("no nvcc on PATH: CUDA kernels were not compiled")
        else:
            languages.add("cuda")
            report.toolchain["nvcc"] = _cuda.version(_cuda.nvcc())
            pending = [
                pool.submit(_cuda.compile_source, source, arch, root / "csrc", cache)
                for arch in arches
                for source in _cuda.sources(root)
            ]
        launches = _triton.launches()
        for arch in arches:
            progress(f"Triton, {len(launches)} kernels for {arch}")
            report.kernels += [_triton.compile_launch(launch, arch) for launch in launches]
        for future in pending:
            progress("nvcc")
            report.kernels += future.result()
    if traffic:
        _measure(report, root, progress)
    if update_budget:
        _update(report, arches, languages, root)
        budgets = _budget.folder(root)
    _compare(report, arches, languages, budgets)
    if root is not None:
        report.runs = recorded_runs(root / "benchmarks" / "results")
    return report


def _measure(report: Report, root: Path | None, progress: Callable[[str], None]) -> None:
    progress("Triton's interpreter")
    report.traffic += _traffic.interpreted()
    emulator = root / "tests" / "emulator" / "emulated.py" if root else None
    if emulator is None or not emulator.exists():
        report.notes.append("the emulator is only in a checkout: bytes of CUDA kernels were not counted")
        return
    progress("the emulator")
    try:
        report.traffic += _traffic.emulated(root)
    except (ImportError, RuntimeError) as error:
        report.notes.append(f"the emulator does not build, bytes of CUDA kernels were not counted: {error}")


def _update(report: Report, arches: tuple[str, ...], languages: set[str], root: Path) -> None:
    for arch in arches:
        path = root / "benchmarks" / "budgets" / f"{arch}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        old = _budget.read(path)
        kept = {k: v for k, v in old.get("kernels", {}).items() if k.split("/", 1)[0] not in languages}
        kernels = {f.name: _budget.entry(f) for f in report.kernels if f.arch == arch}
        toolchain = {**old.get("toolchain", {}), **report.toolchain}
        _budget.write(path, {"toolchain": toolchain, "kernels": {**kept, **kernels}})


def _compare(report: Report, arches: tuple[str, ...], languages: set[str], budgets: Path | None) -> None:
    def fail(name: str, lines: list[str]) -> None:
        if lines:
            report.failures.setdefault(name, []).extend(lines)

    for arch in arches:
        found = [f for f in report.kernels if f.arch == arch]
        path = budgets / f"{arch}.json" if budgets else None
        if path is None or not path.exists():
            report.notes.append(f"no budget for {arch}: only the rules without a number were checked")
            for facts in found:
                fail(f"{arch} {facts.name}", facts.failures())
            continue
        budget = _budget.read(path)
        for tool, version in report.toolchain.items():
            if budget["toolchain"].get(tool, version) != version:
                report.notes.append(
                    f"the budget of {arch} is for {tool} {budget['toolchain'][tool]}, this is {version}"
                )
        for facts in found:
            fail(f"{arch} {facts.name}", _budget.failures(facts, budget))
        for name in _budget.forgotten(found, languages, budget):
            fail(f"{arch} {name}", ["in the budget but no longer compiled; fastflat audit --update-budget drops it"])
    for traffic in report.traffic:
        fail(traffic.name, traffic.failures())


def recorded_runs(folder: Path) -> dict[str, str]:
    """``{"triton/fake_quantize": "ran on NAME, DATE"}`` from the committed records of runs on a GPU.

    A record counts where it names ``gpu`` and ``date`` and has ``rows`` with ``backend``, ``family`` and a ``device``
    ``cuda`` or ``cuda:0``, ...; the newest date wins.
    """
    runs: dict[str, tuple[str, str]] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text())
        except json.JSONDecodeError:
            continue
        if not isinstance(record, dict) or not record.get("gpu") or not record.get("date"):
            continue
        for row in record.get("rows", ()):
            if str(row.get("device")).startswith("cuda") and row.get("backend") in ("cuda", "triton"):
                key = f"{row['backend']}/{row.get('family')}"
                runs[key] = max(runs.get(key, ("", "")), (record["date"], record["gpu"]))
    return {key: f"ran on {gpu}, {date}" for key, (date, gpu) in runs.items()}

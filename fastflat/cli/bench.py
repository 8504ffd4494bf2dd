# SPDX-License-Identifier: Apache-2.0
"""``fastflat bench``: throughput side by side with other implementations, on the machine at hand."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import click
import torch

import fastflat
from fastflat.cli import _models

#: The folder of a checkout, where it is one.
_ROOT = Path(fastflat.__file__).resolve().parent.parent
_SIZES = "2^12..2^24/2,2^25"
_QUICK_SIZES = "2^12,2^16,2^20,2^22"
_SMALLEST, _LARGEST = 2**7, 2**28
_FAMILIES = (
    *("fake_quantize", "general_quantize", "fake_quantize_list", "mixquant", "bitplane", "binarize", "liq"),
    *("vectors", "tangents", "row_tangents", "identity"),
)
#: Families whose cases are steps of optimizers.
_STEPS = ("sharpness", "descent")
#: Families whose cases are products with matrices.
_PRODUCTS = ("curvature",)
#: Peers of fake_quantize that only run when they are named.
_ON_REQUEST = ("builtin-fixed",)
_STEP_PEERS = "fp32,view,identity,mul,fastflat,eager,builtin"


def package(name: str = "") -> Any:
    """A module of ``fastflat.benchmarks``; of a checkout's folder ``benchmarks`` where fastflat is not installed.

    Raises:
        ImportError: there is neither.
    """
    whole = "fastflat.benchmarks"
    if importlib.util.find_spec(whole) is None:
        file = _ROOT / "benchmarks" / "__init__.py"
        if not file.is_file():
            raise ImportError(f"{whole} is not installed; pip install --no-build-isolation -e .")
        spec = importlib.util.spec_from_file_location(whole, file, submodule_search_locations=[str(file.parent)])
        module = importlib.util.module_from_spec(spec)
        sys.modules[whole] = module
        spec.loader.exec_module(module)
        fastflat.benchmarks = module
    return importlib.import_module(f"{whole}.{name}" if name else whole)


@click.group(context_settings={"max_content_width": 110})
def bench() -> None:
    """Measure throughput on this machine, all competitors taking turns in one process.

    Nothing is timed unless the kernels agree with the reference.

    \b
    Examples:
      fastflat bench quantize --quick
      fastflat bench step --threads 1,all
      fastflat bench compare old.json new.json
    """
    for name in ("rich", "tqdm"):
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"bench: {name} is not installed; pip install 'fastflat[bench]'")


_THREADS = click.option("--threads", default="1,all", show_default=True, help="Numbers of threads: 1,4,all.")
_ALLOCATOR = click.option(
    "--allocator",
    type=click.Choice(["tuned", "default"]),
    default="tuned",
    show_default=True,
    help="tuned: fastflat.tune_host_memory() first; default: as the C library came.",
)
_JSON = click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write every row to this file.")


@bench.command()
@click.option("--sizes", help=f"Elements: 2^12,2^20 or 2^12..2^24/2 (every second power). [default: {_SIZES}]")
@click.option("--dtypes", default="fp32,bf16", show_default=True, help="Of fp32, bf16, fp16.")
@click.option(
    "--granularity", help="Of the families' own: tensor, channel, group32, ...; uniform, ..., mxfp4. [default: most]"
)
@click.option(
    "--passes", default="both", show_default=True, help="both: forward and backward; forward; or both,forward."
)
@click.option("--peers", help="Who computes; builtin-fixed trains no scale. [default: all others]")
@_THREADS
@click.option("--family", default="fake_quantize", show_default=True, help=f"Of {', '.join(_FAMILIES)}, or all.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
@_ALLOCATOR
@click.option("--quick", is_flag=True, help=f"Fewer rounds; {_QUICK_SIZES} in fp32, unless others are given.")
@click.option("--gate", is_flag=True, help="Run the op's test file first, and refuse if it is red (in a checkout).")
@_JSON
@click.pass_context
def quantize(ctx: click.Context, **options: Any) -> None:
    """Quantizers against other implementations of them: eager code, torch.compile, PyTorch's operators, and torchao
    and Brevitas where they are installed (make peers).

    fake_quantize: 4 bits with a learned scale, and with one from the data ("dynamic"). general_quantize: noise,
    stochastic rounding, floating-point and block formats. vectors: the work of Krylov methods on flat vectors.
    tangents: one and eight tangents through activations, quantizers and batch norms. Each case is timed in turns with
    a copy of the data. "of copy bw" is the traffic that the case cannot avoid, per second, over that of the copy; "x
    mul" is the time over that of an autograd Function of one torch.mul each way; "peak" is the most memory that a call
    allocates, in tensors of the data.

    \b
    Examples:
      fastflat bench quantize
      fastflat bench quantize --sizes 2^20,2^22 --dtypes fp32 --threads 1 --json result.json
      fastflat bench quantize --family general_quantize --granularity uniform,stochastic --sizes 2^22
      fastflat bench quantize --device cuda --sizes 2^24..2^28
    """
    given = ctx.get_parameter_source("dtypes") is click.core.ParameterSource.COMMANDLINE
    quick = options["quick"]
    cases, peers, measure = package("cases"), package("peers"), package("measure")
    families = list(_FAMILIES) if options["family"] == "all" else _known("family", options["family"], _FAMILIES)
    device = _device(options["device"])
    named = _chosen_peers(options["peers"], families, peers.PEERS)
    dtypes = _known("dtypes", "fp32" if quick and not given else options["dtypes"], cases.DTYPES)
    passes = _known("passes", options["passes"], cases.PASSES)
    sizes = parse_sizes(options["sizes"] or (_QUICK_SIZES if quick else _SIZES))
    threads = parse_threads(options["threads"]) if device.type == "cpu" else [torch.get_num_threads()]
    _writable(options["json_file"])
    arguments = {"sizes": sizes, "dtypes": [cases.DTYPES[name] for name in dtypes], "passes": passes}
    chosen = _chosen_cases(options["granularity"], families, arguments)

    memory = _memory(options["allocator"])
    _gate(device, arguments["dtypes"], families if options["gate"] else [])
    effort = measure.QUICK if quick else measure.Effort()
    where = {**_where(device, memory), "effort": vars(effort)}
    result = {"benchmark": ",".join(families), **where, "rows": []}
    for family in families:
        runs = package("run").all_rows(chosen[family], named[family], threads, effort, device)
        for rows in _with_bar(runs, len(chosen[family]) * len(threads)):
            result["rows"] += rows
    _finish(result, "quantize_table", options["json_file"])


def _chosen_peers(text: str | None, families: list[str], known: dict[str, Any]) -> dict[str, list[str]]:
    """Names of the peers of each family."""
    if text is None:
        return {family: [name for name in known[family] if name not in _ON_REQUEST] for family in families}
    named = _known("peers", text, dict.fromkeys(name for family in families for name in known[family]))
    return {family: [name for name in named if name in known[family]] for family in families}


def _chosen_cases(text: str | None, families: list[str], arguments: dict[str, Any]) -> dict[str, list[Any]]:
    """The cases of each family. A family without granularities has all of its cases, whatever is named."""
    modules = {family: package(f"cases.{family}") for family in families}
    own = {family: getattr(module, "GRANULARITIES", None) for family, module in modules.items()}
    if text is not None:
        named = _known("granularity", text, dict.fromkeys(name for names in own.values() for name in names or ()))
    found = {}
    for family, module in modules.items():
        if own[family] is None:
            found[family] = list(module.cases(**arguments))
            continue
        taken = [n for n in own[family] if n != "group128"] if text is None else [n for n in named if n in own[family]]
        found[family] = list(module.cases(**arguments, granularities=taken)) if taken else []
    return found


@bench.command()
@click.option("--batch", type=click.IntRange(1, 4096), default=64, show_default=True, help="Images in a step.")
@click.option("--bits", type=click.IntRange(1, 16), default=4, show_default=True, help="Of weights and activations.")
@click.option("--peers", default=_STEP_PEERS, show_default=True, help="What stands in the places of the quantizers.")
@_THREADS
@_ALLOCATOR
@click.option("--quick", is_flag=True, help="Fewer rounds.")
@_JSON
def step(**options: Any) -> None:
    """A training step of ResNet-20 on 32x32 images, and what the quantizers add to it.

    identity: autograd Functions that copy, in the same places; view: Functions that do nothing at all. "of identity's"
    is the overhead over the fp32 step in units of identity's.

    \b
    Example:
      fastflat bench step --batch 64 --threads 1 --json step.json
    """
    steps, measure = package("step"), package("measure")
    names = _known("peers", options["peers"], steps.QUANTIZERS)
    threads = parse_threads(options["threads"])
    _writable(options["json_file"])
    memory = _memory(options["allocator"])
    _gate(torch.device("cpu"), [torch.float32], [])
    model = _models.build("resnet20", (3, 32, 32), 10, seed=0)
    calls = steps.steps(model, (3, 32, 32), options["batch"], options["bits"], _models.ends(model), names)
    effort = measure.QUICK if options["quick"] else measure.Effort(seconds=90.0, rounds=(9, 31), block=0.0)
    shape = {"model": "resnet20", "batch": options["batch"], "bits": options["bits"]}
    result = {"benchmark": "step", **_where(torch.device("cpu"), memory), **shape, "effort": vars(effort), "rows": []}
    runs = ((f"step, {count} threads", steps.rows(calls, count, effort)) for count in threads)
    for rows in _with_bar(runs, len(threads)):
        result["rows"] += rows
    _finish(result, "step_table", options["json_file"])


@bench.command()
@click.option("--lists", default="resnet18,small", show_default=True, help="Of resnet18, resnet50, vit_b, small.")
@click.option("--bases", default="sgd,adamw", show_default=True, help="Of sgd, adam, adamw, padam, lars, lamb.")
@click.option("--dtypes", default="fp32", show_default=True, help="Of fp32, bf16 (with fp32 masters), fp64.")
@click.option(
    "--family", default="sharpness", show_default=True, help="sharpness: both passes; descent: the base alone."
)
@click.option("--peers", help="Who steps. [default: all]")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
@_THREADS
@_ALLOCATOR
@click.option("--quick", is_flag=True, help="Fewer rounds.")
@click.option("--gate", is_flag=True, help="Run the ops' test files first, and refuse if they are red (in a checkout).")
@_JSON
def sharpness(**options: Any) -> None:
    """Steps of sharpness-aware minimisation over the parameters of a network, its forward and backward passes left out:
    they are most of a training step, and the same for all.

    Times are in copies of the parameters (one read, one write); "of copy bw" is the least traffic of the step over
    fastflat's time, as a share of the copy's bandwidth. stock: the least traffic that PyTorch's operations reach, loop:
    the popular implementation, add-sub: perturbations added and taken away, passes: no optimizer but the two forward
    and backward passes of 32 images of 64x64.

    \b
    Examples:
      fastflat bench sharpness
      fastflat bench sharpness --lists resnet50,vit_b --dtypes fp32,bf16 --threads 1 --json result.json
      fastflat bench sharpness --family descent --bases sgd,adam,adamw,lars,lamb
    """
    cases, peers, measure = package("cases"), package("peers"), package("measure")
    families = _known("family", options["family"], _STEPS)
    device = _device(options["device"])
    named = _chosen_peers(options["peers"], families, peers.PEERS)
    modules = {family: package(f"cases.{family}") for family in families}
    lists = _known("lists", options["lists"], package("cases.sharpness").LISTS)
    bases = _known("bases", options["bases"], fastflat.optim.BASES)
    dtypes = [cases.DTYPES[name] for name in _known("dtypes", options["dtypes"], cases.DTYPES)]
    threads = parse_threads(options["threads"]) if device.type == "cpu" else [torch.get_num_threads()]
    _writable(options["json_file"])
    memory = _memory(options["allocator"])
    _gate(device, dtypes, families if options["gate"] else [], steps=True)
    effort = measure.QUICK if options["quick"] else measure.Effort(seconds=6.0, rounds=(9, 60))
    where = {**_where(device, memory), "effort": vars(effort)}
    result = {"benchmark": ",".join(families), **where, "rows": []}
    for family in families:
        chosen = list(modules[family].cases(lists, dtypes, bases))
        runs = package("run").all_rows(chosen, named[family], threads, effort, device)
        for rows in _with_bar(runs, len(chosen) * len(threads)):
            result["rows"] += rows
    _finish(result, "optimizer_table", options["json_file"])


@bench.command()
@click.option(
    "--networks", default="mlp,convnet,small,transformer", show_default=True,
    help="Of mlp, convnet, small, transformer, resnet18.",
)  # fmt: skip
@click.option("--forms", default="plain,quantized", show_default=True, help="Of plain, quantized (4 bits).")
@click.option("--matrices", default="hessian,ggn,forms", show_default=True, help="Of hessian, ggn, forms (v^T H v).")
@click.option("--k", "counts", default="1,8", show_default=True, help="Numbers of vectors at once.")
@click.option("--peers", help="Who computes. [default: all]")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
@_THREADS
@_ALLOCATOR
@click.option("--quick", is_flag=True, help="Fewer rounds.")
@_JSON
def curvature(**options: Any) -> None:
    """K products with a network's Hessian or Gauss-Newton matrix at one batch, beside other tools.

    Each call linearises anew; tracing and compiling, once for a model and a shape, are not in it.

    Columns of peers are gradients (one forward and backward of the same batch) that one vector costs. "error" is
    fastflat's, relative to fp64; "peak" its memory in that of a gradient. double-backward: one graph for all vectors;
    func-*: torch.func; PyHessian, curvlinops and hessian-eigenthings where they are installed.

    \b
    Examples:
      fastflat bench curvature --threads 1
      fastflat bench curvature --networks resnet18 --matrices hessian --k 8 --json result.json
    """
    peers, measure, cases = package("peers"), package("measure"), package("product_cases")
    device = _device(options["device"])
    named = _chosen_peers(options["peers"], _PRODUCTS, peers.PEERS)["curvature"]
    names = _known("networks", options["networks"], cases.NETWORKS)
    forms = [form == "quantized" for form in _known("forms", options["forms"], ("plain", "quantized"))]
    modes = _known("matrices", options["matrices"], cases.MODES)
    counts = parse_counts(options["counts"])
    threads = parse_threads(options["threads"]) if device.type == "cpu" else [torch.get_num_threads()]
    _writable(options["json_file"])
    memory = _memory(options["allocator"])
    effort = measure.QUICK if options["quick"] else measure.Effort(seconds=8.0, rounds=(5, 30))
    result = {"benchmark": "curvature", **_where(device, memory), "effort": vars(effort), "rows": []}
    chosen = list(cases.cases(names, forms, counts, modes))
    runs = package("run").all_rows(chosen, named, threads, effort, device, package("products").rows)
    for rows in _with_bar(runs, len(chosen) * len(threads)):
        result["rows"] += rows
    _finish(result, "curvature_table", options["json_file"])


@bench.command()
@click.argument("old", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("new", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def compare(old: Path, new: Path) -> None:
    """Two results of `bench quantize`, row by row, each in copies of its own run.

    \b
    Example:
      fastflat bench compare before.json after.json
    """
    report, machine = package("report"), package("machine")
    before, after = report.read(old), report.read(new)
    head, lines = report.compare_table(before, after)
    if not lines:
        raise ValueError(f"bench: {old} and {new} must share a row, got none")
    notes = [f"{name}: {machine.line(result['machine'])}" for name, result in (("old", before), ("new", after))]
    report.show("bench compare", head, lines, notes, click.echo)


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


def parse_counts(text: str) -> list[int]:
    """``1,8``: numbers of vectors."""
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not (part.isdecimal() and 1 <= int(part) <= 1024):
            raise ValueError(f"bench: --k must be numbers from 1 to 1024, got {part!r}")
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


def _known(option: str, text: str, names: Any) -> list[str]:
    chosen = [part.strip() for part in text.split(",")]
    for name in chosen:
        if name not in names:
            raise ValueError(f"bench: --{option} must be of {', '.join(names)}, got {name!r}")
    return list(dict.fromkeys(chosen))


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"bench: --device must be cpu or cuda, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"bench: --device must be one that PyTorch sees, got {name!r} with {count} GPUs")
    return device


def _writable(target: Path | None) -> None:
    if target is not None and (target.is_dir() or not target.resolve().parent.is_dir()):
        raise ValueError(f"bench: --json must name a file in an existing folder, got {target}")


def _memory(allocator: str) -> str:
    """The allocator's state in words."""
    if allocator == "default":
        return "default"
    done = fastflat.tune_host_memory()
    return f"tuned: {done.reason}" if done.applied else f"default: {done.reason}"


def _gate(device: torch.device, dtypes: list[torch.dtype], tested: list[str], steps: bool = False) -> None:
    """Refuse if the kernels differ from the reference, or if the test file of one of the `tested` families is red."""
    gate = package("gate")
    for family in tested:
        tests = _ROOT / "tests" / "ops" / f"test_{family}.py"
        if not tests.is_file():
            raise ValueError(f"bench: --gate must run in a checkout with tests/ops/{tests.name}, got none")
        red = gate.tests_are_red(tests)
        if red:
            raise click.ClickException(f"bench: refused, the op's tests are red: {red}")
    wrong = gate.step_mistakes(device, dtypes) if steps else gate.mistakes(device, dtypes)
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise click.ClickException(f"bench: refused, the kernels differ from the reference in {wrong[0]}{more}")


def _where(device: torch.device, memory: str) -> dict[str, Any]:
    return {"machine": package("machine").describe(device), "device": str(device), "allocator": memory}


def _with_bar(runs: Any, total: int):
    from tqdm import tqdm

    with tqdm(total=total, desc="bench", unit="case", leave=False) as bar:
        for label, rows in runs:
            bar.set_postfix_str(label, refresh=False)
            bar.update()
            yield rows


def _finish(result: dict[str, Any], table: str, target: Path | None) -> None:
    report, machine = package("report"), package("machine")
    if target is not None:
        report.write(target.resolve(), result)
    notes = [machine.line(result["machine"]), f"allocator {result['allocator']}"]
    notes += filter(None, [machine.busy(result["machine"])])
    missing = {row["peer"]: row["unsupported"] for row in result["rows"] if "unsupported" in row}
    notes += [f"{peer}: no form of some cases: {reason}" for peer, reason in missing.items()]
    families = list(dict.fromkeys(row.get("family") for row in result["rows"]))
    for family in families:
        rows = [row for row in result["rows"] if row.get("family") == family]
        head, lines = getattr(report, table)({**result, "rows": rows})
        title = f"bench {family or result['benchmark']}"
        report.show(title, head, lines, notes if family == families[-1] else [], click.echo)

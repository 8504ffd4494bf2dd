# SPDX-License-Identifier: Apache-2.0
"""``fastflat bench``: throughput side by side with other implementations, on the machine at hand."""

from __future__ import annotations

from typing import Any

import click

import fastflat
from fastflat.cli import _bench as common
from fastflat.cli._bench import package, parse_counts, parse_sizes, parse_threads
from fastflat.cli._bench_accelerate import accelerate
from fastflat.cli._bench_record import Record, kernel_jobs, product_jobs, roofline_jobs
from fastflat.cli._bench_records import compare, page
from fastflat.cli._bench_run import run, step

_SIZES = "2^12..2^24/2,2^25"
_QUICK_SIZES = "2^12,2^16,2^20,2^22"
_FAMILIES = (
    *("fake_quantize", "general_quantize", "fake_quantize_list", "mixquant", "bitplane", "binarize", "liq"),
    *("logits", "inputs", "weight_norms", "compressors", "vectors", "tangents", "row_tangents", "identity"),
)
#: Families whose cases are steps of optimizers.
_STEPS = ("sharpness", "descent")
#: Families whose cases are products with matrices.
_PRODUCTS = ("curvature",)
#: Peers of fake_quantize that only run when they are named.
_ON_REQUEST = ("builtin-fixed",)


@click.group(context_settings={"max_content_width": 110})
def bench() -> None:
    """Measure throughput on this machine, all competitors taking turns in one process.

    Nothing is timed unless the kernels agree with the reference.

    \b
    Examples:
      fastflat bench run --quick --html bench.html
      fastflat bench run --device all --json bench.json
      fastflat bench quantize --quick
      fastflat bench step --threads 1,all
      fastflat bench compare old.json new.json
    """
    common.needs("rich", "tqdm")


for _command in (run, step, accelerate, compare, page):
    bench.add_command(_command)


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
@common.THREADS
@click.option("--family", default="fake_quantize", show_default=True, help=f"Of {', '.join(_FAMILIES)}, or all.")
@common.DEVICE
@common.ALLOCATOR
@click.option("--quick", is_flag=True, help=f"Fewer rounds; {_QUICK_SIZES} in fp32, unless others are given.")
@common.GATE
@common.files
@click.pass_context
def quantize(ctx: click.Context, **options: Any) -> None:
    """Quantizers against other implementations of them: eager code, torch.compile, PyTorch's operators, and torchao
    and Brevitas where they are installed (make peers).

    fake_quantize: 4 bits with a learned scale, and with one from the data ("dynamic"). general_quantize: noise,
    stochastic rounding, floating-point and block formats. logits: divergences, losses and statistics. inputs: noise and
    steps of attacks. weight_norms: regularisers of weights. compressors: gradients in few bits. vectors: the work of
    Krylov methods on flat vectors. tangents: one and eight tangents through activations, quantizers and batch norms.
    Each case is timed in turns with a copy of the data. "of copy bw" is the traffic that the case cannot avoid, per
    second, over that of the copy; "x mul" is the time over that of an autograd Function of one torch.mul each way;
    "peak" is the most memory that a call allocates, in tensors of the data.

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
    families = list(_FAMILIES) if options["family"] == "all" else common.known("family", options["family"], _FAMILIES)
    devices = package("devices").find(options["device"])
    named = _chosen_peers(options["peers"], families, peers.PEERS)
    dtypes = common.known("dtypes", "fp32" if quick and not given else options["dtypes"], cases.DTYPES)
    passes = common.known("passes", options["passes"], cases.PASSES)
    sizes = parse_sizes(options["sizes"] or (_QUICK_SIZES if quick else _SIZES))
    threads = parse_threads(options["threads"])
    common.writable(options["json_file"], options["html_file"])
    arguments = {"sizes": sizes, "dtypes": [cases.DTYPES[name] for name in dtypes], "passes": passes}
    chosen = _chosen_cases(options["granularity"], families, arguments)

    memory = common.memory(options["allocator"])
    common.gate(devices, arguments["dtypes"], families if options["gate"] else [], ops=True, steps=False)
    effort = measure.QUICK if quick else measure.Effort()
    _record(",".join(families), devices, memory, effort, options, threads, arguments["dtypes"], chosen, named)


def _record(
    benchmark: str, devices: list[Any], memory: str, effort: Any, options: dict[str, Any], threads: list[int],
    dtypes: list[Any], cases: dict[str, list[Any]], peers: dict[str, list[str]],
) -> None:  # fmt: skip
    """Measure the families' cases on each device, its roofline first."""
    record = Record(benchmark, devices, memory, effort, options["json_file"], options["html_file"])
    jobs = []
    for device in devices:
        counts = common.threads_of(device, threads)
        jobs.append(roofline_jobs(device, counts, dtypes, effort, options["quick"]))
        for family, own in cases.items():
            jobs.append(kernel_jobs(record, device, counts, own, peers[family], effort))
    with record.kept():
        record.measure(jobs)


def _chosen_peers(text: str | None, families: list[str], known: dict[str, Any]) -> dict[str, list[str]]:
    """Names of the peers of each family."""
    if text is None:
        return {family: [name for name in known[family] if name not in _ON_REQUEST] for family in families}
    named = common.known("peers", text, dict.fromkeys(name for family in families for name in known[family]))
    return {family: [name for name in named if name in known[family]] for family in families}


def _chosen_cases(text: str | None, families: list[str], arguments: dict[str, Any]) -> dict[str, list[Any]]:
    """The cases of each family. A family without granularities has all of its cases, whatever is named."""
    modules = {family: package(f"cases.{family}") for family in families}
    own = {family: getattr(module, "GRANULARITIES", None) for family, module in modules.items()}
    if text is not None:
        named = common.known("granularity", text, dict.fromkeys(name for names in own.values() for name in names or ()))
    found = {}
    for family, module in modules.items():
        if own[family] is None:
            found[family] = list(module.cases(**arguments))
            continue
        taken = [n for n in own[family] if n != "group128"] if text is None else [n for n in named if n in own[family]]
        found[family] = list(module.cases(**arguments, granularities=taken)) if taken else []
    return found


@bench.command()
@click.option("--lists", default="resnet18,small", show_default=True, help="Of resnet18, resnet50, vit_b, small.")
@click.option("--bases", default="sgd,adamw", show_default=True, help="Of sgd, adam, adamw, padam, lars, lamb.")
@click.option("--dtypes", default="fp32", show_default=True, help="Of fp32, bf16 (with fp32 masters), fp64.")
@click.option(
    "--family", default="sharpness", show_default=True, help="sharpness: both passes; descent: the base alone."
)
@click.option("--peers", help="Who steps. [default: all]")
@common.DEVICE
@common.THREADS
@common.ALLOCATOR
@common.QUICK
@common.GATE
@common.files
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
    families = common.known("family", options["family"], _STEPS)
    devices = package("devices").find(options["device"])
    named = _chosen_peers(options["peers"], families, peers.PEERS)
    lists = common.known("lists", options["lists"], package("cases.sharpness").LISTS)
    bases = common.known("bases", options["bases"], fastflat.optim.BASES)
    dtypes = [cases.DTYPES[name] for name in common.known("dtypes", options["dtypes"], cases.DTYPES)]
    threads = parse_threads(options["threads"])
    common.writable(options["json_file"], options["html_file"])
    memory = common.memory(options["allocator"])
    common.gate(devices, dtypes, families if options["gate"] else [], ops=False, steps=True)
    effort = measure.QUICK if options["quick"] else measure.Effort(seconds=6.0, rounds=(9, 60))
    chosen = {family: list(package(f"cases.{family}").cases(lists, dtypes, bases)) for family in families}
    _record(",".join(families), devices, memory, effort, options, threads, dtypes, chosen, named)


@bench.command()
@click.option(
    "--networks", default="mlp,convnet,small,transformer", show_default=True,
    help="Of mlp, convnet, small, transformer, resnet18.",
)  # fmt: skip
@click.option("--forms", default="plain,quantized", show_default=True, help="Of plain, quantized (4 bits).")
@click.option("--matrices", default="hessian,ggn,forms", show_default=True, help="Of hessian, ggn, forms (v^T H v).")
@click.option("--k", "counts", default="1,8", show_default=True, help="Numbers of vectors at once.")
@click.option("--peers", help="Who computes. [default: all]")
@common.DEVICE
@common.THREADS
@common.ALLOCATOR
@common.QUICK
@common.files
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
    devices = package("devices").find(options["device"])
    named = _chosen_peers(options["peers"], _PRODUCTS, peers.PEERS)["curvature"]
    names = common.known("networks", options["networks"], cases.NETWORKS)
    forms = [form == "quantized" for form in common.known("forms", options["forms"], ("plain", "quantized"))]
    modes = common.known("matrices", options["matrices"], cases.MODES)
    counts = parse_counts(options["counts"])
    threads = parse_threads(options["threads"])
    common.writable(options["json_file"], options["html_file"])
    memory = common.memory(options["allocator"])
    effort = measure.QUICK if options["quick"] else measure.Effort(seconds=8.0, rounds=(5, 30))
    chosen = list(cases.cases(names, forms, counts, modes))
    record = Record("curvature", devices, memory, effort, options["json_file"], options["html_file"])
    with record.kept():
        record.measure(product_jobs(d, common.threads_of(d, threads), chosen, named, effort) for d in devices)

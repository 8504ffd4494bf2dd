# SPDX-License-Identifier: Apache-2.0
"""``fastflat bench run`` and ``bench step``: the whole picture, and training steps alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click
import torch

from fastflat.cli import _bench as common
from fastflat.cli._bench import package, parse_threads
from fastflat.cli._bench_record import Jobs, Record, kernel_jobs, product_jobs, roofline_jobs
from fastflat.methods.lab.networks import build

_STEP_PEERS = "fp32,view,identity,mul,fastflat,eager,builtin"
#: What a run compares in a training step.
_RUN_PEERS = ("fp32", "fastflat", "eager", "builtin", "torchao", "brevitas")
#: Samples in a step of a run, by network; with --quick.
_BATCH, _QUICK_BATCH = {"resnet20": 64, "resnet18": 32, "transformer": 16}, {"resnet20": 16, "transformer": 2}
_PRODUCT_PEERS = ("fastflat", "double-backward", "func-vmap")
_PARTS = ("kernels", "optimizers", "steps", "curvature", "audited")


def networks() -> dict[str, Any]:
    """Networks of training steps; ResNet-20 is that of ``fastflat train``."""
    step = package("step")

    def resnet20() -> torch.nn.Module:
        state = torch.random.get_rng_state()
        try:
            return build("resnet20", (3, 32, 32), 10, seed=0)
        finally:
            torch.random.set_rng_state(state)

    return {"resnet20": step.Network(resnet20, (3, 32, 32), ("conv1", "fc")), **step.NETWORKS}


@click.command()
@common.DEVICE
@click.option("--only", default=",".join(_PARTS), show_default=True, help="Parts of the run.")
@click.option("--families", help="Of the kernels' and optimizers' families. [default: all]")
@click.option("--dtypes", default="fp32,bf16", show_default=True, help="Of fp32, bf16, fp16; with --quick fp32.")
@click.option("--sizes", help="Elements. [default: 2^16,2^20,2^24; with --quick 2^20]")
@common.THREADS
@common.ALLOCATOR
@click.option("--quick", is_flag=True, help="Fewer rounds and cases, one thread, nothing compiled: some minutes.")
@common.GATE
@common.files
@click.pass_context
def run(ctx: click.Context, **options: Any) -> None:
    """The whole picture: what the device can do, kernels of every family, optimizers, training steps, products with
    curvature matrices, each beside its peers; and GPU kernels that were audited but not run, with their static bound.

    "of roofline": the least time of the bytes and operations that a kernel declares, at the rates measured at the
    start, over its time.

    \b
    Examples:
      fastflat bench run --quick
      fastflat bench run --device all --json result.json --html result.html
      fastflat bench run --quick --only kernels --families fake_quantize,mixquant
    """
    cases, overview, measure = package("cases"), package("overview"), package("measure")
    quick = options["quick"]

    def given(name: str) -> bool:
        return ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE

    devices = package("devices").find(options["device"])
    parts = common.known("only", options["only"], _PARTS)
    every = (*overview.KERNELS, *overview.STEPS)
    only = common.known("families", options["families"], every) if options["families"] else list(every)
    names = common.known("dtypes", "fp32" if quick and not given("dtypes") else options["dtypes"], cases.DTYPES)
    dtypes = [cases.DTYPES[name] for name in names]
    default = overview.QUICK_SIZES if quick else overview.SIZES
    sizes = common.parse_sizes(options["sizes"]) if options["sizes"] else default
    threads = parse_threads("1" if quick and not given("threads") else options["threads"])
    common.writable(options["json_file"], options["html_file"])

    kernels = overview.kernels(sizes, dtypes, only)
    optimizers = overview.steps(["small"] if quick else ["small", "resnet18"], only=only)
    memory = common.memory(options["allocator"])
    ops, steps = bool({"kernels", "steps"} & set(parts)), bool({"optimizers", "steps"} & set(parts))
    common.gate(devices, dtypes, only if options["gate"] else [], ops=ops, steps=steps)
    effort = measure.QUICK if quick else measure.Effort()
    record = Record("run", devices, memory, effort, options["json_file"], options["html_file"])
    if "audited" in parts:
        arches = [facts["gpu"].split()[-1] for facts in record.result["machines"].values() if "gpu" in facts]
        record.result["audited"] = package("audited").rows({**kernels, **optimizers}, arches)
    jobs = []
    for device in devices:
        counts = common.threads_of(device, threads)
        jobs.append(roofline_jobs(device, counts, dtypes, effort, quick))
        families = {**(kernels if "kernels" in parts else {}), **(optimizers if "optimizers" in parts else {})}
        for family, own in families.items():
            jobs.append(kernel_jobs(record, device, counts, own, overview.peers(family, not quick), effort))
        if "steps" in parts:
            jobs.append(_step_jobs(device, counts, _training(quick), _RUN_PEERS, _step_effort(quick)))
        if "curvature" in parts:
            products = list(package("product_cases").cases(["small"], [True], [8], ["hessian", "forms"]))
            jobs.append(product_jobs(device, counts, products, _PRODUCT_PEERS, effort))
    with record.kept():
        record.measure(jobs)


def _training(quick: bool) -> list[Any]:
    """The groups of training steps of a run."""
    step, makers = package("step"), networks()
    modes = ("eager",) if quick else step.MODES
    return [
        step.TrainingCase(name, makers[name], batch, mode=mode, optimizers=step.OPTIMIZERS)
        for name, batch in (_QUICK_BATCH if quick else _BATCH).items()
        for mode in modes
    ]


def _step_effort(quick: bool) -> Any:
    effort = package("measure").Effort
    return effort(seconds=2.0, rounds=(3, 9), block=0.0) if quick else effort(seconds=60.0, rounds=(7, 21), block=0.0)


def _step_jobs(device: Any, counts: Sequence[int], cases: Sequence[Any], peers: Sequence[str], effort: Any) -> Jobs:
    rows = package("step").rows
    work = [
        (f"{case.label}, {count} threads", lambda case=case, count=count: rows(case, peers, count, effort, device))
        for count in counts
        for case in cases
    ]
    return device, "rows", work


@click.command()
@click.option("--networks", "names", default="resnet20", show_default=True, help="Of resnet20, resnet18, transformer.")
@click.option("--batch", type=click.IntRange(1, 4096), default=64, show_default=True, help="Samples in a step.")
@click.option("--bits", type=click.IntRange(1, 16), default=4, show_default=True, help="Of weights and activations.")
@click.option("--peers", default=_STEP_PEERS, show_default=True, help="In the places of the quantizers.")
@click.option("--modes", default="eager", show_default=True, help="Of eager, compile.")
@click.option("--optimizers", default="sgd", show_default=True, help="Of sgd, sam-loop, sam.")
@common.DEVICE
@common.THREADS
@common.ALLOCATOR
@common.QUICK
@common.files
def step(**options: Any) -> None:
    """A training step of a network, and what the quantizers add to it: ResNet-20, ResNet-18 for 32x32 images, a
    transformer of 6 layers.

    identity: autograd Functions that copy, in the same places; view: Functions that do nothing at all. "of identity's"
    is the overhead over the fp32 step in units of identity's. fastflat-list: the weights of all layers in one call.
    sam-loop: the popular implementation of sharpness-aware minimisation; sam: fastflat's.

    \b
    Examples:
      fastflat bench step --batch 64 --threads 1 --json step.json
      fastflat bench step --networks resnet18,transformer --batch 8 --modes eager,compile --optimizers sgd,sam-loop,sam
    """
    steps, makers = package("step"), networks()
    names = common.known("networks", options["names"], makers)
    peers = common.known("peers", options["peers"], steps.QUANTIZERS)
    modes = common.known("modes", options["modes"], steps.MODES)
    optimizers = tuple(common.known("optimizers", options["optimizers"], steps.OPTIMIZERS))
    devices = package("devices").find(options["device"])
    threads = parse_threads(options["threads"])
    common.writable(options["json_file"], options["html_file"])
    memory = common.memory(options["allocator"])
    common.gate(devices, [torch.float32], [], ops=True, steps="sam" in optimizers)
    effort = package("measure").Effort(seconds=90.0, rounds=(9, 31), block=0.0)
    if options["quick"]:
        effort = package("measure").QUICK
    shape = {"batch": options["batch"], "bits": options["bits"]}
    cases = [
        steps.TrainingCase(name, makers[name], **shape, mode=mode, optimizers=optimizers)
        for name in names
        for mode in modes
    ]
    record = Record("step", devices, memory, effort, options["json_file"], options["html_file"], **shape)
    with record.kept():
        record.measure(_step_jobs(d, common.threads_of(d, threads), cases, peers, effort) for d in devices)

# SPDX-License-Identifier: Apache-2.0
"""``fastflat bench accelerate``: training steps with other libraries' quantizers, as they are and accelerated."""

from __future__ import annotations

from typing import Any

import click
import torch

from fastflat.cli import _bench as common
from fastflat.cli._bench import package, parse_threads
from fastflat.cli._bench_record import Record


@click.command()
@click.option("--networks", "names", help="Of torch.ao, torch.ao-unfused, torchao, brevitas, lsq. [default: all]")
@click.option("--batch", type=click.IntRange(1, 4096), help="Samples in a step. [default: 32, of torchao 16]")
@common.THREADS
@common.ALLOCATOR
@common.QUICK
@common.files
def accelerate(**options: Any) -> None:
    """What fastflat.accelerate gives a training step: ResNet-20 with the quantizers of torch.ao, of Brevitas and a
    home-made LSQ, a transformer block with torchao's.

    fp32: the quantizers hand on what they are given, the most that could be had; theirs: the library's own; fastflat:
    those accelerated. "of the cap" is the speed-up over that of fp32. Libraries: make peers.

    \b
    Examples:
      fastflat bench accelerate --threads 1
      fastflat bench accelerate --networks brevitas,torchao --json accelerate.json --html accelerate.html
    """
    accelerated = package("accelerated")
    every = list(accelerated.SUBJECTS)
    names = common.known("networks", options["names"], every) if options["names"] else every
    devices = package("devices").find("cpu")
    threads = parse_threads(options["threads"])
    common.writable(options["json_file"], options["html_file"])
    memory = common.memory(options["allocator"])
    common.gate(devices, [torch.float32], [], ops=True, steps=False)
    effort = package("measure").Effort(seconds=60.0, rounds=(9, 31), block=0.0)
    if options["quick"]:
        effort = package("measure").Effort(seconds=2.0, rounds=(3, 9), block=0.0)
    record = Record("accelerate", devices, memory, effort, options["json_file"], options["html_file"])

    def job(name: str, count: int) -> Any:
        return f"{name}, {count} threads", lambda: accelerated.rows(name, count, effort, options["batch"])

    work = [job(name, count) for count in common.threads_of(devices[0], threads) for name in names]
    with record.kept():
        record.measure([(devices[0], "rows", work)])

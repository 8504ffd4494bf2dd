# SPDX-License-Identifier: Apache-2.0
"""Timing: everything that is compared takes turns in one process, so that what else the machine does hits all alike."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from . import devices
from .timers import Block, Host, Timer


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        seconds: rounds go on until this time has passed ...
        rounds: ... but at least and at most so many.
        block: a call shorter than this is repeated within a round, in seconds, after one untimed call that brings back
            into the caches what the others drove out.
    """

    seconds: float = 1.5
    rounds: tuple[int, int] = (7, 40)
    block: float = 8e-3


QUICK = Effort(seconds=0.3, rounds=(5, 20), block=3e-3)


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call: median and quartiles over the rounds, the fastest round, and every round in turn; ``how``
    it was timed and, where that was by a graph, the seconds of a call ``launched`` from Python."""

    median: float
    q1: float
    q3: float
    best: float
    calls: int
    samples: tuple[float, ...]
    how: str = "host"
    launched: float | None = None

    @property
    def rounds(self) -> int:
        return len(self.samples)

    def over(self, other: Timing) -> float:
        """How many times longer than `other`: the median of the rounds' ratios, which a slow drift leaves alone."""
        return statistics.median(a / b for a, b in zip(self.samples, other.samples, strict=True))


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch's number of threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def host_threads(count: int, device: torch.device | devices.Device) -> contextlib.AbstractContextManager:
    """:func:`threads` where the CPU is measured."""
    return threads(count) if devices.of(device).kind == "cpu" else contextlib.nullcontext()


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def interleaved(
    calls: Mapping[str, Callable[[], object] | Sequence[Callable[[], object]]],
    effort: Effort,
    synchronize: Callable[[], None] = lambda: None,
    timer: Timer | None = None,
) -> dict[str, Timing]:
    """Time each call in rounds: a round runs a block of every call, in an order that rotates from round to round.

    Args:
        calls: what to time, by name, or a list of calls that do the same on different memory; warmed up first.
        effort: how long.
        synchronize: waits for the device; runs at both ends of a block of the host's clock.
        timer: times the blocks; the host's clock by itself.

    Returns:
        The timings by the same names.
    """
    timer = timer or Host(synchronize)
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    with _no_collection():
        blocks = {name: timer.prepare([call] if callable(call) else call) for name, call in calls.items()}
        repeats = {name: _repeats(blocks[name], effort.block) for name in names}
        began = time.perf_counter()
        least, most = effort.rounds
        for turn in range(most):
            if turn >= least and time.perf_counter() - began > effort.seconds:
                break
            first = turn % len(names) if names else 0
            for name in names[first:] + names[:first]:
                if repeats[name] > 1:
                    blocks[name].warm()
                samples[name].append(blocks[name].run(repeats[name]) / repeats[name])
    return {name: _timing(samples[name], repeats[name], blocks[name]) for name in names}


def _repeats(block: Block, seconds: float) -> int:
    """Calls that fill a block, found by doubling; warms the call up on the way."""
    block.run(2)
    count = 1
    while True:
        taken = block.run(count)
        if taken >= seconds / 2 or count >= 1 << 16:
            return max(1, round(count * seconds / max(taken, 1e-9))) if taken < seconds else count
        count *= 2


def _timing(samples: list[float], calls: int, block: Block | None = None) -> Timing:
    q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    timing = Timing(median, q1, q3, min(samples), calls, tuple(samples))
    return timing if block is None else dataclasses.replace(timing, how=block.how, launched=block.launched)


def copy_of(x: torch.Tensor) -> Callable[[], object]:
    """A copy of x into memory that is already there: the yardstick."""
    source = x.detach()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def synchronizer(device: torch.device | devices.Device) -> Callable[[], None]:
    """What waits for the work queued on a device."""
    return devices.of(device).synchronize


def peak_memory(call: Callable[[], object], device: torch.device | devices.Device) -> int:
    """Bytes of PyTorch's allocator that one call holds at its highest, above what was held before it.

    Results, saved tensors and temporaries count; inputs and what a library allocates by itself do not. One warm call,
    outside the timing: exact, and the same in every run.
    """
    device = devices.of(device)
    if device.module is not None:
        device.synchronize()
        device.module.reset_peak_memory_stats(device.place)
        before = device.module.memory_allocated(device.place)
        call()
        device.synchronize()
        return device.module.max_memory_allocated(device.place) - before
    with _no_collection(), _profiler_silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        call()
    events = [event for event in run.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


@contextlib.contextmanager
def _profiler_silent() -> Iterator[None]:
    """The profiler of some builds writes to the process's standard error when it starts and stops."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)

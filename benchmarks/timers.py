# SPDX-License-Identifier: Apache-2.0
"""How long a block of calls takes: by the host's clock, or on a GPU by its events.

A timer prepares a call once and gives a block, whose ``run(n)`` is the seconds of n calls. What is prepared is a list
of calls that do the same on different memory: a block goes round them, so that on a GPU no call finds its data in the
L2 cache.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from .devices import Device

Call = Callable[[], object]
#: Calls that take less than so many seconds as launched from Python are captured in a CUDA graph: launching may take
#: longer than they do. Autograd alone takes 0.2 ms forward and backward, lists of a thousand tensors some ms.
SHORT = 20e-3
#: Least number of calls in a graph.
_IN_GRAPH = 20
#: Rotation ends at so many copies of the data, whatever the cache would hold.
_MOST_COPIES = 32


class Block(Protocol):
    """A prepared call: ``how`` it is timed, and the seconds of one ``launched`` from Python where that is not it."""

    how: str
    launched: float | None

    def run(self, count: int) -> float: ...

    def warm(self) -> None: ...


class Timer(Protocol):
    def prepare(self, calls: Sequence[Call]) -> Block: ...

    def copies(self, size: int) -> int: ...


class Host:
    """The host's clock; ``synchronize`` waits for the device at both ends of a block."""

    def __init__(self, synchronize: Callable[[], None] = lambda: None) -> None:
        self.synchronize = synchronize

    def copies(self, size: int) -> int:
        """One: on a CPU what fits the caches is there in a training step, too."""
        return 1

    def prepare(self, calls: Sequence[Call]) -> Block:
        return _HostBlock(_round_robin(calls), self.synchronize)


class _HostBlock:
    how, launched = "host", None

    def __init__(self, call: Call, synchronize: Callable[[], None]) -> None:
        self.call, self.synchronize = call, synchronize

    def warm(self) -> None:
        self.call()

    def run(self, count: int) -> float:
        self.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            self.call()
        self.synchronize()
        return time.perf_counter() - start


class Cuda:
    """CUDA events around a block; with `graphs`, a graph of the calls where one is shorter than :data:`SHORT`."""

    def __init__(self, device: Device, graphs: bool = True) -> None:
        self.device, self.module, self.graphs = device, device.module, graphs

    def copies(self, size: int) -> int:
        """How many data sets of `size` bytes exceed twice the L2 cache."""
        cache = self.module.get_device_properties(self.device.place).L2_cache_size
        return min(_MOST_COPIES, max(1, -(-2 * cache // max(size, 1))))

    def prepare(self, calls: Sequence[Call]) -> Block:
        calls = list(calls)
        for call in calls:
            call()
        launched = _EventBlock(self.module, _round_robin(calls))
        launched.run(len(calls))
        seconds = launched.run(len(calls)) / len(calls)
        if not self.graphs or seconds >= SHORT:
            return launched
        graph = self._captured(calls * -(-_IN_GRAPH // len(calls)))
        return launched if graph is None else _GraphBlock(self.module, *graph, seconds)

    def _captured(self, calls: list[Call]):
        """A graph of the calls and their number; None where one cannot be captured (it waits for the device)."""
        module = self.module
        stream = module.Stream(self.device.place)
        stream.wait_stream(module.current_stream(self.device.place))
        try:
            with module.stream(stream):
                for call in dict.fromkeys(calls):
                    call()
            module.current_stream(self.device.place).wait_stream(stream)
            graph = module.CUDAGraph()
            with module.graph(graph):
                for call in calls:
                    call()
        except Exception:  # a call that synchronises, a peer that allocates by itself, ...: it is timed as launched
            module.synchronize(self.device.place)
            return None
        return graph, len(calls)


class _EventBlock:
    how, launched = "events", None

    def __init__(self, module, call: Call) -> None:
        self.module, self.call = module, call

    def warm(self) -> None:
        self.call()

    def run(self, count: int) -> float:
        start, end = (self.module.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            self.call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


class _GraphBlock(_EventBlock):
    how = "graph"

    def __init__(self, module, graph, size: int, launched: float) -> None:
        super().__init__(module, graph.replay)
        self.size, self.launched = size, launched

    def run(self, count: int) -> float:
        """As many whole graphs as hold `count` calls, counted down to them."""
        replays = -(-count // self.size)
        return super().run(replays) * count / (replays * self.size)


def of(device: Device, graphs: bool = True) -> Timer:
    return Host() if device.module is None else Cuda(device, graphs)


def _round_robin(calls: Sequence[Call]) -> Call:
    if len(calls) == 1:
        return calls[0]
    turn = itertools.cycle(calls)
    return lambda: next(turn)()

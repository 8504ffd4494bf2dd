# SPDX-License-Identifier: Apache-2.0
"""A stand-in for ``torch.cuda``: the GPU's path runs in CI. Its tensors live on the CPU, its events read a clock, its
graphs replay what a test's kernels did while they were captured, and it can be lost in the middle of a run."""

from __future__ import annotations

import contextlib
import time
from types import SimpleNamespace

import torch


class FakeCuda:
    """So many GPUs.

    Args:
        count: of GPUs.
        cache: bytes of the L2 cache.
        lost_after: events after which nothing answers any more.
        clock: seconds; the host's unless a test turns its own.
    """

    def __init__(self, count=1, cache=1 << 20, lost_after=None, clock=time.perf_counter):
        self.count, self.cache, self.lost_after, self.clock = count, cache, lost_after, clock
        self.events, self.captured, self.capturable, self.entered = 0, None, True, []
        self.Event = self._event
        self.CUDAGraph = lambda: Graph(self)

    def is_available(self):
        return self.count > 0

    def device_count(self):
        return self.count

    def place(self, name):
        return torch.device("cpu")

    def get_device_properties(self, place):
        return SimpleNamespace(name="Fake H100", major=9, minor=0, total_memory=1 << 36, L2_cache_size=self.cache)

    def _answer(self):
        if self.lost_after is not None and self.events > self.lost_after:
            raise RuntimeError("CUDA error: the GPU has fallen off the bus\nCUDA kernel errors might be reported late")

    def synchronize(self, place=None):
        self._answer()

    def _event(self, enable_timing):
        assert enable_timing
        return Event(self)

    # Streams and graphs

    def Stream(self, place=None):
        return SimpleNamespace(wait_stream=lambda other: None)

    def current_stream(self, place=None):
        return self.Stream()

    def stream(self, stream):
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def device(self, place):
        self.entered.append(place)
        yield

    @contextlib.contextmanager
    def graph(self, graph):
        self.captured = graph.calls
        try:
            yield
            if not self.capturable:
                raise RuntimeError("operation not permitted when stream is capturing")
        finally:
            self.captured = None

    # Memory

    def reset_peak_memory_stats(self, place):
        self.peak = 1000

    def memory_allocated(self, place):
        return 1000

    def max_memory_allocated(self, place):
        return 5096


class Event:
    def __init__(self, module):
        self.module, self.at = module, None

    def record(self):
        self.module.events += 1
        self.module._answer()
        self.at = self.module.clock()

    def synchronize(self):
        assert self.at is not None

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


class Graph:
    def __init__(self, module):
        self.module, self.calls = module, []

    def replay(self):
        for call in self.calls:
            call()


class Turned:
    """A clock that only kernels move; launching one from Python takes `launch` seconds more."""

    def __init__(self, launch=0.0):
        self.now, self.launch, self.log = 0.0, launch, []

    def __call__(self):
        return self.now

    def kernel(self, module, name, seconds):
        def run():
            self.log.append(name)
            self.now += seconds

        def call():
            if module.captured is not None:
                module.captured.append(run)
                return
            self.now += self.launch
            run()

        return call

# SPDX-License-Identifier: Apache-2.0
"""Measures cases peer by peer and turns timings into rows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from . import measure
from .cases import Case, name_of
from .measure import Effort
from .peers import FLOORS, Unsupported, prepare

_COPY = "copy"


def rows(case: Case, peers: Sequence[str], threads: int, effort: Effort, device: torch.device) -> list[dict[str, Any]]:
    """One row per peer, all measured in turns with a copy of the same size.

    A row holds the median ``seconds`` of a call with quartiles ``q1``, ``q3`` and ``best`` over ``rounds`` of
    ``calls`` each; ``bytes`` it must move and the ``bandwidth`` that follows (bytes a second); ``copy_seconds``;
    ``copies``, its time in copies of the data; ``of_copy_bandwidth``; ``over_floor``, how many times longer than the
    floor, as the median over the rounds; ``peak_bytes``, the most memory that a call allocates at once. A peer without
    a form of the case has its reason in ``unsupported`` and no timing.
    """
    named = {
        "family": case.family,
        "threads": threads,
        "dtype": name_of(case.dtype),
        "granularity": case.granularity,
        "passes": case.passes,
        "elements": case.elements,
        "shape": list(case.shape),
    }
    with measure.threads(threads) if device.type == "cpu" else contextlib.nullcontext():
        data = case.data(device)
        calls, missing = {_COPY: measure.copy_of(data.x)}, {}
        for peer in peers:
            try:
                calls[peer] = prepare(peer, data)
            except Unsupported as reason:
                missing[peer] = str(reason)
        timings = measure.interleaved(calls, effort, measure.synchronizer(device))
        peaks = {peer: measure.peak_memory(calls[peer], device) for peer in peers if peer in calls}
    copy = timings[_COPY].median
    return [
        {**named, "peer": peer, "copy_seconds": copy}
        | ({"unsupported": missing[peer]} if peer in missing else _numbers(case, peer, timings, copy, peaks[peer]))
        for peer in peers
    ]


def _numbers(case: Case, peer: str, timings: dict[str, measure.Timing], copy: float, peak: int) -> dict[str, Any]:
    timing, floor = timings[peer], timings.get(FLOORS[0])
    moved = case.bytes
    if peer in FLOORS:
        moved = case.copied_bytes * (2 if case.passes == "both" else 1)
    bandwidth = moved / timing.median
    return {
        "seconds": timing.median,
        "q1": timing.q1,
        "q3": timing.q3,
        "best": timing.best,
        "rounds": timing.rounds,
        "calls": timing.calls,
        "bytes": moved,
        "bandwidth": bandwidth,
        "copies": timing.median / copy,
        "of_copy_bandwidth": bandwidth / (case.copied_bytes / copy),
        "over_floor": None if floor is None else timing.over(floor),
        "peak_bytes": peak,
    }


def all_rows(
    cases: Sequence[Any],
    peers: Sequence[str],
    threads: Sequence[int],
    effort: Effort,
    device: torch.device,
    measured: Callable[..., list[dict[str, Any]]] = rows,
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The rows of every case at every number of threads, with a label to show meanwhile; ``measured`` gives those of
    one, as :func:`rows` does."""
    for count in threads:
        for case in cases:
            yield f"{case.label}, {count} threads", measured(case, peers, count, effort, device)

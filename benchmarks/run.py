# SPDX-License-Identifier: Apache-2.0
"""Measures cases peer by peer and turns timings into rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

import fastflat

from . import devices, measure, timers
from .cases import Case, name_of
from .devices import Device
from .measure import Effort
from .peers import FLOORS, Unsupported, prepare_all
from .roofline import Roofs

_COPY, _ROOF = "copy", "roof"
#: A call works on its arguments and on about as much again.
_WORKING_SET = 2


def rows(
    case: Case,
    peers: Sequence[str],
    threads: int,
    effort: Effort,
    device: torch.device | Device,
    roofs: Roofs | None = None,
) -> list[dict[str, Any]]:
    """One row per peer, all measured in turns with a copy of the same size.

    A row holds the median ``seconds`` of a call with quartiles ``q1``, ``q3`` and ``best`` over ``rounds`` of
    ``calls`` each; ``bytes`` it must move and the ``bandwidth`` that follows (bytes a second); ``operations`` of the
    formula; ``elements_per_second``; ``copy_seconds``; ``copies``, its time in copies of the data;
    ``of_copy_bandwidth``; ``of_roofline``, the time that its bytes or operations take at the measured `roofs`, or its
    bytes in the fastest round of a plain copy of as many, over ``seconds``;
    ``over_floor``, how many times longer than the floor, as the median over the rounds; ``peak_bytes``, the most memory
    that a call allocates at once; ``timing`` (host, events, graph) with ``launched_seconds`` beside a graph; and
    ``buffers``, the copies of the data that calls go round. A peer without a form of the case has its reason in
    ``unsupported`` and no timing.
    """
    device = devices.of(device)
    named = {
        "family": case.family,
        "device": device.name,
        "threads": threads,
        "dtype": name_of(case.dtype),
        "granularity": case.granularity,
        "passes": case.passes,
        "elements": case.elements,
        "shape": list(case.shape),
    }
    timer = timers.of(device)
    with device.active(), measure.host_threads(threads, device):
        copies = [case.data(device.place) for _ in range(timer.copies(_WORKING_SET * case.bytes))]
        calls, missing = {_COPY: [measure.copy_of(data.x) for data in copies]}, {}
        if roofs is not None:
            calls[_ROOF] = [_copy_of_bytes(case.bytes, device.place) for _ in copies]
        for peer in peers:
            try:
                calls[peer] = prepare_all(peer, copies)
            except Unsupported as reason:
                missing[peer] = str(reason)
        timings = measure.interleaved(calls, effort, timer=timer)
        peaks = {peer: measure.peak_memory(calls[peer][0], device) for peer in peers if peer in calls}
    copy = timings[_COPY].median
    found = []
    for peer in peers:
        row = {**named, "peer": peer, "copy_seconds": copy}
        if peer in missing:
            found.append({**row, "unsupported": missing[peer]})
            continue
        row |= _numbers(case, peer, timings, copy, peaks[peer], roofs) | {"buffers": len(copies)}
        if peer.startswith("fastflat"):
            row["backend"] = _backend(device)
        found.append(row)
    return found


def _copy_of_bytes(moved: int, place: torch.device) -> Callable[[], object]:
    """A copy that moves as many bytes as a case: half of them read, half written, so that the caches serve it as they
    would serve the case."""
    return measure.copy_of(torch.zeros(max(moved // 8, 1), device=place))


def _backend(device: Device) -> str:
    return fastflat.choose("fake_quantize", device.place.type)[0]


def _numbers(
    case: Case, peer: str, timings: dict[str, measure.Timing], copy: float, peak: int, roofs: Roofs | None
) -> dict[str, Any]:
    timing, floor = timings[peer], timings.get(FLOORS[0])
    moved, operations = case.bytes, case.operations
    if peer in FLOORS:
        passes = 2 if case.passes == "both" else 1
        moved = case.copied_bytes * passes
        operations = case.elements * passes if peer == "mul" else 0
    bandwidth, copied = moved / timing.median, case.copied_bytes / copy
    numbers = {
        **timed(timing),
        "bytes": moved,
        "operations": operations,
        "bandwidth": bandwidth,
        "elements_per_second": case.elements / timing.median,
        "copies": timing.median / copy,
        "of_copy_bandwidth": bandwidth / copied,
        "over_floor": None if floor is None else timing.over(floor),
        "peak_bytes": peak,
    }
    if roofs is not None:
        copied_whole = case.bytes / timings[_ROOF].best
        least = roofs.least(moved, operations, name_of(case.dtype), copied_whole)
        numbers["of_roofline"] = least / timing.median
    return numbers


def timed(timing: measure.Timing) -> dict[str, Any]:
    """The fields of a row that say how long a call took, and how that was found out."""
    found = {
        "seconds": timing.median, "q1": timing.q1, "q3": timing.q3, "best": timing.best,
        "rounds": timing.rounds, "calls": timing.calls, "timing": timing.how,
    }  # fmt: skip
    return found if timing.launched is None else {**found, "launched_seconds": timing.launched}


def all_rows(
    cases: Sequence[Any],
    peers: Sequence[str],
    threads: Sequence[int],
    effort: Effort,
    device: torch.device | Device,
    measured: Callable[..., list[dict[str, Any]]] = rows,
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The rows of every case at every number of threads, with a label to show meanwhile; ``measured`` gives those of
    one, as :func:`rows` does.

    Raises:
        devices.Lost: the device no longer answers.
    """
    for count in threads:
        for case in cases:
            work = functools.partial(measured, case, peers, count, effort, device)
            yield f"{case.label}, {count} threads", guarded(device, work)


def guarded(device: torch.device | Device, work: Callable[[], Any]) -> Any:
    """What `work` gives; where it fails because the device is gone, an error that says so."""
    try:
        return work()
    except Exception as error:
        device = devices.of(device)
        said = device.silence() if device.module is not None else None
        if said is None:
            raise
        raise devices.Lost(f"{device.name} no longer answers: {said}") from error

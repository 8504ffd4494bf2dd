# SPDX-License-Identifier: Apache-2.0
"""What :func:`fastflat.accelerate` gives a training step with another library's quantizers: the step with them, the
same step with them accelerated, and without any, which is the most that could be had.

With their times T, A and N: ``T/N`` is the cap, ``T/A`` the speed-up, ``N/A`` what it reaches of the cap.
"""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastflat

from . import measure, step
from .measure import Effort
from .peer_models import SUBJECTS
from .peers import first_line

#: Rows of a case: without quantizers, with the library's own, with those accelerated.
PEERS = ("fp32", "theirs", "fastflat")
#: Samples in a step.
BATCH = {"torch.ao": 32, "torch.ao-unfused": 32, "torchao": 16, "brevitas": 32, "lsq": 32}
#: Training steps before the first is timed: running averages settle.
_SETTLING = 16


def rows(name: str, threads: int, effort: Effort, batch: int | None = None) -> list[dict[str, Any]]:
    """One row for each of :data:`PEERS`, as of a training step; ``overhead`` is over fp32, and the row of fastflat has
    ``speedup``, T/A, and ``of_cap``, N/A, as medians over the rounds. Of a library that is not installed all rows say
    so."""
    package, make = SUBJECTS[name]
    batch = batch or BATCH[name]
    named = {
        "family": "step", "device": "cpu", "threads": threads, "network": name, "mode": "eager", "optimizer": "sgd",
        "batch": batch,
    }  # fmt: skip
    try:
        importlib.import_module(package)
    except ImportError as error:
        return [{**named, "peer": peer, "unsupported": f"{package}: {first_line(error)}"} for peer in PEERS]
    with warnings.catch_warnings(), measure.threads(threads):
        warnings.simplefilter("ignore")
        subject = make(batch)
        for _ in range(_SETTLING):
            subject.loss(subject.model)
        models = {"fp32": subject.without(subject.model), "theirs": subject.model}
        models["fastflat"] = copy.deepcopy(subject.model)
        fastflat.accelerate(models["fastflat"])
        calls = {peer: _step(model, subject.loss) for peer, model in models.items()}
        taken = measure.interleaved(calls, effort)
        peaks = {peer: measure.peak_memory(call, torch.device("cpu")) for peer, call in calls.items()}
    found = [step.finished({**named, "peer": p}, timing, peaks[p], taken["fp32"]) for p, timing in taken.items()]
    gain = {"speedup": taken["theirs"].over(taken["fastflat"]), "of_cap": taken["fp32"].over(taken["fastflat"])}
    found[-1] |= gain
    return found


def _step(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=step.RATE, momentum=step.MOMENTUM)

    def call() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(model).backward()
        optimizer.step()

    return call

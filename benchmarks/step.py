# SPDX-License-Identifier: Apache-2.0
"""A whole training step: a network with quantizers of one maker or another, or without any, eager or compiled, with
SGD or sharpness-aware minimisation."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastflat
from fastflat import QuantSpec

from . import devices, measure, networks, timers
from .devices import Device
from .measure import Effort
from .peers import first_line
from .peers.modules import QUANTIZERS
from .run import timed

#: A rate this small keeps every model where it began, however often it is timed.
RHO, RATE, MOMENTUM = 0.05, 1e-9, 0.9
MODES = ("eager", "compile")
#: "sam-loop": the popular implementation over torch's SGD. Both SAMs do two passes a step.
OPTIMIZERS = ("sgd", "sam-loop", "sam")
#: With SAM these alone: a step with SGD says what there is to say of the others.
_WITH_SAM = ("fp32", "eager", "fastflat")
#: Compiled, where each takes minutes to compile: the peers with SGD, then what one has without and with this package.
_COMPILED = {
    "sgd": ("fp32", "eager", "builtin", "fastflat", "fastflat-list"),
    "sam-loop": ("eager",),
    "sam": ("fastflat",),
}
#: Compiled forms of one model that dynamo keeps: more than there are variants.
_FORMS = 64


@dataclasses.dataclass(frozen=True)
class Network:
    """How to make a network of 10 classes, the shape of a sample, the layers that have no quantizers, and whether the
    others' inputs have a sign (behind ReLUs they have none)."""

    make: Callable[[], nn.Module]
    sample: tuple[int, ...]
    skip: tuple[str, ...]
    signed: bool = False


NETWORKS: dict[str, Network] = {
    "resnet18": Network(networks.SmallResNet18, (3, 32, 32), ("conv1", "fc")),
    "transformer": Network(lambda: networks.Transformer(width=256, heads=8, layers=6), (64, 256), ("fc",), signed=True),
}


@dataclasses.dataclass(frozen=True)
class TrainingCase:
    """One group of steps that take turns.

    Attributes:
        name: of the network in reports.
        network: how it is made.
        batch: samples in a step.
        bits: of weights (per channel) and of activations.
        mode: of :data:`MODES`; compiled are forward and backward passes, not the optimizer.
        optimizers: of :data:`OPTIMIZERS`.
    """

    name: str
    network: Network
    batch: int
    bits: int = 4
    mode: str = "eager"
    optimizers: tuple[str, ...] = ("sgd",)

    @property
    def label(self) -> str:
        return f"{self.name} {self.mode} {'+'.join(self.optimizers)} batch {self.batch}"

    def variants(self, peers: Sequence[str]) -> list[tuple[str, str]]:
        """Peers and optimizers: all peers with SGD; with SAM, and compiled, those that are worth the time."""
        if self.mode == "compile":
            return [(p, o) for o in self.optimizers for p in peers if p in _COMPILED[o]]
        return [(p, o) for o in self.optimizers for p in peers if o == "sgd" or p in _WITH_SAM]

    def data(self, place: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
        """Model, samples and classes, the same in every run."""
        state = torch.random.get_rng_state()
        try:
            torch.manual_seed(0)
            model = self.network.make()
        finally:
            torch.random.set_rng_state(state)
        generator = torch.Generator().manual_seed(0)
        x = torch.rand((self.batch, *self.network.sample), generator=generator)
        return model.to(place), x.to(place), torch.randint(10, (self.batch,), generator=generator).to(place)


def steps(
    case: TrainingCase, variants: Sequence[tuple[str, str]], place: torch.device
) -> tuple[dict[tuple[str, str], Callable[[], None]], dict[tuple[str, str], str]]:
    """A call that does one step for each peer and optimizer, with the same weights, data and order everywhere; and why
    some have none."""
    model, x, target = case.data(place)
    calls, missing = {}, {}
    forms = contextlib.nullcontext()
    if case.mode == "compile":
        torch._dynamo.reset()
        forms = torch._dynamo.config.patch(recompile_limit=_FORMS)
    for peer, optimizer in variants:
        try:
            own = _prepared(model, peer, case, x)
            call = _step(own, optimizer, case.mode, x, target)
            with forms:
                call()
        except Exception as error:  # whatever a peer raises is its own: the other rows must not be lost
            if peer.startswith("fastflat") and case.mode == "eager":
                raise
            missing[peer, optimizer] = f"{type(error).__name__}: {first_line(error)}"
            continue
        calls[peer, optimizer] = call
    return calls, missing


def _prepared(model: nn.Module, peer: str, case: TrainingCase, x: Tensor) -> nn.Module:
    model = copy.deepcopy(model).train()
    quantizer = QUANTIZERS[peer]
    if quantizer is None:
        return model
    weights = QuantSpec.lsq(bits=case.bits, axis=0)
    activations = QuantSpec.lsq(bits=case.bits, signed=case.network.signed)
    options = {"quantizer": quantizer, "fuse_weights": peer == "fastflat-list"}
    model = fastflat.prepare(model, weights=weights, activations=activations, skip=case.network.skip, **options)
    fastflat.calibrate(model, [x])
    return model.train()


def _step(model: nn.Module, optimizer: str, mode: str, x: Tensor, target: Tensor) -> Callable[[], None]:
    def loss() -> Tensor:
        return F.cross_entropy(forward(x), target)

    forward = model
    if mode == "compile":
        forward = torch.compile(model, dynamic=False)
    params = list(model.parameters())
    if optimizer == "sam":
        opt = fastflat.optim.SAM(params, base="sgd", lr=RATE, momentum=MOMENTUM, rho=RHO)
        first, second = opt.first_step, opt.second_step
    else:
        opt = torch.optim.SGD(params, lr=RATE, momentum=MOMENTUM)
        before: list[Tensor] = []
        first, second = (lambda: _ascend(params, before)), (lambda: _descend(params, before, opt))

    def step() -> None:
        opt.zero_grad(set_to_none=True)
        loss().backward()
        if optimizer == "sgd":
            opt.step()
            return
        first()
        opt.zero_grad(set_to_none=True)
        loss().backward()
        second()

    return step


@torch.no_grad()
def _ascend(params: list[Tensor], before: list[Tensor]) -> None:
    """The popular loop's first step: clone, perturb tensor by tensor."""
    given = [p for p in params if p.grad is not None]
    norm = torch.norm(torch.stack([p.grad.norm(p=2) for p in given]), p=2)
    scale = RHO / (norm + 1e-12)
    before[:] = [p.data.clone() for p in params]
    for p in given:
        p.add_(p.grad * scale)


@torch.no_grad()
def _descend(params: list[Tensor], before: list[Tensor], base: torch.optim.Optimizer) -> None:
    for p, kept in zip(params, before, strict=True):
        p.data = kept
    before.clear()
    base.step()


def rows(
    case: TrainingCase, peers: Sequence[str], threads: int, effort: Effort, device: torch.device | Device
) -> list[dict[str, Any]]:
    """One row per peer and optimizer: ``samples_per_second``; ``overhead``, the step's time over that of fp32 with the
    same optimizer in the same round less 1; ``of_identity``, that overhead in units of identity's; ``peak_bytes``. A
    variant that cannot be has its reason in ``unsupported``."""
    device = devices.of(device)
    named = {
        "family": "step", "device": device.name, "threads": threads, "network": case.name, "mode": case.mode,
        "batch": case.batch, "bits": case.bits,
    }  # fmt: skip
    variants = case.variants(peers)
    with device.active(), measure.host_threads(threads, device):
        calls, missing = steps(case, variants, device.place)
        timings = measure.interleaved(calls, effort, timer=timers.of(device, graphs=False))
        peaks = {key: measure.peak_memory(call, device) for key, call in calls.items()}
    found = []
    for peer, optimizer in variants:
        row = {**named, "peer": peer, "optimizer": optimizer}
        if (peer, optimizer) in missing:
            found.append({**row, "unsupported": missing[peer, optimizer]})
            continue
        timing = timings[peer, optimizer]
        base, identity = (timings.get((name, optimizer)) for name in ("fp32", "identity"))
        found.append(finished(row, timing, peaks[peer, optimizer], base, identity))
    return found


def finished(
    row: dict[str, Any], timing: measure.Timing, peak: int, base: measure.Timing | None,
    identity: measure.Timing | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A row that names its case, with the numbers of a step; ``base`` is that of fp32."""
    over = None if base is None or row["peer"] == "fp32" else timing.over(base) - 1
    share = None if over is None or identity is None else over / (identity.over(base) - 1)
    row = row | timed(timing) | {"samples_per_second": row["batch"] / timing.median, "peak_bytes": peak}
    return {**row, "overhead": over, "of_identity": share}

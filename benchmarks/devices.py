# SPDX-License-Identifier: Apache-2.0
"""The devices that a run measures, and what to ask of them; a GPU is asked through one module, which tests replace."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch

#: Where CUDA is asked for; a stand-in of the same shape drives the GPU's path on machines without one.
CUDA: Any = torch.cuda


class Lost(RuntimeError):
    """A device no longer answers; the text says which and what it said."""


@dataclasses.dataclass(frozen=True)
class Device:
    """One device.

    Attributes:
        name: ``cpu``, ``cuda:0``, ...
        place: where its tensors live.
        module: what has the interface of ``torch.cuda``; None for the CPU.
    """

    name: str
    place: torch.device
    module: Any = None

    @property
    def kind(self) -> str:
        return self.name.split(":")[0]

    def active(self) -> contextlib.AbstractContextManager:
        """The device as the current one inside the block."""
        return contextlib.nullcontext() if self.module is None else self.module.device(self.place)

    def synchronize(self) -> None:
        if self.module is not None:
            self.module.synchronize(self.place)

    def silence(self) -> str | None:
        """What the device says instead of answering; None where it answers."""
        try:
            self.synchronize()
        except Exception as error:  # of whatever class the driver's layer raises
            return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        return None


def of(device: torch.device | Device) -> Device:
    """A device of PyTorch's as one of ours."""
    if isinstance(device, Device):
        return device
    return Device(str(device), device, CUDA if device.type == "cuda" else None)


def find(text: str) -> list[Device]:
    """``cpu``, ``cuda``, ``cuda:1``, several with commas, or ``all``: every visible GPU, then the CPU.

    Raises:
        ValueError: a name of no device, or of one that PyTorch does not see.
    """
    found = []
    for name in (part.strip() for part in text.split(",")):
        if name == "all":
            found += [_gpu(index) for index in range(_count())]
            found.append(Device("cpu", torch.device("cpu")))
            continue
        try:
            device = torch.device(name)
        except RuntimeError:
            device = None
        if device is None or device.type not in ("cpu", "cuda"):
            raise ValueError(f"bench: --device must be cpu or cuda, cuda:1, ... or all, got {name!r}")
        if device.type == "cpu":
            found.append(Device("cpu", torch.device("cpu")))
            continue
        if (device.index or 0) >= _count():
            raise ValueError(f"bench: --device must be one that PyTorch sees, got {name!r} with {_count()} GPUs")
        found.append(_gpu(device.index or 0))
    return list({device.name: device for device in found}.values())


def _count() -> int:
    return CUDA.device_count() if CUDA.is_available() else 0


def _gpu(index: int) -> Device:
    name = f"cuda:{index}"
    place = getattr(CUDA, "place", torch.device)  # a stand-in's tensors live elsewhere
    return Device(name, place(name), CUDA)

# SPDX-License-Identifier: Apache-2.0
"""Who computes an op: ``reference`` | ``cpu`` | ``cuda`` | ``triton``, and why.

CPU tensors take ``cpu``, CUDA tensors ``cuda``, else ``triton``; where the fast part is missing a call works through
``reference`` with one warning, or raises under ``FASTFLAT_STRICT=1``.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch

from fastflat import _load, _ops
from fastflat.backends import reference, triton

BACKENDS = ("reference", "cpu", "cuda", "triton")
#: Preference by device type; any other device computes with ``reference``.
_ORDER = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}

#: In place of a backend's name: whichever the dispatcher takes.
_DISPATCHED = "dispatched"

_forced: str | None = None


class FallbackWarning(UserWarning):
    """A compiled part is missing and the reference computes in its place."""


def unavailable(name: str, device: str) -> str | None:
    """Why backend `name` cannot compute on tensors of `device`, or None when it can."""
    if name == "reference":
        return None
    if name == "triton":
        return triton.unavailable(device)
    if device != name:
        return f"backend {name!r} computes on {name} tensors only"
    part = _load.status()[name]
    if not part.loaded:
        return f"{part.reason}; {part.remedy}"
    if name == "cuda" and torch.cuda.is_available() and not _load.has_code_for(torch.cuda.get_device_capability()):
        built, found = _load.build_info().get("arches"), torch.cuda.get_device_capability()
        own = f"{found[0]}.{found[1]}"
        return (
            f"built for {', '.join(built)}, this GPU is {own}; build it with FASTFLAT_ARCHS={own} and a CUDA toolkit"
            " that knows it"
        )
    return None


def backends() -> dict[str, str]:
    """Every backend with ``"available"`` or the reason why it is not, for its own kind of tensor."""
    graphics = "cuda" if torch.cuda.is_available() else "cpu"
    device = {"reference": "cpu", "cpu": "cpu", "cuda": "cuda", "triton": graphics}
    return {name: unavailable(name, device[name]) or "available" for name in BACKENDS}


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Compute with one backend inside the ``with`` block; an op it cannot compute there raises.

    Holds for the process. Backward passes run on the backend that ran their forward.
    """
    if name not in BACKENDS:
        raise ValueError(f"fastflat.backend: name must be one of {', '.join(BACKENDS)}, got {name!r}")
    global _forced
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


@contextlib.contextmanager
def dispatched() -> Iterator[None]:
    """Compute every op through ``torch.ops.fastflat`` inside the ``with`` block, so that a trace shows it as one op."""
    global _forced
    previous, _forced = _forced, _DISPATCHED
    try:
        yield
    finally:
        _forced = previous


def dispatched_kernels() -> SimpleNamespace:
    """The raw ops, each of which computes by whatever the dispatcher takes."""
    return _kernels("", _DISPATCHED)


def forced_backend() -> str | None:
    """The backend that a ``with backend(...)`` block asks for, if any."""
    return _forced


def choose(op: str, device: str) -> tuple[str, str]:
    """The backend that computes `op` on tensors of `device`, and the reason in words."""
    _ops.OPS[op]  # an op that is not in the table is a KeyError
    name, reason = _choose(device, _forced)
    other = None if _forced == _DISPATCHED else _instead(op, name)
    return (name, reason) if other is None else (other, f"the {name} library has no kernel of it")


def kernels(device: str) -> SimpleNamespace:
    """The raw ops as callables for tensors of `device`, by the backend in force, one attribute each."""
    return _kernels(device, _forced)


@functools.cache
def _choose(device: str, forced: str | None) -> tuple[str, str]:
    if forced is not None:
        reason = unavailable(forced, device)
        if reason:
            raise RuntimeError(f"fastflat: backend {forced!r} cannot compute on {device} tensors: {reason}")
        return forced, "asked for by fastflat.backend()"
    missing = []
    for name in _ORDER.get(device, ()):
        reason = unavailable(name, device)
        if reason is None:
            return name, "; ".join(missing) or f"first choice for {device} tensors"
        missing.append(f"no {name}: {reason}")
    if not missing:
        return "reference", f"no compiled kernels exist for {device} tensors"
    message = f"fastflat: {device} tensors are computed by the slow reference ({'; '.join(missing)})"
    if os.environ.get("FASTFLAT_STRICT") == "1":
        raise RuntimeError(message + "; FASTFLAT_STRICT=1 forbids it")
    warnings.warn(message, FallbackWarning, stacklevel=2)
    return "reference", "; ".join(missing)


@functools.cache
def _kernels(device: str, forced: str | None) -> SimpleNamespace:
    name = forced if forced == _DISPATCHED else _choose(device, forced)[0]
    return SimpleNamespace(backend=name, **{op: _callable(op, name, forced is not None) for op in _ops.OPS})


def _instead(op: str, name: str) -> str | None:
    """The backend that computes an op of which the library `name` has no kernel; None where it has one."""
    if name not in ("cpu", "cuda") or _ops.has_kernel(op, name):
        return None
    return "triton" if name == "cuda" and triton.unavailable("cuda") is None else "reference"


def _callable(op: str, name: str, forced: bool) -> Callable:
    other = None if name == _DISPATCHED else _instead(op, name)
    if other is not None and (forced or other == "reference"):
        return functools.partial(_without, op, name, forced)
    modules = {"reference": reference, "triton": triton}
    return getattr(modules[other or name], op) if (other or name) in modules else _ops.callable_of(op)


#: Ops whose fallback was announced.
_announced: set[str] = set()


def _without(op: str, name: str, forced: bool, *args):
    """An op of which the library at hand has no kernel, by the reference, which is announced once."""
    message = f"fastflat: the {name} library has no kernel of {op}"
    if forced:
        raise RuntimeError(f"{message}; leave the choice to fastflat or take the reference")
    message += ": it is computed by the slow reference; pip install triton"
    if os.environ.get("FASTFLAT_STRICT") == "1":
        raise RuntimeError(f"{message}; FASTFLAT_STRICT=1 forbids it")
    if op not in _announced:
        _announced.add(op)
        warnings.warn(message, FallbackWarning, stacklevel=2)
    return getattr(reference, op)(*args)


def _register_fallbacks() -> None:
    """The reference under every raw op, so that torch.ops.fastflat works on any device and in any build."""
    for op in _ops.OPS:
        _ops.implement(op, getattr(reference, op), "CompositeExplicitAutograd")


_register_fallbacks()
_load.status()  # torch.ops.fastflat must mean the compiled kernels from the first call on

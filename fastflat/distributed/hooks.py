# SPDX-License-Identifier: Apache-2.0
"""Communication hooks of ``DistributedDataParallel``."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fastflat._ops import compute_dtype
from fastflat.distributed.compression import Compression

__all__ = ["CompressedAllReduce", "compress_gradients", "powersgd"]


def require_group(caller: str) -> None:
    """One clear line where no process group was made."""
    if not dist.is_available():
        raise RuntimeError(f"fastflat.distributed.{caller}: torch must have torch.distributed, got a build without it")
    if not dist.is_initialized():
        raise RuntimeError(
            f"fastflat.distributed.{caller}: a process group must be initialised, got none; start with torchrun and"
            " call torch.distributed.init_process_group()"
        )


class CompressedAllReduce:
    """The mean of all workers' gradients from what each sent of its own; made by :func:`compress_gradients`.

    For each bucket of DDP a worker adds its residual, sends codes and units (or values and indices) in one
    ``all_gather``, and sums up what came, in the order of ranks, so that all hold the same bits. Residuals belong to
    parameters and move with them when DDP orders its buckets anew.

    Under a loss scaler that changes its scale call :meth:`rescale` with the ratio, as residuals are in its units. A
    bucket of codes that is not finite leaves its residual as it was.

    Attributes:
        compression: how gradients are sent.
        steps: backward passes so far.
        bytes_sent: by this worker, and ``bytes_full``: what it would have sent as they are.
    """

    def __init__(
        self,
        model: DistributedDataParallel,
        compression: Compression,
        process_group: dist.ProcessGroup | None = None,
        warm_up: int = 0,
        seed: int = 0,
    ) -> None:
        self.compression, self.warm_up = compression, warm_up
        self.steps = self.bytes_sent = self.bytes_full = 0
        self._group = process_group or model.process_group
        self._names = {p: name for name, p in model.module.named_parameters()}
        self._flat: dict[tuple[str, ...], Tensor] = {}
        self._residual: dict[str, Tensor] = {}
        self._draws = torch.tensor([seed + (dist.get_rank(self._group) << 32), 0])

    def reduce(self, bucket):
        """The hook: a future of the bucket's mean gradient."""
        flat, world = bucket.buffer(), dist.get_world_size(self._group)
        compressing = self.steps >= self.warm_up
        self.bytes_full += flat.nbytes
        self.steps += bucket.is_last()
        if not compressing:
            self.bytes_sent += flat.nbytes
            work = dist.all_reduce(flat.div_(world), group=self._group, async_op=True)
            return work.get_future().then(lambda done: done.value()[0])
        self._draws = self._draws.to(flat.device)
        self._draws[1] += 1
        error = self._error(bucket.parameters(), flat) if self.compression.feedback else None
        sent = self.compression.encode(flat, error, self._draws)
        payload = self.compression.pack(sent)
        self.bytes_sent += payload.nbytes
        gathered = payload.new_empty(world * payload.numel())
        work = _gather()(gathered, payload, group=self._group, async_op=True)

        def mean(done):
            all_sent = self.compression.unpack(sent, gathered.view(world, -1))
            return self.compression.decode(all_sent, flat, factor=1 / world)

        return work.get_future().then(mean)

    def _error(self, params: list[Tensor], flat: Tensor) -> Tensor:
        """The residual of a bucket: its own, or put together anew from those of its parameters."""
        key = tuple(self._names[p] for p in params)
        found = self._flat.get(key)
        if found is not None:
            return found
        sizes = [p.numel() for p in params]
        if sum(sizes) != flat.numel():
            raise RuntimeError(
                f"fastflat.distributed: a bucket must hold the gradients of its parameters, {sum(sizes)} numbers, got"
                f" {flat.numel()}"
            )
        error = torch.zeros_like(flat, dtype=compute_dtype(flat.dtype))
        for name, part in zip(key, error.split(sizes), strict=True):
            if name in self._residual:
                part.copy_(self._residual[name])
            self._residual[name] = part
        self._flat = {k: v for k, v in self._flat.items() if not set(k) & set(key)}
        self._flat[key] = error
        return error

    def rescale(self, factor: float) -> None:
        """Residuals in units of a loss scale that is `factor` times the one before."""
        for error in self._residual.values():
            error.mul_(factor)

    def residual(self, name: str) -> Tensor | None:
        """What is left over of a parameter's gradients, flat; None before the first compressed step."""
        return self._residual.get(name)

    def state_dict(self) -> dict[str, Any]:
        """What continues a stopped run, plain values and tensors; each rank has its own."""
        return {
            "compression": dataclasses.asdict(self.compression),
            "steps": self.steps,
            "bytes": [self.bytes_sent, self.bytes_full],
            "draws": self._draws.clone(),
            "residual": {name: error.clone() for name, error in self._residual.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The counterpart.

        Raises:
            ValueError: it is of another compression, or of a model with other parameters; nothing is changed then.
        """
        if state["compression"] != dataclasses.asdict(self.compression):
            raise ValueError(
                f"fastflat.distributed: state must be of {self.compression}, got one of {state['compression']}"
            )
        sizes = {name: p.numel() for p, name in self._names.items()}
        for name, error in state["residual"].items():
            if sizes.get(name) != error.numel():
                want = f"{sizes[name]} numbers" if name in sizes else "a parameter of the model"
                raise ValueError(f"fastflat.distributed: residual {name!r} must be {want}, got {error.numel()} numbers")
        self.steps, self._draws = state["steps"], state["draws"].clone()
        self.bytes_sent, self.bytes_full = state["bytes"]
        self._flat, self._residual = {}, {name: error.clone() for name, error in state["residual"].items()}


def compress_gradients(
    model: DistributedDataParallel,
    method: str | Compression = "sign",
    *,
    warm_up: int = 0,
    seed: int = 0,
    process_group: dist.ProcessGroup | None = None,
    **options: Any,
) -> CompressedAllReduce:
    """Gradients of a data-parallel model travel compressed from now on.

    Args:
        model: ``DistributedDataParallel``, without another hook.
        method: of :class:`Compression`, or one with its options.
        warm_up: backward passes that send gradients as they are: the first ones are the largest.
        seed: of the draws, the same on all ranks, which draw independently.
        process_group: default that of the model.
        **options: of :class:`Compression`.

    Returns:
        The state of the hook: bytes sent, residuals, ``state_dict``.

    Raises:
        RuntimeError: no process group, or the model has a hook.
        TypeError, ValueError: not a ``DistributedDataParallel``, or an option that does not fit.
    """
    _require_ddp("compress_gradients", model)
    if isinstance(warm_up, bool) or not isinstance(warm_up, int) or warm_up < 0:
        raise ValueError(f"fastflat.distributed.compress_gradients: warm_up must be an int from 0 on, got {warm_up!r}")
    if isinstance(method, Compression) and options:
        raise ValueError(
            f"fastflat.distributed.compress_gradients: options must be those of the Compression, got {sorted(options)}"
        )
    compression = method if isinstance(method, Compression) else Compression(method, **options)
    state = CompressedAllReduce(model, compression, process_group, warm_up, seed)
    model.register_comm_hook(state, CompressedAllReduce.reduce)
    return state


def powersgd(
    model: DistributedDataParallel, rank: int = 1, *, start: int = 1000, process_group: Any = None, **options: Any
) -> Any:
    """Gradients as matrices of low rank with error feedback, by the hook that torch has (Vogels et al. 2019,
    arXiv 1905.13727).

    Args:
        model: ``DistributedDataParallel``, without another hook.
        rank: of each matrix, 1 or more.
        start: backward passes that send gradients as they are, 2 or more: DDP orders its buckets after the first.
        process_group: default that of the model.
        **options: of ``torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook.PowerSGDState``.

    Returns:
        The ``PowerSGDState``, which pickles.

    Raises:
        RuntimeError, TypeError, ValueError: as :func:`compress_gradients`.
    """
    _require_ddp("powersgd", model)
    for name, value, least in (("rank", rank, 1), ("start", start, 2)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"fastflat.distributed.powersgd: {name} must be an int from {least} on, got {value!r}")
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

    state = powerSGD_hook.PowerSGDState(
        process_group or model.process_group,
        matrix_approximation_rank=rank,
        start_powerSGD_iter=start,
        **options,
    )
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    return state


def _gather():
    """The collective that gathers into one tensor, by the name that this torch has for it."""
    return getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def _require_ddp(caller: str, model: object) -> None:
    require_group(caller)
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(
            f"fastflat.distributed.{caller}: model must be a DistributedDataParallel, got {type(model).__name__}"
        )

# SPDX-License-Identifier: Apache-2.0
"""Scales from data: :func:`calibrate`."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import distributed, nn

from fastflat import _checks
from fastflat.quant._histogram import Histogram
from fastflat.quant._initial import Statistics, method_for
from fastflat.quant._layer import QuantLayer
from fastflat.quant.prepare import quantizers
from fastflat.quant.quantizer import Quantizer

#: Share of negative inputs above which an unsigned grid, which maps them to 0, is worth a warning.
_NEGATIVE = 0.01


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    method: str | None = None,
    q: float | None = None,
    again: bool = False,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> nn.Module:
    """Give the quantizers that have no scale one, from the data that reach them.

    The batches run through the model in the mode it is in, without gradients, with those quantizers passing their
    input on unquantized. The model's buffers (running statistics) and the random state are afterwards as before.
    Where ``torch.distributed`` is initialised, all ranks must call this; their statistics are combined, so that every
    rank gets the same scales. If anything goes wrong on any rank, every rank raises and no quantizer has changed.

    Args:
        model: a prepared model.
        batches: inputs for ``model(input)``; of tuples and lists the first element is taken, ``(inputs, targets)``.
        method: ``"lsq"``, ``"absmax"``, ``"minmax"``, ``"moving"``, ``"percentile"`` or ``"mse"``
            (:data:`fastflat.quant.METHODS`); by default what the spec's estimator starts from.
        q: the percentile of ``"percentile"``, above 50 and up to 100; 99.99 by default.
        again: include input quantizers that have a scale already.
        forward: ``forward(model, batch)`` runs one batch, for models with another calling convention.

    Returns:
        The model.

    Raises:
        ValueError: no batch came, no quantizer waits for a scale, or some scale would be zero, NaN or infinite.

    ``"percentile"`` and ``"mse"`` see the data through a histogram of 65,536 bins for a scale (fewer from 64 scales on,
    32 MiB in all), which batches and ranks fill without loss; a percentile is known to a bin, 6e-5 of ``max|x|`` at
    worst. ``"mse"`` sums over 8,192 bins (1,024 from 64 scales on) as if the data were spread evenly inside each; sums
    of errors are rounded, so that another device may choose another scale where two are equally good.

    Sources: Esser et al., ICLR 2020, section 2.1 (``lsq``, 2 mean|x| / sqrt(qmax)); Wu et al., 2020, arXiv:2004.09602
    (percentile); Sung et al., 2015, arXiv:1511.06488 (least mean squared error).
    """
    of_inputs = {id(each) for each in _of_inputs(model)} if again else set()
    waiting = {n: each for n, each in quantizers(model) if not each.calibrated or id(each) in of_inputs}
    if not waiting:
        hint = "; again=True takes new scales for the inputs"
        _checks.fail("calibrate", "model", "have a quantizer without a scale", "none", hint)
    statistics = {name: Statistics(each.spec, method_for(each.spec, method, q), q) for name, each in waiting.items()}
    error, scales = None, {}
    try:
        with _undisturbed(model), _observed(waiting, statistics), torch.no_grad():
            _run(model, batches, forward or _call)
        for name, s in statistics.items():
            s.check_finite(name)
    except Exception as failure:
        error = failure
    _agree(model, error)
    try:
        for name, s in statistics.items():
            _combine(s, waiting[name])
            scales[name] = s.result(name)
    except ValueError as failure:
        error = failure
    _agree(model, error)
    for name, each in waiting.items():
        _warn_if_negative(name, statistics[name])
        each.set_scale(*scales[name])
    return model


def _of_inputs(model: nn.Module) -> Iterator[Quantizer]:
    for module in model.modules():
        if isinstance(module, QuantLayer):
            yield from module.input_quantizers().values()


def _call(model: nn.Module, batch: Any) -> Any:
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


def _run(model: nn.Module, batches: Iterable[Any], forward: Callable) -> None:
    count = 0
    for batch in batches:
        forward(model, batch)
        count += 1
    if not count:
        raise ValueError("fastflat::calibrate: batches must hold at least one batch, got none")


@contextlib.contextmanager
def _observed(waiting: dict[str, Quantizer], statistics: dict[str, Statistics]) -> Iterator[None]:
    """The quantizers pass their input on and report it to their statistics."""
    enabled = {name: q.enabled for name, q in waiting.items()}
    handles = []
    try:
        for name, q in waiting.items():
            observe = statistics[name].update
            handles.append(q.register_forward_pre_hook(lambda _, args, observe=observe: observe(args[0].detach())))
            q.enabled = False
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, q in waiting.items():
            q.enabled = enabled[name]


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Buffers and random state are as before on leaving."""
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for name, b in model.named_buffers():
                if name in buffers:
                    b.copy_(buffers[name])


def _distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _agree(model: nn.Module, error: Exception | None) -> None:
    """Raise on every rank if any rank has an error, before a collective call could wait for it for ever."""
    if _distributed():
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        failed = torch.tensor(int(error is not None), device=device)
        distributed.all_reduce(failed)
        if error is None and int(failed):
            raise RuntimeError("fastflat::calibrate: another rank failed, see its message; no scale was changed")
    if error is not None:
        raise error


def _combine(s: Statistics, q: Quantizer) -> None:
    """Add up the statistics of all ranks; a rank whose data never reached the quantizer counts nothing."""
    if not _distributed():
        return
    device, shape = q.scale.device, (q.scale.numel(),)
    seen = s.sums is not None
    ranks = torch.tensor(float(seen), device=device, dtype=torch.float64)
    distributed.all_reduce(ranks)
    if not float(ranks):
        return
    if not seen:
        s.shape = tuple(q.scale.shape)
        s.sums = torch.zeros(3, *shape, device=device, dtype=torch.float64)
        s.low = torch.full(shape, 0.0 if s.method == "moving" else float("inf"), device=device, dtype=torch.float64)
        s.high = -s.low
    if s.keeps:
        if s.histogram is None:
            s.histogram = Histogram(q.scale.numel(), device)
        largest = distributed.ReduceOp.MAX
        s.histogram.combine(lambda t: distributed.all_reduce(t, op=largest), distributed.all_reduce)
    distributed.all_reduce(s.sums)
    if s.method == "moving":
        for average in (s.low, s.high):
            distributed.all_reduce(average)
            average /= ranks
    else:
        distributed.all_reduce(s.low, op=distributed.ReduceOp.MIN)
        distributed.all_reduce(s.high, op=distributed.ReduceOp.MAX)


def _warn_if_negative(name: str, s: Statistics) -> None:
    share = s.negative_share
    if s.spec.symmetric and not s.spec.signed and share > _NEGATIVE:
        warnings.warn(
            f"fastflat::calibrate: {share:.0%} of the values at {name} are negative and become 0 on its unsigned grid;"
            " use signed=True there or skip the layer",
            stacklevel=3,
        )

# SPDX-License-Identifier: Apache-2.0
"""Replaces the quantizers of other libraries in a model, and puts them back."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator

import torch
from torch import nn

from fastflat import _checks
from fastflat.integrations import _probe
from fastflat.integrations._adapter import Adapter, registered
from fastflat.integrations._swap import swap, swap_back, swapped_by


@dataclasses.dataclass(frozen=True)
class Entry:
    """One module of a report.

    Attributes:
        names: where it sits; several for a module that is shared.
        kind: its class.
        swapped: whether fastflat computes it now.
        why: the adapter that does, or the reason why it was left alone.
    """

    names: tuple[str, ...]
    kind: str
    swapped: bool
    why: str


@dataclasses.dataclass(frozen=True)
class Report:
    """What :func:`accelerate` did. As a string, a table with a line for each module."""

    entries: tuple[Entry, ...]

    @property
    def swapped(self) -> tuple[Entry, ...]:
        return tuple(e for e in self.entries if e.swapped)

    @property
    def left(self) -> tuple[Entry, ...]:
        """The quantizers that were left alone."""
        return tuple(e for e in self.entries if not e.swapped)

    def __str__(self) -> str:
        head = f"{len(self.swapped)} quantizers swapped, {len(self.left)} left alone"
        rows = [(", ".join(e.names), e.kind, "swapped: " if e.swapped else "left: ", e.why) for e in self.entries]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
        return "\n".join([head, *(f"  {a:{widths[0]}}  {b:{widths[1]}}  {c}{d}" for a, b, c, d in rows)])


def accelerate(model: nn.Module, *, strict: bool = False) -> Report:
    """Have fastflat compute the quantizers of other libraries, in place.

    Recognised are those of ``torch.ao.quantization``, torchao, Brevitas and Model-Optimizer, plain LSQ, LSQ+, PACT,
    DoReFa and EWGS modules, and what :func:`fastflat.integrations.register` was told. The modules stay where and what
    they are: parameters, buffers, hooks, names in the ``state_dict``, training mode, references to them. Only how their
    forward is computed changes; results in fp32 keep every bit, and gradients those of the input (a gradient of a
    scale is the same sum in another order).

    Each adapter is checked on probe batches first; one whose results, gradients or state differ is refused. All checks
    are made before the first module is swapped.

    Args:
        model: with the quantizers; not yet compiled. Modules inside DistributedDataParallel are found, too.
        strict: raise where a quantizer would be left alone.

    Returns:
        What was swapped, what was left alone, and why. :func:`restore` undoes it.

    Raises:
        TypeError: the model is no ``nn.Module``.
        ValueError: it is compiled, or with ``strict`` a quantizer cannot be swapped; nothing has changed then.
    """
    _checked("accelerate", model)
    entries, swaps = [], []
    for names, module in _named_once(model):
        adapters = [a for a in registered() if a.applies(module)]
        if swapped_by(module) is not None:
            entries.append(Entry(names, type(module).__name__, True, swapped_by(module).name))
        elif adapters:
            # Classes of one name differ from project to project: the first adapter that computes the same is it.
            reasons = []
            for adapter in adapters:
                reasons.append(_refusal(module, adapter))
                if reasons[-1] is None:
                    swaps.append((module, adapter))
                    break
            fits = reasons[-1] is None
            entries.append(Entry(names, type(module).__name__, fits, adapter.name if fits else reasons[0]))
        elif _unknown(module):
            entries.append(Entry(names, type(module).__name__, False, "no adapter knows it"))
    report = Report(tuple(entries))
    if strict and report.left:
        e = report.left[0]
        more = f" (and {len(report.left) - 1} more)" if len(report.left) > 1 else ""
        where = f"{e.names[0] or 'the model'} ({e.kind})"
        raise ValueError(f"fastflat::accelerate: strict=True, but {where} cannot be swapped: {e.why}{more}")
    for module, adapter in swaps:
        swap(module, adapter)
    return report


def restore_model(model: nn.Module) -> int:
    """Put the modules' own forward back, with the state that they have now; how many had been swapped."""
    return sum(swap_back(module) for module in model.modules())


def _checked(name: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        _checks.fail(name, "model", "be a torch.nn.Module", type(model))
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # without it nothing is compiled
    for where, module in model.named_modules():
        if dynamo and (isinstance(module, dynamo.OptimizedModule) or module._compiled_call_impl is not None):
            label = where or "it"
            _checks.fail(name, "model", "not be compiled yet", f"{label} compiled", "; accelerate, then torch.compile")


def _named_once(model: nn.Module) -> Iterator[tuple[tuple[str, ...], nn.Module]]:
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    for module in model.modules():
        yield tuple(names[id(module)]), module


def _refusal(module: nn.Module, adapter: Adapter) -> str | None:
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a TorchScript module, whose forward is fixed"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    return adapter.reason(module) or _probe.difference(module, adapter)


def _unknown(module: nn.Module) -> bool:
    """Whether a module looks like a quantizer by itself, of a kind that no adapter knows."""
    name = type(module).__name__.lower()
    looks = "quantiz" in name or "fakequant" in name or "fake_quant" in name
    ours = type(module).__module__.split(".")[0] == "fastflat"
    return looks and not ours and next(module.children(), None) is None

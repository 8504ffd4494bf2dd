# SPDX-License-Identifier: Apache-2.0
"""Sharpness-aware optimizers of others, computed by :class:`fastflat.optim.SAM`.

Meant are the class ``SAM(params, base_optimizer, rho, adaptive)`` that projects copy into their trees, and that of
pytorch_optimizer: a ``base_optimizer``, groups with ``rho`` and ``adaptive``, ``first_step`` and ``second_step``.
"""

from __future__ import annotations

import collections
import functools
import weakref
from typing import Any

import torch
from torch.optim import Optimizer

from fastflat import _checks
from fastflat.integrations._accelerate import Entry, Report
from fastflat.integrations._probe import line_of
from fastflat.optim import SAM
from fastflat.optim._rules import BASES, TORCH_BASES

#: What the popular implementation adds to the norm.
_NORM_EPS = 1e-12

#: Two ways to sum the squares of some thousand gradients agree to this.
_CLOSE = {"rtol": 2e-5, "atol": 1e-6}


def accelerate_optimizer(optimizer: Optimizer, *, strict: bool = False) -> Report:
    """Have fastflat compute the passes of another's sharpness-aware optimizer, in place.

    The object stays what and where it is: ``param_groups``, ``base_optimizer`` and its state, hooks and schedulers,
    ``step(closure)`` with its own convention. ``first_step`` and ``second_step`` run on fastflat's kernels; the base's
    step, too, where it is plain ``torch.optim.SGD``, ``Adam`` or ``AdamW`` on fp32 or fp64 parameters. The sum of
    squares under the norm has another order, so that results agree to rounding; weights come back bit for bit, in
    their own memory, and no ``old_p`` is kept in the state. States of SGD get a count, ``"step"``.

    Both are run on small parameters first; an optimizer that steps elsewhere (another norm, another metric) is left
    alone.

    Args:
        optimizer: the copied ``SAM``, or that of pytorch_optimizer.
        strict: raise where it would be left alone.

    Returns:
        A report of one entry. :func:`fastflat.restore` undoes it.

    Raises:
        TypeError: it is no ``torch.optim.Optimizer``.
        ValueError: with ``strict``, it cannot be swapped; nothing has changed then.
    """
    if not isinstance(optimizer, Optimizer):
        _checks.fail("accelerate_optimizer", "optimizer", "be a torch.optim.Optimizer", type(optimizer))
    kind = type(optimizer).__name__
    if is_accelerated(optimizer):
        return Report((Entry(("optimizer",), kind, True, "fastflat.optim.SAM"),))
    reason = _reason(optimizer) or _difference(optimizer)
    if reason and strict:
        raise ValueError(f"fastflat::accelerate_optimizer: strict=True, but {kind} cannot be swapped: {reason}")
    if reason is None:
        optimizer.__class__ = _accelerated(type(optimizer))
    return Report((Entry(("optimizer",), kind, reason is None, reason or "fastflat.optim.SAM"),))


def is_accelerated(optimizer: Optimizer) -> bool:
    return hasattr(type(optimizer), "_fastflat_optimizer")


def restore_optimizer(optimizer: Optimizer) -> int:
    """Put the optimizer's own passes back; 1 if they had been swapped."""
    if not is_accelerated(optimizer):
        return 0
    engine = _ENGINES.pop(optimizer, None)
    if engine is not None:
        engine.sam.restore()
        engine.release()
    optimizer.__class__ = type(optimizer)._fastflat_optimizer
    return 1


@functools.cache
def _accelerated(base: type) -> type:
    """The subclass of an optimizer's class with our passes."""

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        _engine(self).sam.first_step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        _engine(self).second_step()
        if zero_grad:
            self.zero_grad()

    own = {
        "first_step": first_step,
        "second_step": second_step,
        "_fastflat_optimizer": base,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return type(base)(base.__name__, (base,), own)


# The engine ----------------------------------------------------------------------------------------------------------


class _Engine:
    """fastflat's SAM over the groups and states of another optimizer, which stays their owner."""

    def __init__(self, optimizer: Optimizer):
        base = optimizer.base_optimizer
        self.groups = list(base.param_groups)
        self.base = weakref.ref(base)
        rule = _rule(base)
        params = [{"params": list(group["params"])} for group in self.groups]
        self.fused = rule is not None
        eps = getattr(optimizer, "perturb_eps", _NORM_EPS)
        self.sam = SAM(params, rule or (lambda *_, **__: base), norm_eps=eps)
        self.sam.adopt([self._complete(group, rule) for group in self.groups], base.state)
        self.sizes = [len(group["params"]) for group in self.groups]

    def _complete(self, group: dict[str, Any], rule: str | None) -> Any:
        """A group with the options that only fastflat knows beside those of its owner, which it follows."""
        others = {**self.sam.defaults, "eta": 0.0}
        if rule is not None:
            others["decoupled"] = rule == "adamw" or bool(group.get("decoupled_weight_decay", False))
        return collections.ChainMap(group, others)

    def fits(self, optimizer: Optimizer) -> bool:
        """Whether groups, states and base are still the ones that it was made for."""
        base = optimizer.base_optimizer
        same = len(self.groups) == len(base.param_groups) and base is self.base() and self.sam.state is base.state
        return (
            same
            and all(
                a is b and n == len(b["params"])
                for a, b, n in zip(self.groups, base.param_groups, self.sizes, strict=True)
            )
            and self.fused == (_rule(base) is not None)
        )

    def second_step(self) -> None:
        self.sam.second_step()
        self.base()._opt_called = True  # what learning-rate schedulers look for

    def release(self) -> None:
        """The counts of steps as torch.optim keeps them, one tensor each."""
        for state in self.sam.state.values() if self.fused else ():
            if "step" in state:
                state["step"] = state["step"].to(torch.float32, copy=True)


_ENGINES: weakref.WeakKeyDictionary[Optimizer, _Engine] = weakref.WeakKeyDictionary()


def _engine(optimizer: Optimizer) -> _Engine:
    engine = _ENGINES.get(optimizer)
    if engine is None or not (engine.sam.is_perturbed or engine.fits(optimizer)):
        engine = _ENGINES[optimizer] = _Engine(optimizer)
    return engine


def _rule(base: Optimizer) -> str | None:
    """The fused base that takes the place of this one's step, if one does."""
    name = TORCH_BASES.get(type(base))
    if name is None or base._optimizer_step_pre_hooks or base._optimizer_step_post_hooks:
        return None
    usual = {"params", "rho", "adaptive", "foreach", "fused", "capturable", "differentiable", "initial_lr"}
    usual |= {"decoupled_weight_decay", "swa_lr", "name", "step"}
    known = set(BASES[name].defaults) | usual
    for group in base.param_groups:
        if group.get("differentiable") or group.get("capturable") or set(group) - known:
            return None
        if any(p.dtype not in (torch.float32, torch.float64) for p in group["params"]):
            return None
    return name


# Recognised ----------------------------------------------------------------------------------------------------------


def _reason(optimizer: Optimizer) -> str | None:
    base = getattr(optimizer, "base_optimizer", None)
    if not isinstance(base, Optimizer):
        return "it has no base_optimizer"
    if not all(callable(getattr(type(optimizer), name, None)) for name in ("first_step", "second_step")):
        return "it has no first_step and second_step"
    if any(name in vars(optimizer) for name in ("first_step", "second_step")):
        return "its passes were replaced on the instance"
    if not all("rho" in group for group in base.param_groups):
        return "its groups have no rho"
    if getattr(optimizer, "use_gc", False):
        return "it centralises gradients (use_gc=True)"
    devices = {p.device for group in base.param_groups for p in group["params"]}
    return None if len(devices) == 1 else "its parameters are on several devices"


def _difference(optimizer: Optimizer) -> str | None:
    """In what three steps on small parameters differ; None if in nothing."""
    theirs, ours = _twin(optimizer), _twin(optimizer)
    ours.__class__ = _accelerated(type(ours))
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        for name in ("first_step", "second_step"):
            for twin in (theirs, ours):
                generator.manual_seed(2 * step + (name == "second_step"))
                for p in _params(twin):
                    p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
                try:
                    getattr(twin, name)(zero_grad=True)
                except Exception as error:
                    whose = "its own" if twin is theirs else "our"
                    return f"{whose} {name} raised {line_of(error)}"
            for a, b in zip(_params(theirs), _params(ours), strict=True):
                if not torch.allclose(a.float(), b.float(), **_CLOSE):
                    return f"{name} of step {step + 1} leads elsewhere"
    return None


def _params(optimizer: Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _twin(optimizer: Optimizer) -> Optimizer:
    """The same optimizer over a few small fp32 parameters, without its hooks."""
    base = optimizer.base_optimizer
    generator = torch.Generator().manual_seed(1)
    groups = []
    for group in base.param_groups:
        device = group["params"][0].device if group["params"] else "cpu"
        small = [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in ((5, 3), (7,))]
        lr = group.get("lr")
        groups.append({**group, "params": small, "lr": lr.clone() if isinstance(lr, torch.Tensor) else lr})
    twin_base = _bare(base, groups, collections.defaultdict(dict))
    shared = optimizer.state is base.state
    twin = _bare(optimizer, groups, twin_base.state if shared else collections.defaultdict(dict))
    twin.base_optimizer = twin_base
    return twin


def _bare(optimizer: Optimizer, groups: list, state: dict) -> Optimizer:
    twin = object.__new__(type(optimizer))
    hooks = {name: type(value)() for name, value in vars(optimizer).items() if name.startswith("_optimizer_")}
    kept = {name: value for name, value in vars(optimizer).items() if name not in ("step", "zero_grad")}
    vars(twin).update({**kept, **hooks, "param_groups": groups, "state": state})
    return twin

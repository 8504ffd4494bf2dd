# SPDX-License-Identifier: Apache-2.0
"""Sharpness-aware minimisation over the fused base optimizers, or any of torch's."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastflat.optim import _tensors
from fastflat.optim._ascent import STORAGES
from fastflat.optim._passes import Randomness, buffers_kept
from fastflat.optim._perturbing import MASTER, PerturbingOptimizer
from fastflat.optim._rules import FOREIGN, Rule, base_of


class SAM(PerturbingOptimizer):
    """Sharpness-aware minimisation: a step along the gradient that is taken at ``w + e``, the worst place within
    ``rho`` to first order.

    ====================  =====================================================
    ``e`` (l2)            ``rho g / (|g| + norm_eps)``
    ``e`` (adaptive)      ``rho t^2 g / (|t g| + norm_eps)``, ``t = |w| + eta``
    ``e`` (linf)          ``rho sign(g)``
    ====================  =====================================================

    The norm is taken over all perturbed parameters. A gradient of zero, or with an infinity or NaN, perturbs nothing.
    Loss scaling does not change e. Weights come back bit for bit: at :meth:`second_step`, :meth:`restore`, after an
    exception in ``step(closure)`` or :meth:`perturbed`, in a step that :class:`torch.amp.GradScaler` skips, and where a
    parameter has no second gradient.

    Three ways to use it::

        opt.step(closure)                                     # closure: zero_grad, loss, backward; it runs twice

        loss_fn(model(x), y).backward(); opt.first_step(zero_grad=True)
        loss_fn(model(x), y).backward(); opt.second_step(zero_grad=True)

        scaler.scale(loss()).backward(); opt.first_step(zero_grad=True)
        scaler.scale(loss()).backward(); scaler.step(opt); scaler.update()

    Args:
        params: parameters or groups, as torch.optim takes them, or a model. A group may have its own ``rho``,
            ``adaptive`` and ``eta``; with ``rho=0`` it is neither perturbed nor part of the norm. Groups named
            ``"scales"`` (:func:`fastflat.param_groups`) have ``rho=0`` unless they say otherwise.
        base: ``"sgd"``, ``"adam"``, ``"adamw"``, ``"padam"``, ``"lars"``, ``"lamb"``, or a class of torch.optim;
            SGD, Adam and AdamW of torch take the fused step too, unless ``fused=False``. Others run as they are.
        rho: radius, at least 0; may be changed in the groups at any time.
        adaptive: ASAM. Published radii differ by the form: 0.5 with ``eta=0.01`` and weights alone (Kwon et al.), 2.0
            with ``eta=0`` and all parameters.
        metric: ``"l2"`` or ``"linf"``.
        norm_eps: added to the norm; 1e-12 gives the numbers of the popular implementation.
        storage: where the weights are kept during the second pass. ``"backup"``: one more copy. ``"swap"``: parameters
            point to other memory meanwhile, ten per cent less traffic. ``"master"``: parameters in 16 bits have an
            fp32 master in the state, which is the backup; others are as with ``"backup"``.
        rounding: of parameters in bfloat16 without a master: ``"nearest"`` or ``"stochastic"``. To nearest, most of a
            small perturbation is lost; the first step says how much.
        model: its buffers stay as the first pass left them, in ``step(closure)`` and :meth:`second_pass`.
        replay: whether the second pass of those two sees the random numbers of the first: dropout, noisy quantizers.
        process_group: ranks that stop together on an overflow under GradScaler; default all.
        average, ema_decay, average_every, average_start: see :class:`FusedOptimizer`.
        options: the base's own, as in its torch class.

    Under DistributedDataParallel the gradient of the first pass is the synchronised one; under its ``no_sync()`` each
    rank perturbs by its own (m-SAM), and replicas still stay equal bit for bit. With FSDP2 norms are taken over the
    mesh. Sources: Foret et al. 2021 (arXiv 2010.01412); Kwon et al. 2021 (arXiv 2102.11600).
    """

    def __init__(
        self,
        params,
        base: str | type | Rule = "sgd",
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        base_optimizer: type | None = None,
        metric: str = "l2",
        eta: float = 0.0,
        norm_eps: float = 0.0,
        storage: str = "backup",
        rounding: str = "nearest",
        fused: bool | None = None,
        model: nn.Module | None = None,
        replay: bool = True,
        process_group: object = None,
        average: str | None = None,
        ema_decay: float = 0.999,
        average_every: int = 1,
        average_start: int = 0,
        **options: Any,
    ):
        op = f"fastflat.optim.{type(self).__name__}"
        if isinstance(params, nn.Module):
            model = params if model is None else model
            params = _groups_of(params)
        if metric not in ("l2", "linf"):
            raise ValueError(f"{op}: metric must be 'l2' or 'linf', got {metric!r}")
        if storage not in STORAGES:
            raise ValueError(f"{op}: storage must be one of {', '.join(STORAGES)}, got {storage!r}")
        if rounding not in ("nearest", "stochastic"):
            raise ValueError(f"{op}: rounding must be 'nearest' or 'stochastic', got {rounding!r}")
        if metric == "linf" and adaptive:
            raise ValueError(f"{op}: adaptive must be False with metric 'linf', got True")
        rule = base_of(op, base_optimizer if base_optimizer is not None else base, options, fused)
        self._metric, self._norm_eps, self._storage, self._rounding = (metric, float(norm_eps), storage, rounding)
        self._model, self._replay, self._process_group = model, replay, process_group
        self._base: torch.optim.Optimizer | None = None
        self._start_over()
        self._warned: set[str] = set()
        self._seen: dict[Tensor, int] = {}
        self._left: list[tuple[int, int]] | None = None
        averaging = {
            "average": average, "ema_decay": ema_decay, "average_every": average_every, "average_start": average_start,
        }  # fmt: skip
        own = {"rho": rho, "adaptive": adaptive, "eta": eta}
        params = [_scales_stay(g) for g in params]
        if isinstance(rule, Rule):
            super().__init__(params, rule, **averaging, **options, **own)
        else:
            if average is not None or storage == MASTER:
                raise ValueError(f"{op}: average and storage='master' must have a fused base, got {rule!r}")
            super().__init__(params, FOREIGN, **averaging, **own)
            self._base = rule(self.param_groups, **options)
            self.param_groups, self.state = self._base.param_groups, self._base.state
            self.defaults.update(self._base.defaults)
            self._forget_plans()

    # First pass ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """The ascent, from the gradients that are there: parameters become ``w + e``.

        Args:
            zero_grad: whether to drop the gradients afterwards.

        Raises:
            ValueError: a gradient is sparse, or not of its parameter's type or shape; nothing has changed then.
        """
        if self.is_perturbed:
            self.restore()
        self._check_radii()
        grads, has = self._collect()
        if has is not None and not any(has):
            raise RuntimeError(f"{self._name}.first_step: no parameter has a gradient; call backward() first")
        # States are made here: averages begin with the weights before the ascent.
        self._plan(grads, has)
        plan = self._ascent_plan(has)
        state = self._draws()
        if plan.params:
            self._rise(plan, plan.take(grads), state)
        self._between = True
        self._end_pass(zero_grad)

    # Second pass -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """The base's step from the unperturbed weights, along the gradients that are there now.

        Args:
            zero_grad: whether to drop the gradients afterwards.

        Raises:
            RuntimeError: there was no first_step, or it has been undone.
        """
        if not self._between:
            raise RuntimeError(
                f"{self._name}.second_step: first_step() must come before it; restore(), or zero_grad() after the"
                " second backward(), undoes it"
            )
        self._add_kept_sums()
        if self._base is not None:
            self._foreign_step()
        else:
            self._fused_step()
        self._start_over()
        self._note_writes()
        self._opt_called = True  # what learning-rate schedulers look for
        if zero_grad:
            super().zero_grad()

    def accumulate(self) -> None:
        """Ends the second pass of a micro-batch (m-SAM): its gradients are kept, the weights restored, the next
        micro-batch may begin. :meth:`second_step` after the last one adds up the gradients of all.

        Gradients add up as they do in ``.grad``: divide the losses for a mean.
        """
        if not self._between:
            raise RuntimeError(f"{self._name}.accumulate: first_step() must come before it")
        with torch.no_grad():
            sums = self._sums
            for p, _ in self._of_groups():
                if p.grad is None:
                    continue
                if p in sums:
                    sums[p].add_(p.grad)
                else:
                    sums[p] = p.grad.clone() if _tensors.shares_memory(_tensors.local(p.grad)) else p.grad
                p.grad = None
            self.restore()
            self._sums = sums

    def _add_kept_sums(self) -> None:
        for p, kept in self._sums.items():
            p.grad = kept if p.grad is None else p.grad.add_(kept)
        self._sums = {}

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Both passes with a closure, or the second step without.

        Args:
            closure: drops the gradients, computes the loss and calls backward; it runs twice, the second time at
                ``w + e``. Gradients that were there before are dropped, with one warning.

        Returns:
            The loss of the first pass.
        """
        if closure is None:
            if not self._between and any(float(group["lr"]) for group in self.param_groups):
                raise RuntimeError(
                    f"{self._name}.step: first_step() must come before it, or step(closure) do both passes"
                )
            # Without a rate nothing moves: so torch.distributed.checkpoint has states made before it loads them.
            self._between = True
            self.second_step()
            return None
        if any(p.grad is not None for p, _ in self._of_groups()):
            if "gradients" not in self._warned and self._gradients_seen() != self._left:
                self._warned.add("gradients")
                warnings.warn(
                    f"{self._name}.step(closure) drops the gradients that are there and calls the closure twice;"
                    " leave out the backward() before it",
                    stacklevel=3,
                )
            super().zero_grad()
        self.restore()
        try:
            with self.first_pass(), torch.enable_grad():
                loss = closure()
            self.first_step(zero_grad=True)
            self._between_passes(closure)
            with self.second_pass(), torch.enable_grad():
                closure()
            self.second_step()
            self._left = self._gradients_seen()
        except BaseException:
            self.restore()
            raise
        return loss

    def _between_passes(self, closure: Callable[[], Tensor]) -> None:
        """What a subclass does with the closure between the two passes."""

    def _gradients_seen(self) -> list[tuple[int, int]]:
        """Which gradients there are: those that a step(closure) left need no warning at the next."""
        grads = [p.grad for p, _ in self._of_groups() if p.grad is not None]
        return [(id(g), g._version) for g in grads[:8]]

    # Around the passes -----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def first_pass(self) -> Iterator[None]:
        """Around the first forward and backward: remembers the random numbers for :meth:`second_pass`."""
        self._before = Randomness(self._device()) if self._replay else None
        yield

    @contextlib.contextmanager
    def second_pass(self) -> Iterator[None]:
        """Around the second forward and backward: the random numbers of :meth:`first_pass`, and buffers of the model as
        the first pass left them. An exception restores the weights."""
        if self._before is not None:
            self._before.put_back()
        try:
            with buffers_kept(self._model):
                yield
        except BaseException:
            self.restore()
            raise

    @contextlib.contextmanager
    def perturbed(self) -> Iterator[None]:
        """The parameters are ``w + e`` inside the block, from the gradients that are there, and w after it."""
        self._refuse_perturbed("perturbed")
        self.first_step()
        try:
            yield
        finally:
            self.restore()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients. Those of the first pass may go before the second; to drop gradients that came after it
        means that a new step begins, and restores the weights."""
        if self._between and any(p.grad is not None for p, _ in self._of_groups()):
            if self._may_zero:
                self._may_zero = False
            else:
                self.restore()
        super().zero_grad(set_to_none)

    # Saving ----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state of the base (and masters), as torch.optim gives it; refused between the passes."""
        self._refuse_perturbed("state_dict")
        return super().state_dict()

    _remade = (
        *PerturbingOptimizer._remade, "_ascents", "_stored", "_ascent", "_between", "_may_zero", "_firsts", "_sums",
        "_flag", "_before", "_norm",
    )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_perturbed("copy")
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start_over()
        if self._base is not None:
            self._base.param_groups, self._base.state = self.param_groups, self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._refuse_perturbed("load_state_dict")
        if self._base is not None:
            self._base.load_state_dict(state_dict)
            self.param_groups, self.state = self._base.param_groups, self._base.state
            self._forget_plans()
            return
        super().load_state_dict(state_dict)
        # A master is a state like the others; whether it still is the parameter's is seen at the next step.
        self._seen.clear()
        self._seen.update({p: -1 for p in self._all() if MASTER in self.state.get(p, ())})


def _groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """The parameters of a model, those of its quantizers apart: neither perturbed nor decayed."""
    scales = {id(p) for m in model.modules() if getattr(m, "is_quantizer", False) for p in m.parameters(recurse=False)}
    of = {True: [], False: []}
    for p in model.parameters():
        of[id(p) in scales].append(p)
    groups = [{"name": "weights", "params": of[False]}, {"name": "scales", "params": of[True], "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _scales_stay(group: object) -> object:
    """Quantizer scales are not perturbed unless their group asks for it."""
    if isinstance(group, dict) and group.get("name") == "scales":
        return {"rho": 0.0, **group}
    return group

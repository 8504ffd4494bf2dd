# SPDX-License-Identifier: Apache-2.0
"""Sharpness-aware minimisation over the fused base optimizers, or any of torch's."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastflat import backends
from fastflat._ops.sharpness import METRICS, SUM_GRADIENT, SUM_SCALED
from fastflat.functional import draw_state
from fastflat.optim import _tensors
from fastflat.optim._ascent import STORAGES, AscentPlan
from fastflat.optim._fused import Bucket, FusedOptimizer, Plan, Weights
from fastflat.optim._passes import Randomness, buffers_kept
from fastflat.optim._rules import FOREIGN, Rule, base_of

MASTER = "master"
_HALVES = (torch.bfloat16, torch.float16)


class SAM(FusedOptimizer):
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
        self._metric, self._norm_eps, self._storage, self._rounding = metric, float(norm_eps), storage, rounding
        self._model, self._replay, self._process_group = model, replay, process_group
        self._base: torch.optim.Optimizer | None = None
        self._start_over()
        self._warned: set[str] = set()
        self._left: list[tuple[int, int]] | None = None
        averaging = {
            "average": average, "ema_decay": ema_decay, "average_every": average_every, "average_start": average_start,
        }  # fmt: skip
        own = {"rho": rho, "adaptive": adaptive, "eta": eta}
        params = [_scales_stay(g) for g in params] if not isinstance(params, (list, tuple)) else params
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
        self._check_storage()

    # Options ---------------------------------------------------------------------------------------------------------

    def _own_options(self) -> tuple[str, ...]:
        return ("rho", "adaptive", "eta")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self._refuse_perturbed("add_param_group")
        for name in ("rho", "eta"):
            value = param_group.get(name, self.defaults.get(name, 0.0))
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise ValueError(f"{self._name}: {name} must be a finite number of at least 0, got {value!r}")
        super().add_param_group(param_group)
        if self._base is not None:
            for name, value in self._base.defaults.items():
                self.param_groups[-1].setdefault(name, value)
        if hasattr(self, "_ready"):
            self._check_storage()

    def _check_storage(self) -> None:
        self._ready = True
        if self._rounding == "stochastic" and any(_tensors.local(p).dtype == torch.float16 for p in self._all()):
            raise ValueError(f"{self._name}: rounding 'stochastic' must have bfloat16 parameters, got float16")
        if self._storage != "swap":
            return
        for p in self._all():
            if _tensors.is_dtensor(p):
                raise ValueError(
                    f"{self._name}: storage 'swap' must have plain parameters, got a DTensor; use 'backup'"
                )
            if p.numel() and _tensors.shares_memory(p):
                raise ValueError(
                    f"{self._name}: storage 'swap' must have parameters with memory of their own, got a view of a"
                    " larger one (flat parameters, recurrent layers); use 'backup'"
                )

    def _start_over(self) -> None:
        """No perturbation is in force."""
        self._ascent: AscentPlan | None = None
        self._between = False  # the first pass is over, the second is not
        self._may_zero = False  # a zero_grad between the passes may still come
        self._firsts: dict[Tensor, Tensor] = {}
        self._sums: dict[Tensor, Tensor] = {}
        self._flag: Tensor | None = None
        self._before: Randomness | None = None

    def _forget_plans(self) -> None:
        super()._forget_plans()
        self._ascents: dict[object, AscentPlan] = {}

    @property
    def is_perturbed(self) -> bool:
        """Whether the parameters are ``w + e`` now."""
        return self._ascent is not None

    @property
    def gradient_norm(self) -> Tensor | None:
        """The norm that the last ascent divided by, fp64 on the parameters' device; None before the first."""
        return getattr(self, "_norm", None)

    def _refuse_perturbed(self, what: str) -> None:
        if getattr(self, "_ascent", None) is not None:
            raise RuntimeError(
                f"{self._name}.{what}: the parameters must not be perturbed; call second_step() or restore() first"
            )

    # Masters ---------------------------------------------------------------------------------------------------------

    def _has_master(self, p: Tensor) -> bool:
        return self._storage == MASTER and _tensors.local(p).dtype in _HALVES

    def _master(self, p: Tensor) -> Tensor:
        """The fp32 weights of a parameter in 16 bits; taken anew where somebody else wrote the parameter."""
        state = self.state[p]
        if MASTER not in state:
            state[MASTER] = p.detach().float()
            self._seen[p] = p._version
        elif self._seen.get(p) != p._version:
            # After a load of both, the copy in 16 bits is still the master's; else the parameter is what counts.
            if not torch.equal(_tensors.local(state[MASTER]).to(p.dtype), _tensors.local(p.detach())):
                with torch.no_grad():
                    state[MASTER].copy_(p.detach())
            self._seen[p] = p._version
        return state[MASTER]

    def _note_writes(self) -> None:
        """The versions of parameters after our own writes."""
        for p in self._seen:
            self._seen[p] = p._version

    @property
    def _seen(self) -> dict[Tensor, int]:
        return self.__dict__.setdefault("_versions", {})

    def _state_of(self, p: Tensor, number: int, group: dict[str, Any], slots: tuple[str, ...]) -> dict[str, Any]:
        # A base of torch keeps its own state, and takes one that is not empty for begun.
        return {} if self._base is not None else super()._state_of(p, number, group, slots)

    def _weights_of(self, p: Tensor) -> Tensor:
        return self._master(p) if self._has_master(p) else p

    # First pass ------------------------------------------------------------------------------------------------------

    def _form(self, p: Tensor, group: dict[str, Any]) -> tuple:
        return (*super()._form(p, group), self._has_master(p))

    def _ascent_plan(self, has: tuple[bool, ...] | None) -> AscentPlan:
        perturbed = tuple(group["rho"] > 0 for group in self.param_groups)
        plan = self._ascents.get((has, perturbed))
        if plan is None:
            members = self._of_groups()
            chosen = [i for i, (_, g) in enumerate(members) if perturbed[g] and (has is None or has[i])]
            if len(self._ascents) > 64:
                self._ascents.clear()
            plan = AscentPlan(members, chosen, self._storage, self._has_master, self._device())
            self._ascents[has, perturbed] = plan
        return plan

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
        self._between, self._may_zero = True, not zero_grad
        if zero_grad:
            super().zero_grad()

    def _check_radii(self) -> None:
        for group in self.param_groups:
            if not 0 <= group["rho"] < float("inf"):
                raise ValueError(f"{self._name}: rho must be a finite number of at least 0, got {group['rho']!r}")

    def _draws(self) -> Tensor | None:
        return draw_state(self._device()) if self._rounding == "stochastic" else None

    def _rise(self, plan: AscentPlan, grads: list[Tensor], state: Tensor | None) -> None:
        kernels = backends.kernels(self._device().type)
        eta = self._eta()
        ws = plan.weights(self._weights_of)
        of_groups = [bool(group["adaptive"]) for group in self.param_groups]
        metric = METRICS["linf"] if self._metric == "linf" else METRICS["l2"]
        kinds, metrics, some = [SUM_GRADIENT], [metric], any(of_groups)
        if some:
            adaptive = [of_groups[g] for g in plan.groups]
            kinds = [SUM_SCALED if a else SUM_GRADIENT for a in adaptive]
            metrics = [METRICS["scaled"] if a else metric for a in adaptive]
        rho = plan.radii([float(group["rho"]) for group in self.param_groups])
        with torch._C._AutoDispatchBelowAutograd():
            sums = kernels.sharpness_sums(grads, ws if some else [], kinds, eta)
            if plan.sharded:
                _tensors.sum_over_shards(sums, plan.params)
            scale = kernels.sharpness_scale(sums, rho, self._norm_eps, self._metric == "linf")
            plan.rise(kernels, ws, grads, scale, metrics, eta, state)
        self._ascent, self._norm, self._flag = plan, scale[-2], scale[-1]
        torch.autograd.graph.increment_version(plan.params)
        self._note_writes()
        if self._rounding == "nearest":
            self._warn_of_lost_perturbation(plan)

    def _eta(self) -> float:
        etas = {float(group["eta"]) for group in self.param_groups if group["adaptive"]}
        if len(etas) > 1:
            raise ValueError(f"{self._name}: eta must be the same in all adaptive groups, got {sorted(etas)}")
        return etas.pop() if etas else 0.0

    def _warn_of_lost_perturbation(self, plan: AscentPlan) -> None:
        if "lost" in self._warned or not plan.halves:
            return
        self._warned.add("lost")
        if self._device().type == "cuda" and torch.cuda.is_current_stream_capturing():
            return
        share = plan.share_not_moved()
        if share > 0.1:
            warnings.warn(
                f"{self._name}: of {share:.0%} of the 16-bit weights the perturbation is lost, it is smaller than half"
                " a unit in their last place; use storage='master' or rounding='stochastic'",
                stacklevel=5,
            )

    # Second pass -----------------------------------------------------------------------------------------------------

    def _mixture(self, plan: Plan, grads: list[Tensor]) -> tuple[tuple | None, list[Tensor] | None]:
        """``(c1, c2)`` and the first gradients for a direction ``c1 g1 + c2 g2``; None for ``g2`` alone."""
        return None, None

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

    def _fused_step(self) -> None:
        of_all, has = self._collect()
        plan = self._plan(of_all, has)
        grads = plan.take(of_all)
        c, firsts = self._mixture(plan, grads)
        self._tick_averages()
        mix = self._scaled_mix(c, self._overflow())
        ascent = self._ascent
        state = self._draws()
        if ascent is not None:
            ascent.point_back()
            self._restore_others(ascent, plan)
        self._descend(plan, grads, mix, firsts, state)

    def _overflow(self) -> Tensor | None:
        """Whether the first pass overflowed, on any rank; under GradScaler only."""
        if getattr(self, "grad_scale", None) is None and getattr(self, "found_inf", None) is None:
            return None
        distributed = torch.distributed
        if self._flag is not None and distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(self._flag, op=distributed.ReduceOp.MAX, group=self._process_group)
        return self._flag

    def _weights(self, plan: Plan, bucket: Bucket) -> Weights:
        ascent = self._ascent
        if bucket.weights is not None and bucket.weights[0] is ascent:
            return bucket.weights[1]
        params = plan.params[bucket.rows]
        local = [_tensors.local(p) for p in params] if plan.sharded else params
        if bucket.form[-1]:
            return Weights([_tensors.local(self._master(p)) for p in params], outs=local)
        weights, at = Weights(local), [None] * len(params)
        if ascent is not None and ascent.backup is not None:
            at = [ascent.place.get(p) for p in params]
        if None not in at:
            weights = Weights(local, backup=ascent.backup, at=at)
        elif any(place is not None for place in at):
            # Some were not perturbed: what was, is put back first.
            ascent.put_back([p for p, place in zip(params, at, strict=True) if place is not None])
            return weights
        if not plan.sharded:
            bucket.weights = (ascent, weights)
        return weights

    def _restore_others(self, ascent: AscentPlan, plan: Plan) -> None:
        """Parameters that the descent does not reach get their weights back."""
        if ascent.order == plan.order:
            return
        reached = set(map(id, plan.params))
        ascent.put_back([p for p in ascent.params if id(p) not in reached])

    def _foreign_step(self) -> None:
        of_all, has = self._collect()
        plan = self._plan(of_all, has)
        grads = plan.take(of_all)
        c, firsts = self._mixture(plan, grads)
        overflow = self._overflow()
        self.restore()
        if firsts is not None:
            for g, f in zip(grads, firsts, strict=True):
                g.mul_(torch.as_tensor(c[1]).to(g.dtype)).add_(f * torch.as_tensor(c[0]).to(g.dtype))
        scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if scale is None and found is None:
            self._base.step()
            return
        # Bases without kernels of their own for it learn of an overflow on the host.
        if bool(sum(f for f in (found, overflow) if f is not None)):
            return
        if scale is not None:
            torch._foreach_div_(grads, scale.to(grads[0].dtype))
        self._base.step()

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

    @torch.no_grad()
    def restore(self) -> None:
        """The weights before the ascent, bit for bit; does nothing where there was none."""
        if self._ascent is not None:
            self._ascent.point_back()
            self._ascent.put_back(self._ascent.params)
        self._start_over()
        self._note_writes()

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
        *FusedOptimizer._remade, "_ascents", "_ascent", "_between", "_may_zero", "_firsts", "_sums", "_flag", "_before",
        "_norm",
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

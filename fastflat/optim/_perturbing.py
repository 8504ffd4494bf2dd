# SPDX-License-Identifier: Apache-2.0
"""The machinery under SAM: who is perturbed and by how much, where the weights are meanwhile, how they come back."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from fastflat import backends
from fastflat._ops.sharpness import METRICS, SUM_GRADIENT, SUM_SCALED
from fastflat.functional import draw_state
from fastflat.optim import _tensors
from fastflat.optim._ascent import AscentPlan, Storage
from fastflat.optim._fused import FusedOptimizer
from fastflat.optim._passes import Randomness
from fastflat.optim._plans import Bucket, Plan, Weights

MASTER = "master"


class PerturbingOptimizer(FusedOptimizer):
    """A fused optimizer whose parameters can be ``w + e`` for a while; :class:`SAM` sets its options and gives it its
    steps."""

    _metric: str
    _norm_eps: float
    _storage: str
    _rounding: str
    _process_group: object
    _base: torch.optim.Optimizer | None

    # Options ---------------------------------------------------------------------------------------------------------

    def _own_options(self) -> tuple[str, ...]:
        return ("rho", "adaptive", "eta")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self._refuse_perturbed("add_param_group")
        super().add_param_group(param_group)
        if self._base is not None:
            for name, value in self._base.defaults.items():
                self.param_groups[-1].setdefault(name, value)

    def _check_parameters(self) -> None:
        super()._check_parameters()
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

    # What is in force ------------------------------------------------------------------------------------------------

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
        self._stored: tuple[torch.dtype, Storage] | None = None

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
        return self._storage == MASTER and _tensors.local(p).dtype in _tensors.HALVES

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

    def _state_of(self, p: Tensor, number: int, group: dict[str, Any], slots: tuple[str, ...]) -> dict[str, Any]:
        # A base of torch keeps its own state, and takes one that is not empty for begun.
        return {} if self._base is not None else super()._state_of(p, number, group, slots)

    def _weights_of(self, p: Tensor) -> Tensor:
        return self._master(p) if self._has_master(p) else p

    # The ascent ------------------------------------------------------------------------------------------------------

    def _form(self, p: Tensor, group: dict[str, Any]) -> tuple:
        return (*super()._form(p, group), self._has_master(p))

    def _ascent_plan(self, has: tuple[bool, ...] | None) -> AscentPlan:
        perturbed = tuple(group["rho"] > 0 for group in self.param_groups)
        if self._stored is None or self._stored[0] != self._dtype():
            self._ascents.clear()
            storage = Storage([p for p, _ in self._of_groups()], self._storage, self._has_master, self._device())
            self._stored = (self._dtype(), storage)
        plan = self._ascents.get((has, perturbed))
        if plan is None:
            members = self._of_groups()
            chosen = [i for i, (_, g) in enumerate(members) if perturbed[g] and (has is None or has[i])]
            if len(self._ascents) > 64:
                self._ascents.clear()
            plan = AscentPlan(members, chosen, self._stored[1], self._has_master)
            self._ascents[has, perturbed] = plan
        return plan

    def _end_pass(self, zero_grad: bool) -> None:
        """The gradients of a pass go now, or by a zero_grad before the next."""
        self._may_zero = not zero_grad
        if zero_grad:
            FusedOptimizer.zero_grad(self)

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
        rho = plan.radii([float(group["rho"]) for group in self.param_groups], self._device())
        with torch._C._AutoDispatchBelowAutograd():
            others = (ws, plan.weights_of(kernels, ws))
            given = (grads, plan.gradients_of(kernels, grads))
            of_sums = _tensors.all_or_none(given, others) if some else (given[1], [])
            sums = kernels.sharpness_sums(*of_sums, kinds, eta)
            if plan.sharded:
                _tensors.sum_over_shards(sums, plan.params)
            scale = kernels.sharpness_scale(sums, rho, self._norm_eps, self._metric == "linf")
            plan.rise(kernels, ws, grads, given[1], scale, metrics, eta, state)
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

    # The descent -----------------------------------------------------------------------------------------------------

    def _mixture(self, plan: Plan, grads: list[Tensor]) -> tuple[tuple | None, list[Tensor] | None]:
        """``(c1, c2)`` and the first gradients for a direction ``c1 g1 + c2 g2``; None for ``g2`` alone."""
        return None, None

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
        if all(of is None for of in self._scaling()):
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
        scale, found = self._scaling()
        if scale is None and found is None:
            self._base.step()
            return
        # Bases without kernels of their own for it learn of an overflow on the host.
        if bool(sum(f for f in (found, overflow) if f is not None)):
            return
        if scale is not None:
            torch._foreach_div_(grads, scale.to(grads[0].dtype))
        self._base.step()

    @torch.no_grad()
    def restore(self) -> None:
        """The weights before the ascent, bit for bit; does nothing where there was none."""
        if self._ascent is not None:
            self._ascent.point_back()
            self._ascent.put_back(self._ascent.params)
        self._start_over()
        self._note_writes()

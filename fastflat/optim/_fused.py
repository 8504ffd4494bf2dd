# SPDX-License-Identifier: Apache-2.0
"""The optimizer under all others here: one descent kernel over the whole list of parameters."""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastflat import backends
from fastflat._ops import compute_dtype
from fastflat._ops.descent import HYPER
from fastflat.optim import _tensors
from fastflat.optim._plans import Bucket, Plan, Weights
from fastflat.optim._rules import AVERAGE, IGNORED, Rule

AVERAGES = ("ema", "mean")


class FusedOptimizer(torch.optim.Optimizer):
    """A base optimizer whose step is one pass over all parameters.

    Args:
        params: parameters or groups of them, as torch.optim takes them; floating, on one device.
        rule: the base.
        average: ``None``, ``"ema"`` or ``"mean"``: an average of the weights kept in the same pass, in the state
            ``"average"``. An exponential one moves by ``1 - ema_decay`` each step, a running mean takes every
            ``average_every``-th step from step ``average_start`` on.
        options: options of the groups over the rule's defaults.

    It honours ``grad_scale`` and ``found_inf`` of :class:`torch.amp.GradScaler`: a step with an overflow changes
    nothing but what a perturbation left, which it restores.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params,
        rule: Rule,
        *,
        average: str | None = None,
        ema_decay: float = 0.999,
        average_every: int = 1,
        average_start: int = 0,
        **options: Any,
    ):
        self._rule = rule
        self._name = f"fastflat.optim.{type(self).__name__}"
        if average is not None and average not in AVERAGES:
            raise ValueError(f"{self._name}: average must be None, {' or '.join(AVERAGES)}, got {average!r}")
        if not 0 <= ema_decay < 1:
            raise ValueError(f"{self._name}: ema_decay must lie in [0, 1), got {ema_decay!r}")
        if average_every < 1 or average_start < 0:
            raise ValueError(
                f"{self._name}: average_every must be at least 1 and average_start at least 0,"
                f" got {average_every!r} and {average_start!r}"
            )
        unknown = sorted(set(options) - set(rule.defaults) - set(IGNORED) - set(self._own_options()))
        if unknown:
            raise TypeError(f"{self._name}: base {rule.name!r} has no option {', '.join(unknown)}")
        options = {name: value for name, value in options.items() if name not in IGNORED}
        averaging = {
            "average": average, "ema_decay": ema_decay, "average_every": average_every,
            "average_start": average_start, "average_clock": 0, "average_count": 0,
        }  # fmt: skip
        self._forget_plans()
        super().__init__(params, {**rule.defaults, **averaging, **options})

    # Options and groups ----------------------------------------------------------------------------------------------

    def adopt(self, param_groups: list, state: dict) -> None:
        """Work on the groups and states of another optimizer, which stays their owner; groups must have every option
        of this one."""
        self.param_groups, self.state = param_groups, state
        self._forget_plans()

    def _own_options(self) -> tuple[str, ...]:
        """Options of a group that are this class's, not the base's."""
        return ()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self._rule.check(self._name, self.param_groups[-1])
            self._check_parameters()
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._forget_plans()

    def _check_parameters(self) -> None:
        """Refuses parameters that the kernels cannot take."""
        _tensors.check_parameters(self._name, self._all())

    def _all(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _forget_plans(self) -> None:
        self._plans: dict[object, Plan] = {}
        self._members: list[tuple[Tensor, int]] | None = None
        self._flat: list[Tensor] | None = None
        self._numbers: tuple | None = None
        self._hyper: Tensor | None = None
        self._steps: Tensor | None = None
        self._plain_mix: Tensor | None = None

    def _of_groups(self) -> list[tuple[Tensor, int]]:
        """Every parameter with the number of its group."""
        if self._members is None:
            self._members = [(p, i) for i, group in enumerate(self.param_groups) for p in group["params"]]
        return self._members

    # State -----------------------------------------------------------------------------------------------------------

    def _adapted(self, p: Tensor, group: dict[str, Any]) -> bool:
        return p.dim() > 1 or group.get("adapt_vectors", True)

    def _slots(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self._rule.slots(group)

    def _count_steps(self) -> Tensor:
        """The counts of all parameters, one fp64 tensor; ``state[p]["step"]`` are views of it."""
        if self._steps is None:
            members = self._of_groups()
            before = [float(self.state[p]["step"]) if "step" in self.state.get(p, ()) else None for p, _ in members]
            # States of torch.optim.SGD come without a count: momentum that is there has had its first step.
            counts = [
                float(bool(self.state.get(p))) if b is None else b for b, (p, _) in zip(before, members, strict=True)
            ]
            self._steps = torch.tensor(counts, dtype=torch.float64, device=self._device())
            for i, (p, _) in enumerate(members):
                if p in self.state:
                    self.state[p]["step"] = self._steps[i]
        return self._steps

    def _state_of(self, p: Tensor, number: int, group: dict[str, Any], slots: tuple[str, ...]) -> dict[str, Any]:
        state = self.state[p]
        state.setdefault("step", self._count_steps()[number])
        dtype = compute_dtype(_tensors.local(p).dtype)
        for slot in slots:
            if slot not in state:
                state[slot] = _tensors.zeros(p, dtype)
        if group["average"] and AVERAGE not in state:
            state[AVERAGE] = self._weights_of(p).detach().to(dtype, copy=True)
        return state

    def _weights_of(self, p: Tensor) -> Tensor:
        """The tensor whose values are the parameter's, in its best precision."""
        return p

    # Plans -----------------------------------------------------------------------------------------------------------

    def _form(self, p: Tensor, group: dict[str, Any]) -> tuple:
        """What the parameters of a bucket share."""
        return (self._slots(group), bool(group["average"]))

    def _collect(self) -> tuple[list[Tensor | None], tuple[bool, ...] | None]:
        """The gradients of all parameters, and which have one (None: all)."""
        if self._flat is None:
            self._flat = self._all()
        grads = [p.grad for p in self._flat]
        if not any(map(operator.is_, grads, itertools.repeat(None))):
            return grads, None
        return grads, tuple(g is not None for g in grads)

    def _plan(self, grads: list[Tensor | None], has: tuple[bool, ...] | None) -> Plan:
        """The plan of the parameters that have a gradient."""
        forms = ((self._slots(group), bool(group["average"])) for group in self.param_groups)
        key = (has, self._dtype(), *forms)
        plan = self._plans.get(key)
        if plan is None:
            # What kind of gradient an operation gives does not change from step to step.
            _tensors.check_gradients(self._name, [g for g in grads if g is not None])
            if len(self._plans) > 64:  # a new set each step: layers dropped at random
                self._plans.clear()
            plan = self._plans[key] = self._make_plan(has)
        return plan

    def _make_plan(self, has: tuple[bool, ...] | None) -> Plan:
        forms: dict[tuple, list[int]] = {}
        members = self._of_groups()
        for i, (p, g) in enumerate(members):
            if has is None or has[i]:
                forms.setdefault(self._form(p, self.param_groups[g]), []).append(i)
        order = [i for of_form in forms.values() for i in of_form]
        buckets, first = [], 0
        for form, of_form in forms.items():
            bucket = Bucket(form, first, len(of_form))
            groups = [self.param_groups[members[i][1]] for i in of_form]
            states = [
                self._state_of(members[i][0], i, group, form[0]) for i, group in zip(of_form, groups, strict=True)
            ]
            bucket.states = [[_tensors.local(s[slot]) for s in states] for slot in form[0]]
            bucket.averages = [_tensors.local(s[AVERAGE]) for s in states] if form[1] else []
            buckets.append(bucket)
            first += len(of_form)
        rows = [2 * g + (not self._adapted(p, self.param_groups[g])) for p, g in (members[i] for i in order)]
        group = torch.tensor(rows, dtype=torch.int64, device=self._device())
        return Plan(members, order, buckets, group)

    def _dtype(self) -> torch.dtype:
        """The type of the first parameter: a model that is converted as a whole is told by it."""
        return self._of_groups()[0][0].dtype

    def _device(self) -> torch.device:
        return _tensors.local(self._of_groups()[0][0]).device

    # One step --------------------------------------------------------------------------------------------------------

    def _hyper_numbers(self) -> Tensor:
        """The groups' numbers on the device, two rows a group: with the ratios of LARS and LAMB and without."""
        numbers = tuple(self._rule.hyper(group, adapted) for group in self.param_groups for adapted in (True, False))
        if numbers != self._numbers:
            device = self._device()
            fresh = torch.tensor(numbers, dtype=torch.float64)
            if self._hyper is None or self._hyper.shape != fresh.shape:
                self._hyper = fresh.to(device)
            elif device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"{self._name}: an option of a group changed during the capture of a CUDA graph; change lr through"
                    " a tensor, the others before the capture"
                )
            else:
                self._hyper.copy_(fresh)
            self._numbers = numbers
        for i, group in enumerate(self.param_groups):
            if isinstance(group["lr"], Tensor):
                self._hyper[2 * i : 2 * i + 2, HYPER.index("lr")] = group["lr"].to(self._hyper.dtype)
        return self._hyper

    def _tick_averages(self) -> None:
        """The weight of this step's result in the averages."""
        for group in self.param_groups:
            if not group["average"]:
                continue
            weight = 0.0
            if group["average"] == "ema":
                weight = 1.0 - group["ema_decay"]
            elif (
                group["average_clock"] >= group["average_start"]
                and (group["average_clock"] - group["average_start"]) % group["average_every"] == 0
            ):
                group["average_count"] += 1
                weight = 1.0 / group["average_count"]
            group["average_clock"] += 1
            group["average_weight"] = weight

    def _scaling(self) -> tuple[Tensor | None, Tensor | None]:
        """``grad_scale`` and ``found_inf``, which torch.amp.GradScaler sets around its step and removes after it."""
        return getattr(self, "grad_scale", None), getattr(self, "found_inf", None)

    def _scaled_mix(self, c: tuple[Tensor | float, Tensor | float] | None, skip: Tensor | None) -> Tensor:
        """``[c1, c2, skip]``, unscaled and stopped as torch.amp.GradScaler asks."""
        device = self._device()
        scale, found = self._scaling()
        if scale is None and found is None and c is None and skip is None:
            if self._plain_mix is None or self._plain_mix.device != device:
                self._plain_mix = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64, device=device)
            return self._plain_mix
        mix = torch.zeros(3, dtype=torch.float64, device=device)
        mix[0], mix[1] = c if c is not None else (0.0, 1.0)
        if scale is not None:
            mix /= scale.to(device, torch.float64)
        flags = [f.to(device, torch.float64).reshape(()) for f in (found, skip) if f is not None]
        mix[2] = sum(flags) if flags else 0.0
        return mix

    def _weights(self, plan: Plan, bucket: Bucket) -> Weights:
        return Weights([_tensors.local(p) for p in plan.params[bucket.rows]])

    def _descend(
        self, plan: Plan, grads: list[Tensor], mix: Tensor, firsts: list[Tensor] | None, state: Tensor | None
    ) -> None:
        """The base's step of every parameter of the plan, from its gradients of the second and the first pass."""
        if not plan.params:
            return
        kernels = backends.kernels(plan.group.device.type)
        hyper, every = self._hyper_numbers(), self._count_steps()
        steps = every if plan.index is None else every[plan.index]
        weights = [self._weights(plan, b) for b in plan.buckets]
        with torch._C._AutoDispatchBelowAutograd():
            sums = self._lars_sums(kernels, plan, weights, grads, firsts) if self._rule.name == "lars" else (None, None)
            rows = kernels.descent_rows_(hyper, plan.group, steps, mix, *sums, self._rule.number)
            if plan.index is not None:
                every[plan.index] = steps
            for b, w in zip(plan.buckets, weights, strict=True):
                ws, outs, gs, fs, averages, *states = self._listed(kernels, plan, b, w, grads, firsts)
                kept, given, of_rows = (w.backup, w.at), (gs, fs), rows[b.rows]
                if self._rule.name in ("sgd", "lars"):
                    momenta = states[0] if states else []
                    kernels.descent_sgd_(ws, outs, *kept, *given, momenta, averages, of_rows, state)
                elif self._rule.name == "lamb":
                    norms = kernels.descent_lamb_moments_(ws, *kept, *given, *states, of_rows)
                    if plan.sharded:
                        _tensors.sum_over_shards(norms, plan.params[b.rows])
                    kernels.descent_lamb_(ws, outs, *kept, *states, averages, of_rows, norms, state)
                else:
                    means, squares, largest = (*states, [])[:3]
                    kernels.descent_adam_(
                        ws, outs, *kept, *given, means, squares, largest, averages, of_rows,
                        self._rule.name == "padam", state,
                    )  # fmt: skip
        averages = (t for b in plan.buckets for t in b.averages)
        torch.autograd.graph.increment_version([*plan.params, *averages])

    def _listed(self, kernels, plan, bucket, w, grads, firsts) -> list[list[Tensor]]:
        """Weights, copies, gradients of both passes, averages and states of a bucket as the kernels take them."""
        first, rows = bucket.rows.start, bucket.rows
        gs, fs = grads[rows], firsts[rows] if firsts else []
        return _tensors.all_or_none(
            *((t, plan.weights_of(kernels, t, first)) for t in (w.ws, w.outs)),
            *((t, plan.gradients_of(kernels, t, first)) for t in (gs, fs)),
            *((t, plan.states_of(kernels, t, first)) for t in (bucket.averages, *bucket.states)),
        )

    def _lars_sums(self, kernels, plan, weights, grads, firsts) -> tuple[Tensor, Tensor]:
        """{g.g, g.f, f.f} and {w.w, 0, 0} of each parameter, of the weights before the ascent."""
        of_buckets = [
            kernels.sharpness_sums(plan.before_of(kernels, w, b.rows.start), [], [0], 0.0)
            for b, w in zip(plan.buckets, weights, strict=True)
        ]
        of_weights = torch.cat(of_buckets) if len(of_buckets) > 1 else of_buckets[0]
        of_gradients = kernels.sharpness_sums(grads, firsts or [], [1] if firsts else [0], 0.0)
        if plan.sharded:
            _tensors.sum_over_shards(of_gradients, plan.params)
            _tensors.sum_over_shards(of_weights, plan.params)
        return of_gradients, of_weights

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step of the base optimizer.

        Args:
            closure: computes the loss anew and its gradients; called once, with gradients enabled.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._tick_averages()
        grads, has = self._collect()
        plan = self._plan(grads, has)
        self._descend(plan, plan.take(grads), self._scaled_mix(None, None), None, None)
        return loss

    # Averages --------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The parameters hold their averages inside the block and their own values, bit for bit, after it.

        Batch normalisation needs statistics of the averaged weights: ``torch.optim.swa_utils.update_bn`` takes them.
        """
        chosen = [p for p, _ in self._of_groups() if AVERAGE in self.state.get(p, ())]
        if not chosen:
            raise RuntimeError(f"{self._name}.averaged: no parameter has an average; pass average='ema' or 'mean'")
        before = [p.detach().clone() for p in chosen]
        with torch.no_grad():
            for p in chosen:
                p.copy_(self.state[p][AVERAGE])
        try:
            yield
        finally:
            with torch.no_grad():
                for p, value in zip(chosen, before, strict=True):
                    p.copy_(value)

    # Saving ----------------------------------------------------------------------------------------------------------

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` gave, bit for bit: states keep their own precision.

        Raises:
            ValueError: a state does not have the shape of its parameter, as in a file of another number of ranks.
        """
        self._check_state(state_dict)
        super().load_state_dict(state_dict)
        for _, p, name, value in self._saved_states(state_dict):
            # torch casts states to the parameter's type, which loses bits where that has 16.
            self.state[p][name] = value.detach().to(_tensors.local(p).device, copy=True)
        self._forget_plans()

    def _saved_states(self, state_dict: dict[str, Any]) -> Iterator[tuple[int, Tensor, str, Tensor]]:
        """Number, parameter, name and value of every state but the counts of steps."""
        numbers = (n for group in state_dict["param_groups"] for n in group["params"])
        for number, p in zip(numbers, self._all(), strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor) and name != "step":
                    yield number, p, name, value

    def _check_state(self, state_dict: dict[str, Any]) -> None:
        sizes = [len(group["params"]) for group in state_dict["param_groups"]]
        own = [len(group["params"]) for group in self.param_groups]
        if sizes != own:
            raise ValueError(f"{self._name}.load_state_dict: groups must hold {own} parameters, got {sizes}")
        for number, p, name, value in self._saved_states(state_dict):
            if not _tensors.fits(value, p):
                sharded = _tensors.is_dtensor(p) or _tensors.is_dtensor(value)
                hint = "; torch.distributed.checkpoint reshards" if sharded else ""
                raise ValueError(
                    f"{self._name}.load_state_dict: {name} of parameter {number} must be {_tensors.described(p)},"
                    f" got {_tensors.described(value)}{hint}"
                )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget_plans()

    #: What copies and pickles leave out: it is made again.
    _remade = ("_plans", "_members", "_flat", "_numbers", "_hyper", "_steps", "_plain_mix", "step")

    def __getstate__(self) -> dict[str, Any]:
        own = {k: v for k, v in self.__dict__.items() if k not in self._remade and not k.startswith("_optimizer_")}
        return {**own, **super().__getstate__()}

# SPDX-License-Identifier: Apache-2.0
"""Relatives of SAM: the same two passes, other directions ``c1 g1 + c2 g2``, or other places to perturb."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastflat import backends
from fastflat._ops.sharpness import METRICS, SUM_GRADIENT, SUM_PAIR
from fastflat.optim import _tensors
from fastflat.optim._plans import Plan
from fastflat.optim.sam import SAM


class _Mixed(SAM):
    """A SAM that mixes both gradients; the first ones are kept without a copy where nobody else writes them."""

    def first_step(self, zero_grad: bool = False) -> None:
        super().first_step(zero_grad=False)
        self._firsts = {
            p: p.grad.clone() if not zero_grad or _tensors.shares_memory(_tensors.local(p.grad)) else p.grad
            for p, _ in self._of_groups()
            if p.grad is not None
        }
        self._end_pass(zero_grad)

    def accumulate(self) -> None:
        raise RuntimeError(
            f"{self._name}.accumulate: a direction of both gradients must be taken in one batch; use SAM"
        )

    def _first_gradients(self, plan: Plan, grads: list[Tensor]) -> list[Tensor]:
        firsts = []
        for p, g in zip(plan.params, grads, strict=True):
            first = self._firsts.get(p)
            firsts.append(torch.zeros_like(g) if first is None else _tensors.local(first))
        return firsts

    def _refuse_unscaled(self) -> None:
        """``GradScaler.unscale_`` reaches the last gradients only: a sum with earlier ones would mix two units."""
        scale, found = self._scaling()
        if found is not None and scale is None:
            self.restore()
            raise RuntimeError(
                f"{self._name}.step: gradients must come scaled, as those of the first pass are, got them after"
                " scaler.unscale_; leave that to scaler.step"
            )

    def _products(self, plan: Plan, grads: list[Tensor], firsts: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """``g2.g2, g2.g1, g1.g1`` over all parameters, fp64 on their device."""
        kernels = backends.kernels(self._device().type)
        with torch._C._AutoDispatchBelowAutograd():
            sums = kernels.sharpness_sums(grads, firsts, [SUM_PAIR], 0.0)
        if plan.sharded:
            _tensors.sum_over_shards(sums, plan.params)
        return sums.sum(0).unbind()


class GSAM(_Mixed):
    """Surrogate-gap SAM: ``u = g2 - alpha g1'``, g1' the part of g1 orthogonal to g2.

    Args:
        alpha: weight of the orthogonal part, at least 0; 0 is SAM. Published: 0.4 (ResNets), 0.05 to 0.6 (ViT).

    Others as :class:`SAM`, but not after ``scaler.unscale_``. Source: Zhuang et al. 2022 (arXiv
    2203.08065), equation 10.
    """

    def __init__(self, params, base="sgd", rho: float = 0.05, alpha: float = 0.4, **options: Any):
        if not 0 <= alpha < float("inf"):
            raise ValueError(f"fastflat.optim.GSAM: alpha must be a finite number of at least 0, got {alpha!r}")
        self.alpha = float(alpha)
        super().__init__(params, base, rho, **options)

    def _mixture(self, plan, grads):
        self._refuse_unscaled()
        firsts = self._first_gradients(plan, grads)
        gg, gf, _ = self._products(plan, grads, firsts)
        along = torch.where(gg > 0, gf / gg, torch.zeros_like(gg))
        return (-self.alpha, 1.0 + self.alpha * along), firsts


class GNP(_Mixed):
    """Penalty on the gradient's norm, ``L + lambda |g|`` with ``lambda = alpha rho``.

    =================  ================================================================
    ``normed=False``   ``u = (1 - alpha) g1 + alpha g2``, the published update
    ``normed=True``    ``u = (1 - alpha) g1/|g1| + alpha g2``, what the released code does by default
    =================  ================================================================

    Args:
        alpha: share of the second gradient, in [0, 1]; 1 is SAM, 0 the base. Published: 0.8.
        normed: which of the two. The second never vanishes: at a constant rate it stalls further from a minimum.

    Others as :class:`SAM`, but without ``normed`` not after ``scaler.unscale_``. Source: Zhao et al. 2022
    (arXiv 2202.03599), equations 8 to 12.
    """

    def __init__(self, params, base="sgd", rho: float = 0.1, alpha: float = 0.8, normed: bool = False, **options: Any):
        if not 0 <= alpha <= 1:
            raise ValueError(f"fastflat.optim.GNP: alpha must lie in [0, 1], got {alpha!r}")
        self.alpha, self.normed = float(alpha), bool(normed)
        super().__init__(params, base, rho, **options)

    def _mixture(self, plan, grads):
        if self.alpha == 1.0:
            return None, None
        firsts = self._first_gradients(plan, grads)
        c1: Tensor | float = 1.0 - self.alpha
        if self.normed:
            _, _, ff = self._products(plan, grads, firsts)
            norm = ff.sqrt()
            c1 = torch.where(norm > 0, (1.0 - self.alpha) / norm, torch.zeros_like(norm))
            scale, _ = self._scaling()
            if scale is not None:  # g1/|g1| has no scale to take away
                c1 = c1 * scale.to(c1.device, c1.dtype)
        else:
            self._refuse_unscaled()
        return (c1, self.alpha), firsts


class HERO(_Mixed):
    """Adaptive SAM with a penalty on how much the gradient changes: ``R = strength sum_i mean((g2_i - g1_i)^2)`` over
    the tensors of at least two axes, ``u = g2 + H(w + e) r`` with ``r_i = 2 strength/n_i (g2_i - g1_i)``.

    The product with the Hessian is a finite difference: a third pass at ``w + e + fd_radius r/|r|``. ``step(closure)``
    does all three; by hand :meth:`middle_step` comes between the two others. In fp32 the difference is right to about
    1e-3 of the product at the default radius; gradients in 16 bits are refused.

    Args:
        rho: radius of the adaptive ascent (the paper's h). Published: 0.5 for ResNet-20, 0.01 in the code.
        strength: the paper's lambda. Published: 5.
        fd_radius: length of the third step.

    Others as :class:`SAM`, but not after ``scaler.unscale_``. Source: Yang et al. 2022 (arXiv
    2111.11986). With ``strength=0`` it is adaptive SAM.
    """

    def __init__(
        self, params, base="sgd", rho: float = 0.5, strength: float = 5.0, fd_radius: float = 1e-3, **options: Any
    ):
        op = "fastflat.optim.HERO"
        if not 0 <= strength < float("inf") or not 0 < fd_radius < float("inf"):
            raise ValueError(
                f"{op}: strength must be at least 0 and fd_radius positive, got {strength!r} and {fd_radius!r}"
            )
        if not options.pop("adaptive", True):
            raise ValueError(f"{op}: adaptive must be True, got False; its ascent is the adaptive one")
        self.strength, self.fd_radius = float(strength), float(fd_radius)
        self._k: Tensor | None = None
        super().__init__(params, base, rho, True, **options)
        if any(_tensors.local(p).element_size() < 4 for p in self._all()):
            raise ValueError(f"{op}: parameters must be float32 or float64, got 16 bits: their differences are noise")

    def _start_over(self) -> None:
        super()._start_over()
        self._k = None

    @torch.no_grad()
    def middle_step(self, zero_grad: bool = False) -> None:
        """The third place, from the gradients at ``w + e``.

        Args:
            zero_grad: whether to drop the gradients afterwards.
        """
        if not self._between or self._k is not None:
            raise RuntimeError(f"{self._name}.middle_step: first_step() and a second backward() must come before it")
        seconds = {p: p.grad.clone() for p, _ in self._of_groups() if p.grad is not None}
        perturbed = set(self._ascent.params) if self._ascent is not None else ()
        chosen = [p for p in seconds if p.dim() > 1 and p in self._firsts and p in perturbed]
        if not chosen and not any(group["rho"] for group in self.param_groups):
            self._firsts, self._k = seconds, torch.zeros((), dtype=torch.float64, device=self._device())
            self._end_pass(zero_grad)
            return
        if not chosen:
            raise RuntimeError(f"{self._name}.middle_step: no perturbed tensor of two axes or more has both gradients")
        own = [_tensors.local(seconds[p]) for p in chosen]
        change = torch._foreach_sub(own, [_tensors.local(self._firsts[p]) for p in chosen])
        torch._foreach_mul_(change, [2.0 * self.strength / p.numel() for p in chosen])
        kernels = backends.kernels(self._device().type)
        radius = torch.full((len(chosen),), self.fd_radius, dtype=torch.float64, device=self._device())
        with torch._C._AutoDispatchBelowAutograd():
            sums = kernels.sharpness_sums(change, [], [SUM_GRADIENT], 0.0)
            if any(map(_tensors.is_dtensor, chosen)):
                _tensors.sum_over_shards(sums, chosen)
            scale = kernels.sharpness_scale(sums, radius, 0.0, False)
            ws = [_tensors.local(p) for p in chosen]
            kernels.sharpness_ascent_(ws, change, [], None, [], scale, [METRICS["l2"]], 0.0, None)
        torch.autograd.graph.increment_version(chosen)
        with_product = set(chosen)
        self._note_overflow(scale[-1], [_tensors.local(seconds[p]) for p in seconds if p not in with_product])
        # |r| over the radius: what the difference is multiplied with, once a loss scale is taken from it.
        self._k = scale[-2] / self.fd_radius
        self._firsts = seconds
        self._end_pass(zero_grad)

    def _note_overflow(self, flag: Tensor, others: list[Tensor]) -> None:
        """An infinity in the second pass ends the step under GradScaler, as one in the first does."""
        if self._flag is None:
            return
        if others:
            norms = torch.stack([n.to(flag.dtype) for n in torch._foreach_norm(others)])
            flag = torch.maximum(flag, (~norms.isfinite().all()).to(flag.dtype))
        self._flag = torch.maximum(self._flag, flag)

    def second_step(self, zero_grad: bool = False) -> None:
        if self.strength and self._between and self._k is None:
            raise RuntimeError(f"{self._name}.second_step: middle_step() and a third backward() must come before it")
        super().second_step(zero_grad)

    def _mixture(self, plan, grads):
        if not self.strength:
            return None, None
        self._refuse_unscaled()
        scale, _ = self._scaling()
        k = self._k if scale is None else self._k / scale.to(self._k.device, self._k.dtype)
        return (1.0 - k, k), self._first_gradients(plan, grads)

    def _between_passes(self, closure: Callable[[], Tensor]) -> None:
        if not self.strength:
            return
        with self.second_pass(), torch.enable_grad():
            closure()
        self.middle_step(zero_grad=True)


class SAQ(SAM):
    """SAM through weight quantizers Q, in the three forms of the paper:

    ====  ==================================================================================
    1     ``Q(w + e)``: the weights move, most codes do not, a few move by a whole step
    2     ``Q(w + e)`` with e along the gradient at ``Q(w)`` (straight through, clipped ones too)
    3     ``Q(w) + e``, e along the gradient at ``Q(w)``: the form of the released code, default
    ====  ==================================================================================

    Args:
        params: parameters, groups or a model. Of a model made by :func:`fastflat.prepare` the weight quantizers are
            found; of any other the ``quantizers`` are given.
        case: 1, 2 or 3.
        quantizers: modules that map a weight to its quantized values, with the parameter each one is called with:
            pairs ``(module, weight)``. Each is called once a pass.

    The norm is taken over the gradients at the quantized weights and those of the other perturbed parameters. Others as
    :class:`SAM`. Source: Liu et al. 2021 (arXiv 2111.12273).
    """

    def __init__(
        self,
        params,
        base="sgd",
        rho: float = 0.05,
        *,
        case: int = 3,
        quantizers: Iterable[tuple[nn.Module, Tensor]] | None = None,
        **options: Any,
    ):
        op = "fastflat.optim.SAQ"
        if case not in (1, 2, 3):
            raise ValueError(f"{op}: case must be 1, 2 or 3, got {case!r}")
        if options.get("storage", "backup") != "backup" or options.get("adaptive"):
            raise ValueError(f"{op}: storage must be 'backup' and adaptive False, got {options!r}")
        model = params if isinstance(params, nn.Module) else options.get("model")
        if quantizers is None:
            quantizers = weight_quantizers(model) if model is not None else ()
        self.case, self._pairs = case, [] if case == 1 else list(quantizers)
        if case != 1 and not self._pairs:
            raise ValueError(f"{op}: quantizers must be given where params is no model with quantized weights")
        self._outputs: dict[Tensor, Tensor] = {}
        self._added: dict[Tensor, Tensor] = {}
        super().__init__(params, base, rho, **options)
        own = set(map(id, self._all()))
        if any(id(w) not in own for _, w in self._pairs):
            raise ValueError(f"{op}: quantizers must belong to parameters of the optimizer, got one that does not")
        if any(_tensors.is_dtensor(w) for _, w in self._pairs):
            raise ValueError(f"{op}: quantized weights must be plain parameters, got a DTensor; use case=1")
        for module, w in self._pairs:
            module.register_forward_hook(self._hook(w))

    def _hook(self, w: Tensor) -> Callable:
        def after(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
            if w in self._added:
                return output + self._added[w].to(output.dtype)
            if torch.is_grad_enabled() and output.requires_grad:
                output.retain_grad()
                self._outputs[w] = output
            return None

        return after

    def first_step(self, zero_grad: bool = False) -> None:
        if self.case == 1:
            return super().first_step(zero_grad)
        at_codes = {w: y.grad for w, y in self._outputs.items() if y.grad is not None and w.grad is not None}
        if not at_codes:
            raise RuntimeError(
                f"{self._name}.first_step: no quantizer was called since the last step; pass quantizers= of this model"
            )
        own = {w: w.grad for w in at_codes}
        for w, g in at_codes.items():
            w.grad = g.to(w.dtype)
        try:
            super().first_step(zero_grad=False)
        finally:
            for w, g in own.items():
                w.grad = g
            self._outputs.clear()
        if self.case == 3:
            self._move_behind(list(at_codes))
        self._end_pass(zero_grad)
        return None

    @torch.no_grad()
    def _move_behind(self, ws: list[Tensor]) -> None:
        """The perturbation of quantized weights moves from w to what the quantizer gives."""
        for w in ws:
            place = None if self._ascent is None else self._ascent.place.get(w)
            if place is None:  # of a group with rho 0
                continue
            before = _tensors.kept(self._ascent.backup, place, w)
            self._added[w] = w - before
            w.copy_(before)

    def _start_over(self) -> None:
        super()._start_over()
        self.__dict__.setdefault("_added", {}).clear()


def weight_quantizers(model: nn.Module) -> Iterator[tuple[nn.Module, Tensor]]:
    """The weight quantizers of a model of :func:`fastflat.prepare`, each with its weight."""
    for layer in model.modules():
        find = getattr(layer, "weight_quantizers", None)
        if callable(find):
            for name, quantizer in find().items():
                yield quantizer, getattr(layer, name)

# SPDX-License-Identifier: Apache-2.0
"""Gauss-Newton and Fisher matrices: the Jacobian of the outputs, a small matrix between, the Jacobian back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from fastflat import _checks
from fastflat.curvature._batch import Batch
from fastflat.curvature._differentiate import gradient
from fastflat.curvature._interpreter import Linear
from fastflat.curvature._problem import Traced
from fastflat.curvature._tracing import Constants, trace
from fastflat.curvature.operators import Operator


class _ThroughOutputs(Operator):
    """``J^T M J`` with J the Jacobian of the outputs by the parameters; a subclass says what M does."""

    def _pushed(self, batch, tangents, wanted=None):
        linear, traced = self._problem.at(batch, with_outputs=True)
        moved = linear.push({traced.params[i]: t for i, t in tangents.items()}, traced.outputs)
        points = [linear.value(z) for z in traced.outputs]
        k = len(next(iter(tangents.values())))
        moved = [p.new_zeros(k, *p.shape) if m is None else m for m, p in zip(moved, points, strict=True)]
        back = self._between(batch, linear, traced, points, moved)
        seeds = {c: b for c, b in zip(traced.cotangents, back, strict=True) if b is not None}
        wanted = range(len(self._problem.names)) if wanted is None else wanted
        if not seeds:
            return [None] * len(wanted)
        return linear.push(seeds, [traced.gradients[i] for i in wanted])

    def _between(
        self, batch: Batch, linear: Linear, traced: Traced, points: list[Tensor], moved: list[Tensor]
    ) -> list[Tensor | None]:
        """M times K tangents of the outputs."""
        raise NotImplementedError

    def _loss_at(self, batch: Batch, linear: Linear, targets: Any = None) -> tuple[Linear, list[int], list[int | None]]:
        """The gradient of the loss by the outputs, linearised: inputs and outputs of its program."""
        key = ("loss", targets is not None)
        if key not in self._at_batch(linear):
            self._at_batch(linear)[key] = self._linearised_loss(batch, linear, targets)
        return self._at_batch(linear)[key]

    def _at_batch(self, linear: Linear) -> dict[Any, Any]:
        """What this operator keeps for as long as the model is linearised at one batch."""
        if getattr(self, "_kept", (None,))[0] is not linear:
            self._kept = (linear, {})
        return self._kept[1]

    def _linearised_loss(self, batch: Batch, linear: Linear, targets: Any):
        _, traced = self._problem.at(batch, with_outputs=True)
        points = [linear.value(z) for z in traced.outputs]
        if targets is None:
            _, targets = batch.together(batch.tensors)
        leaves, spec = pytree.tree_flatten(targets)
        tensors = [t for t in leaves if isinstance(t, Tensor)]
        shapes = tuple((t.shape, t.dtype) for t in (*points, *tensors))
        rest = tuple(None if isinstance(t, Tensor) else t for t in leaves)
        programs = self.__dict__.setdefault("_losses", {})
        key = (shapes, spec, rest, id(traced))
        if key not in programs:

            def function(twice, outputs, given):
                outputs = [z.detach().requires_grad_() for z in outputs]
                found = iter(given)
                target = pytree.tree_unflatten([next(found) if t is None else t for t in rest], spec)
                with torch.enable_grad():
                    with Constants([*outputs, *given]):
                        loss = self._problem.loss(traced.output_of(outputs), target)
                    return gradient(loss, outputs, twice=twice)

            programs[key] = trace(function, points, tensors)
        program = programs[key]
        return Linear(program, [*points, *tensors], {}, self._problem.tangent_dtype), program.inputs, program.outputs


class GGN(_ThroughOutputs):
    """The generalised Gauss-Newton matrix ``G = J^T H_out J``: the Hessian as if the network were linear in its
    parameters. Positive semidefinite where the loss is convex in the outputs. 1F + 4F K multiply-adds.

    For cross-entropy and squared error G is the Fisher matrix of the model's own predictions. Where outputs are
    piecewise linear in each layer's parameters (ReLU, max-pool, batch norm in eval mode, straight-through quantizers)
    each parameter's own block of H is that of G.

    Arguments and errors as in :class:`fastflat.curvature.Hessian`, without ``method``.

    Source: Schraudolph, Neural Computation 14(7), 2002.
    """

    def _between(self, batch, linear, traced, points, moved):
        loss, inputs, outputs = self._loss_at(batch, linear)
        seeds = dict(zip(inputs[: len(points)], moved, strict=True))
        return loss.push(seeds, outputs)


class Fisher(_ThroughOutputs):
    """The Fisher matrix from gradients of single rows, ``F = mean_i g_i g_i^T``.

    ``kind="sampled"``: labels drawn from the model's own predictions, so that the mean over draws is the Fisher matrix
    (equal to the GGN for cross-entropy and squared error). ``kind="empirical"``: the labels of the data, which is no
    curvature but a second moment of gradients. With ``reduction="sum"`` the sum over rows.

    Args:
        kind: as above.
        samples: draws for each row, of ``"sampled"``.
        seed: of the draws, which are the same at each product: F is one fixed matrix.
        sample: how to draw, ``(output, generator) -> targets``. By default from the softmax over axis 1 where targets
            are integers, and of the normal distribution that squared error belongs to where the loss is
            ``F.mse_loss`` or ``nn.MSELoss``.

    The loss must be a mean (sum) of rows that do not see each other. Other arguments and errors as in
    :class:`fastflat.curvature.Hessian`, without ``method``.

    Source: Kunstner et al., NeurIPS 2019, for what the two kinds are.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        data: Any,
        params: Any = None,
        *,
        kind: str = "sampled",
        samples: int = 1,
        seed: int = 0,
        sample: Callable[[Any, torch.Generator], Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, loss_fn, data, params, **options)
        if kind not in ("sampled", "empirical"):
            _checks.fail(self._name, "kind", "be 'sampled' or 'empirical'", repr(kind))
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            _checks.fail(self._name, "samples", "be a positive int", repr(samples))
        self._kind, self._samples, self._seed, self._sample = kind, samples, seed, sample

    def _own(self):
        return {"kind": self._kind, "samples": self._samples, "seed": self._seed, "sample": self._sample}

    def _between(self, batch, linear, traced, points, moved):
        kept = self._at_batch(linear)
        if "rows" not in kept:
            kept["rows"] = self._row_gradients(batch, linear, traced, points)
        total: list[Tensor | None] = [None] * len(points)
        for rows, weight in kept["rows"]:
            inner = sum((m * g).flatten(2).sum(2) if m.dim() > 2 else m * g for m, g in zip(moved, rows, strict=True))
            for i, g in enumerate(rows):
                term = inner.view(*inner.shape, *(1,) * (g.dim() - 1)) * (g * weight)
                total[i] = term if total[i] is None else total[i] + term
        return total

    def _row_gradients(self, batch, linear, traced, points):
        """For each draw the gradients of the rows' own losses by the outputs, and the factor of their products."""
        mean = self._problem.reduction == "mean" and self._problem.row_weight is None
        found = []
        for draw in range(self._samples if self._kind == "sampled" else 1):
            targets = None
            if self._kind == "sampled":
                generator = torch.Generator(self.device).manual_seed(self._seed + draw)
                targets = self._drawn(batch, traced.output_of(points), generator)
            loss, _, outputs = self._linearised_loss(batch, linear, targets)
            rows = [loss.value(g) * (batch.size if mean else 1) for g in outputs]
            count = self._samples if self._kind == "sampled" else 1
            found.append((rows, 1 / (count * (batch.size if mean else 1))))
        return found

    def _drawn(self, batch: Batch, output: Any, generator: torch.Generator) -> Any:
        if self._sample is not None:
            return self._sample(output, generator)
        _, target = batch.together(batch.tensors)
        loss_fn = self._problem.loss_fn
        if isinstance(output, Tensor) and isinstance(target, Tensor) and output.dim() > 1:
            if not target.is_floating_point() and target.shape == output.shape[:1] + output.shape[2:]:
                p = output.movedim(1, -1).softmax(-1)
                return torch.multinomial(p.reshape(-1, p.shape[-1]), 1, generator=generator).reshape(target.shape)
            if loss_fn is F.mse_loss or isinstance(loss_fn, nn.MSELoss):
                spread = (output[0].numel() if self._problem.reduction == "mean" else 1) / 2
                noise = torch.randn(output.shape, generator=generator, dtype=output.dtype, device=output.device)
                return output + spread**0.5 * noise
        return _checks.fail(
            self._name, "sample", "be given where labels are not classes and the loss is not F.mse_loss", "None"
        )

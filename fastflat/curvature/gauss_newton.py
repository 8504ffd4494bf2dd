# SPDX-License-Identifier: Apache-2.0
"""Gauss-Newton and Fisher matrices: the Jacobian of the outputs, a small matrix between, the Jacobian back."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from fastflat import _checks
from fastflat.curvature._batch import Batch
from fastflat.curvature._differentiate import gradient
from fastflat.curvature._interpreter import Linear
from fastflat.curvature._program import Program, Untraceable
from fastflat.curvature._tracing import Constants, trace
from fastflat.curvature.operators import Operator


class Outputs(NamedTuple):
    """The outputs of the model at one batch; ``kept`` is what an operator makes of them once."""

    tensors: list[Tensor]
    together: Callable[[list[Tensor]], Any]  # what the model returns, made of such tensors
    kept: dict[Any, Any]


class _ThroughOutputs(Operator):
    """``J^T M J`` with J the Jacobian of the outputs by the parameters; a subclass says what M does."""

    _at: tuple[Linear, Outputs] | None = None
    _loops = False

    def _pushed(self, batch, tangents, wanted, take):
        if not self._loops:
            try:
                self._through(batch, tangents, wanted, take)
                return
            except Untraceable as reason:
                self._loops = True
                warnings.warn(f"fastflat.{self._name}: {reason}; double backward takes its place", stacklevel=5)
        for number, found in enumerate(self._looped(batch, tangents, wanted)):
            if found is not None:
                take(number, found)

    def _forms(self, batch, tangents, groups):
        if self._loops:
            raise Untraceable("the model cannot be traced")
        _, _, moved, back = self._at_outputs(batch, tangents)
        forms = [(m.double() * b).flatten(1).sum(1) for m, b in zip(moved, back, strict=True) if b is not None]
        return sum(forms).unflatten(0, (groups, -1)).sum(1) if forms else None

    def _at_outputs(self, batch, tangents):
        """K tangents of the outputs, and M times them."""
        linear, traced = self._problem.at(batch, "outputs")
        if self._at is None or self._at[0] is not linear:
            self._at = (linear, Outputs([linear.value(z) for z in traced.outputs], traced.output_of, {}))
        outputs = self._at[1]
        seeds = {traced.params[i]: t for i, t in tangents.items()}
        moved = linear.push(seeds, traced.outputs, first_of_two=True)
        k = len(next(iter(tangents.values())))
        moved = [z.new_zeros(k, *z.shape) if m is None else m for m, z in zip(moved, outputs.tensors, strict=True)]
        return linear, traced, moved, self._between(batch, outputs, moved)

    def _through(self, batch, tangents, wanted, take):
        linear, traced, _, back = self._at_outputs(batch, tangents)
        seeds = {c: b for c, b in zip(traced.cotangents, back, strict=True) if b is not None}
        if seeds:
            linear.push(seeds, [traced.gradients[i] for i in wanted], take)

    def _looped(self, batch, tangents, wanted):
        """The same one vector after another: ``J v`` is the derivative, by the cotangent, of ``<J^T c, v>``."""
        values = [p.detach().requires_grad_() for p in self._problem.params]
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            with self._problem.draws_given_back():
                leaves, spec = pytree.tree_flatten(self._problem.output(batch, values))
            out = [z for z in leaves if isinstance(z, Tensor) and z.requires_grad]
            cotangents = [torch.zeros_like(z, requires_grad=True) for z in out]
            pulled = torch.autograd.grad(out, values, cotangents, create_graph=True, allow_unused=True)
            moving = [(i, g) for i, g in enumerate(pulled) if i in tangents and g is not None and g.requires_grad]
            if not moving:
                return [None] * len(wanted)
            rows = []
            for k in range(len(next(iter(tangents.values())))):
                along = [tangents[i][k] for i, _ in moving]
                row = torch.autograd.grad([g for _, g in moving], cotangents, along, retain_graph=True)
                rows.append([r.detach() for r in row])

        def together(tensors):
            there = iter(tensors)
            moves = (isinstance(z, Tensor) and z.requires_grad for z in leaves)
            return pytree.tree_unflatten([next(there) if m else z for m, z in zip(moves, leaves, strict=True)], spec)

        moved = [torch.stack(column) for column in zip(*rows, strict=True)]
        back = self._between(batch, Outputs([z.detach() for z in out], together, {}), moved)
        chosen = [values[i] for i in wanted]
        found = [
            torch.autograd.grad(out, chosen, row, retain_graph=True, allow_unused=True)
            for row in zip(*back, strict=True)
        ]
        return [None if column[0] is None else torch.stack(column) for column in zip(*found, strict=True)]

    def _between(self, batch: Batch, outputs: Outputs, moved: list[Tensor]) -> list[Tensor | None]:
        """M times K tangents of the outputs."""
        raise NotImplementedError

    def _loss(self, batch: Batch, outputs: Outputs, targets: Any = None) -> tuple[Linear, Program]:
        """The gradient of the loss by the outputs, linearised; targets are the batch's own unless given."""
        if targets is None:
            _, targets = batch.together(batch.tensors)
        leaves, spec = pytree.tree_flatten(targets)
        tensors = [t for t in leaves if isinstance(t, Tensor)]
        shapes = tuple((t.shape, t.dtype) for t in (*outputs.tensors, *tensors))
        rest = tuple(None if isinstance(t, Tensor) else t for t in leaves)
        programs = self.__dict__.setdefault("_losses", {})
        key = (shapes, spec, rest)
        if key not in programs:

            def function(twice, points, given):
                points = [z.detach().requires_grad_() for z in points]
                found = iter(given)
                target = pytree.tree_unflatten([next(found) if t is None else t for t in rest], spec)
                with torch.enable_grad():
                    with Constants([*points, *given]):
                        loss = self._problem.loss(outputs.together(points), target)
                    return gradient(loss, points, twice=twice)

            programs[key] = trace(function, outputs.tensors, tensors)
        program = programs[key]
        return Linear(program, [*outputs.tensors, *tensors], {}, self._problem.tangent_dtype), program


class GGN(_ThroughOutputs):
    """The generalised Gauss-Newton matrix ``G = J^T H_out J``: the Hessian as if the network were linear in its
    parameters. Positive semidefinite where the loss is convex in the outputs. 1F + 4F K multiply-adds.

    For cross-entropy and squared error G is the Fisher matrix of the model's own predictions. Where outputs are
    piecewise linear in each layer's parameters (ReLU, max-pool, batch norm in eval mode, straight-through quantizers)
    each parameter's own block of H is that of G.

    Arguments and errors as in :class:`fastflat.curvature.Hessian`, without ``method``.

    Source: Schraudolph, Neural Computation 14(7), 2002.
    """

    _gauss_newton = True

    def _between(self, batch, outputs, moved):
        if "loss" not in outputs.kept:
            outputs.kept["loss"] = self._loss(batch, outputs)
        loss, program = outputs.kept["loss"]
        seeds = dict(zip(program.inputs[: len(moved)], moved, strict=True))
        return [
            torch.zeros_like(m) if b is None else b
            for b, m in zip(loss.push(seeds, program.outputs), moved, strict=True)
        ]


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

    def _between(self, batch, outputs, moved):
        if "rows" not in outputs.kept:
            outputs.kept["rows"] = self._row_gradients(batch, outputs)
        total = [torch.zeros_like(m) for m in moved]
        for rows, weight in outputs.kept["rows"]:
            inner = sum((m * g).flatten(2).sum(2) if m.dim() > 2 else m * g for m, g in zip(moved, rows, strict=True))
            for into, g in zip(total, rows, strict=True):
                into.addcmul_(inner.view(*inner.shape, *(1,) * (g.dim() - 1)), g, value=weight)
        return total

    def _row_gradients(self, batch: Batch, outputs: Outputs) -> list[tuple[list[Tensor], float]]:
        """For each draw the gradients of the rows' own losses by the outputs, and the factor of their products."""
        rows = batch.size if self._problem.reduction == "mean" and self._problem.row_weight is None else 1
        draws = self._samples if self._kind == "sampled" else 1
        found = []
        for draw in range(draws):
            targets = None
            if self._kind == "sampled":
                generator = torch.Generator(self.device).manual_seed(self._seed + draw)
                targets = self._drawn(batch, outputs.together(outputs.tensors), generator)
            loss, program = self._loss(batch, outputs, targets)
            gradients = [
                torch.zeros_like(z) if g is None else loss.value(g) * rows
                for g, z in zip(program.outputs, outputs.tensors, strict=True)
            ]
            found.append((gradients, 1 / (draws * rows)))
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

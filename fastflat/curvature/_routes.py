# SPDX-License-Identifier: Apache-2.0
"""Traces of all layers by the cheapest exact route: sampled gradients, own blocks or joint probes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastflat import _checks
from fastflat.curvature import _batch, _estimate, _piecewise, _trace
from fastflat.curvature._batch import Batch
from fastflat.curvature._estimate import Bar, Estimate, Moments
from fastflat.curvature._probes import LEAST, Probes

if TYPE_CHECKING:
    from fastflat.curvature.operators import Operator

ROUTES = ("auto", "sampled", "own", "joint")


_FORM = "the loss is neither a softmax cross-entropy nor a sum over the outputs"


class LayerTraces(dict[str, Estimate]):
    """Traces by the name of the parameter, and how they came about.

    Attributes:
        route: ``"sampled"``, ``"own"`` or ``"joint"``.
        reason: why this one.
    """

    def __init__(self, estimates: dict[str, Estimate], route: str, reason: str) -> None:
        super().__init__(estimates)
        self.route, self.reason = route, reason


class _OtherLoss(Exception):
    """The loss is not one whose curvature in the outputs can be drawn; the message says why."""


def layer_traces(
    op: Operator,
    route: str,
    gauss_newton: bool | None,
    rtol: float,
    max_products: int,
    chunk: int,
    atol: float,
    generator: torch.Generator,
    progress: bool,
) -> LayerTraces:
    """See :meth:`fastflat.curvature.Operator.layer_traces`. ``gauss_newton``: the blocks are those of the Gauss-Newton
    matrix always (True), where outputs are piecewise linear in them (None), or not at all (False)."""
    _estimate.one_of("layer_traces", "route", route, ROUTES)
    limit = _estimate.count("layer_traces", "max_products", max_products, 1)
    run = Probes("layer_traces", op, rtol, atol, limit, chunk, generator)
    reason = "as asked"
    if route in ("auto", "sampled"):
        against = _against(op, gauss_newton)
        if against is None:
            try:
                with Bar("layer_traces", limit, progress) as run.bar:
                    return LayerTraces(_sampled(run, list(op.blocks)), "sampled", _why(gauss_newton))
            except _OtherLoss as found:
                against = str(found)
        if route == "sampled":
            _checks.fail("curvature.layer_traces", "route", "be one that is exact here", f"'sampled': {against}")
        route, reason = "own", against
    with_blocks = op if route == "own" else _WithoutBlocks(op)
    options = {"atol": atol, "generator": generator, "progress": progress}
    return LayerTraces(_trace.layer_traces(with_blocks, rtol, max_products, chunk, **options), route, reason)


class _WithoutBlocks:
    """An operator whose own blocks are not used."""

    def __init__(self, op: Operator) -> None:
        self.shape, self.dtype, self.device = op.shape, op.dtype, op.device
        self.blocks, self.matmat = op.blocks, op.matmat


def _why(gauss_newton: bool | None) -> str:
    if gauss_newton:
        return "the Gauss-Newton matrix is the second moment of gradients whose errors are drawn from the model"
    return "outputs are piecewise linear in each parameter, so that its block is that of the Gauss-Newton matrix"


def _against(op: Operator, gauss_newton: bool | None) -> str | None:
    """What speaks against sampled gradients before the loss is looked at."""
    if gauss_newton is False:
        return "the matrix is that of fixed gradients of single rows"
    if op._group is not None:
        return "the data lie on several processes"
    if gauss_newton:
        return None
    first = next(_batch.batches(op._name, op._data))
    return _piecewise.broken(op._problem, first)


def _sampled(run: Probes, names: list[str]) -> dict[str, Estimate]:
    """``tr G_bb = E |J_b^T r|^2`` with ``E r r^T = H_out``: one backward pass for each draw gives all blocks."""
    op, moments = run.op, Moments()
    least = min(max(LEAST, 2 * run.chunk), run.limit)
    while True:
        draws = min(run.chunk, run.limit - moments.count)
        total, weight = torch.zeros(draws, len(names), dtype=torch.float64, device=op.device), 0.0
        for batch in _parts(op):
            weight += op._problem.weight(batch)
            total.add_(_squares(op, batch, draws, run.generator), alpha=op._problem.share(batch))
        if op._problem.reduction == "mean" and weight:
            total /= weight
        _estimate.check_finite(run.function, total)
        moments.add(total)
        value, stderr = moments.mean(), moments.stderr()
        done = run.enough(value, stderr)
        run.bar.update(draws, value, stderr)
        if (bool(done.all()) and moments.count >= least) or moments.count >= run.limit:
            done &= moments.count >= 2
            rows = zip(names, value.tolist(), stderr.tolist(), done.tolist(), strict=True)
            return {name: Estimate(v, e, moments.count, ok) for name, v, e, ok in rows}


def _parts(op: Operator) -> Iterator[Batch]:
    for whole in _batch.batches(op._name, op._data):
        op._check_split(whole)
        yield from whole.split(op._microbatch)


def _squares(op: Operator, batch: Batch, draws: int, generator: torch.Generator) -> Tensor:
    """``|J_b^T r|^2`` of each block for some draws, float64 [draws, blocks]."""
    problem = op._problem
    params = [p.detach().requires_grad_() for p in problem.params]
    held, buffers = problem.state()
    state = dict(zip(problem.names, params, strict=True))
    state |= {n: t.detach() for n, t in held.items()} | {n: b.detach().clone() for n, b in buffers.items()}
    inputs, targets = batch.together(batch.tensors)
    with torch.enable_grad(), torch.random.fork_rng({op.device} if op.device.type == "cuda" else ()):
        output = _batch.called(problem.model, state, inputs)
        if not isinstance(output, Tensor) or not output.requires_grad:
            raise _OtherLoss("the model does not return one tensor that moves with its parameters")
        root = _root(op, output.detach(), targets)
        found = torch.zeros(draws, len(params), dtype=torch.float64, device=op.device)
        for k in range(draws):
            pulled = torch.autograd.grad(output, params, root(generator), retain_graph=k < draws - 1, allow_unused=True)
            for b, g in enumerate(pulled):
                if g is not None:
                    found[k, b] = g.double().square().sum()
    return found


def _root(op: Operator, z: Tensor, targets):
    """Draws r with ``E r r^T = H_out`` of the loss at outputs z, whose form is recognised by its products.

    Softmax cross-entropy, however it is written, weighted or smoothed, has ``w_i (diag p_i - p_i p_i^T)`` for each row;
    then ``r_i = sqrt(w_i) (p_i - e_y)`` with y drawn from p_i. A loss that is a sum over the outputs, such as squared
    error or binary cross-entropy, has a diagonal; then r is its root with random signs.
    """
    z = z.requires_grad_()
    gradient = torch.autograd.grad(op._problem.loss(z, targets), z, create_graph=True)[0]
    if not gradient.requires_grad:
        raise _OtherLoss("the loss has no curvature in the outputs")
    # Fixed directions: what is found depends on the loss alone.
    fixed = torch.Generator(op.device).manual_seed(0)
    u, v = (torch.randn(z.shape, generator=fixed, dtype=z.dtype, device=z.device) for _ in range(2))
    hu, hv = (torch.autograd.grad(gradient, z, d, retain_graph=True)[0].double() for d in (u, v))
    z, u, v = z.detach().double(), u.double(), v.double()
    tolerance = 1e-8 if op.dtype == torch.float64 else 1e-3 if op.dtype == torch.float32 else 3e-2
    diagonal = hu / u
    if bool((diagonal >= 0).all()) and _close(hv, diagonal * v, tolerance):

        def signs(generator):
            r = torch.randint(0, 2, z.shape, generator=generator, device=z.device) * 2 - 1
            return (r * diagonal.sqrt()).to(op.dtype)

        return signs
    if z.dim() < 2:
        raise _OtherLoss(_FORM)
    p = z.softmax(1)

    def covariance(d):
        return p * (d - (p * d).sum(1, keepdim=True))

    qu = covariance(u)
    square = (qu * qu).sum(1, keepdim=True)
    weight = torch.where(square > 0, (hu * qu).sum(1, keepdim=True) / square.clamp(min=1e-300), 0.0).clamp_(min=0)
    if not (_close(hu, weight * qu, tolerance) and _close(hv, weight * covariance(v), tolerance)):
        raise _OtherLoss(_FORM)
    rows = p.movedim(1, -1).reshape(-1, p.shape[1])

    def labels(generator):
        drawn = torch.multinomial(rows, 1, generator=generator).view(p.movedim(1, -1).shape[:-1])
        onehot = torch.zeros_like(p).scatter_(1, drawn.unsqueeze(1), 1.0)
        return (weight.sqrt() * (p - onehot)).to(op.dtype)

    return labels


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool((a - b).norm() <= tolerance * b.norm())

# SPDX-License-Identifier: Apache-2.0
"""Products with second derivatives of a function: :func:`hvp`, :func:`mixed_hvp`; several: :func:`linearize`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastflat import _checks
from fastflat.curvature._differentiate import Twice, double_backward, finite_difference, gradient, once, scalar
from fastflat.curvature._interpreter import Linear
from fastflat.curvature._program import Untraceable
from fastflat.curvature._tracing import Constants, trace

_LOOPS = {"double_backward": double_backward, "finite_difference": finite_difference}


class Linearized:
    """The gradient of a function at a point, ready for products with its derivative; :func:`linearize` makes it."""

    def __init__(self, name: str, loss_fn: Callable, arguments: tuple, method: str, tangent_dtype) -> None:
        self._name, self._method = name, method
        if method not in ("auto", "engine", *_LOOPS):
            names = ", ".join(map(repr, ("auto", "engine", *_LOOPS)))
            _checks.fail(name, "method", f"be one of {names}", repr(method))
        self._trees = [pytree.tree_flatten(a) for a in arguments]
        self._points = [t for leaves, _ in self._trees for t in leaves]
        for t in self._points:
            if not isinstance(t, Tensor) or not t.is_floating_point():
                _checks.fail(name, "params", "hold floating tensors", t.dtype if isinstance(t, Tensor) else type(t))
        if not self._points:
            _checks.fail(name, "params", "hold at least one tensor", "none")
        self._points = [t.detach() for t in self._points]

        devices = list({t.device for t in self._points if t.device.type == "cuda"})

        def loss(leaves):
            with torch.random.fork_rng(devices):
                return scalar(name, loss_fn(*self._together(leaves)))

        self._loss, self._linear, self._twice = loss, None, None
        if method in ("auto", "engine"):
            try:
                self._trace(tangent_dtype)
            except Untraceable as reason:
                self._give_up(reason)

    def _together(self, leaves):
        found = iter(leaves)
        return [pytree.tree_unflatten([next(found) for _ in own], spec) for own, spec in self._trees]

    def _trace(self, tangent_dtype) -> None:
        def function(twice, copies):
            copies = [t.detach().requires_grad_() for t in copies]
            with torch.enable_grad():
                with Constants(copies):
                    loss = self._loss(copies)
                return gradient(loss, copies, twice=twice)

        self._program = trace(function, self._points)
        self._linear = Linear(self._program, self._points, {}, tangent_dtype)

    def push(self, tangents: Any, moved: int = 0, wanted: int = 0) -> Any:
        """The derivative of the gradient by argument ``wanted`` along K tangents of argument ``moved``."""
        leaves, spec = self._trees[moved]
        first = sum(len(own) for own, _ in self._trees[:moved])
        seeds, k = self._checked(tangents, leaves, spec)
        start = sum(len(own) for own, _ in self._trees[:wanted])
        targets = range(start, start + len(self._trees[wanted][0]))
        found = [None] * len(targets) if k == 0 else self._pushed(first, seeds, targets)
        lead = 1 if k is None else k
        points = [self._points[i] for i in targets]
        found = [p.new_zeros(lead, *p.shape) if f is None else f for f, p in zip(found, points, strict=True)]
        return pytree.tree_unflatten([f[0] if k is None else f for f in found], self._trees[wanted][1])

    def _pushed(self, first: int, seeds: list[Tensor], targets: range) -> list[Tensor | None]:
        """Results for some leaves of K tangents of the leaves from ``first`` on."""
        if self._linear is not None:
            positions = {self._program.inputs[first + i]: t for i, t in enumerate(seeds)}
            try:
                return self._linear.push(positions, [self._program.outputs[i] for i in targets])
            except Untraceable as reason:
                self._give_up(reason)
        full = [p.new_zeros(len(seeds[0]), *p.shape) for p in self._points]
        full[first : first + len(seeds)] = seeds
        if self._method == "double_backward":
            rows = self._graph().products(full)
        else:
            rows = _LOOPS[self._method](self._loss, self._points, full)
        return [rows[i] for i in targets]

    def _graph(self) -> Twice:
        """The gradient's graph, which serves all products of double backward."""
        if self._twice is None:
            self._twice = Twice(self._loss, self._points)
        return self._twice

    def gradient(self) -> Any:
        """The gradient at the point, like the first argument; of double backward without a pass of its own."""
        if self._method == "double_backward":
            found = self._graph().gradients()
        else:
            found = once(self._loss, self._points)
        leaves, spec = self._trees[0]
        return pytree.tree_unflatten(found[: len(leaves)], spec)

    def _give_up(self, reason: Untraceable) -> None:
        if self._method == "engine":
            raise reason
        self._method, self._linear = "double_backward", None
        warnings.warn(f"fastflat.{self._name}: {reason}; double backward takes its place", stacklevel=5)

    def hvp(self, tangents: Any) -> Any:
        """``H v`` for tangents like the parameters, or K of them at once with K in front."""
        return self.push(tangents)

    def _checked(self, tangents: Any, leaves: list[Tensor], spec: Any) -> tuple[list[Tensor], int | None]:
        """Tangents with K in front, and K; None for tangents without."""
        moving, own = pytree.tree_flatten(tangents)
        if own != spec:
            _checks.fail(self._name, "tangents", "be nested like the parameters", str(own))
        for t, p in zip(moving, leaves, strict=True):
            if not isinstance(t, Tensor):
                _checks.fail(self._name, "tangents", "hold tensors", type(t))
            if tuple(t.shape[t.dim() - p.dim() :]) != tuple(p.shape) or t.dim() - p.dim() not in (0, 1):
                shape = ", ".join(map(str, p.shape))
                _checks.fail(self._name, "tangents", f"have shape [{shape}] or [K, {shape}]", list(t.shape))
            if t.dtype != p.dtype or t.device != p.device:
                _checks.fail(self._name, "tangents", f"be {p.dtype} on {p.device}", f"{t.dtype} on {t.device}")
        leads = {t.shape[0] if t.dim() > p.dim() else None for t, p in zip(moving, leaves, strict=True)}
        if len(leads) > 1:
            _checks.fail(self._name, "tangents", "share one leading K, or have none", sorted(map(str, leads)))
        k = leads.pop()
        return [t.detach() if k is not None else t.detach().unsqueeze(0) for t in moving], k


def linearize(
    loss_fn: Callable[..., Tensor], *arguments: Any, method: str = "auto", tangent_dtype: torch.dtype | None = None
) -> Linearized:
    """The gradient of ``loss_fn(*arguments) -> scalar`` linearised at the arguments, for many products there.

    Tracing costs about a millisecond for each operation of the gradient, a product then what its arithmetic takes; what
    all products share is computed once. Values that the function reads besides its arguments are those it has now.

    Args:
        loss_fn: the function. Buffers that a module in it would move stay as they are; what is drawn at random is
            drawn once, and the random state is as before.
        arguments: tensors, or lists and dicts of tensors.
        method, tangent_dtype: as in :class:`fastflat.curvature.Hessian`.
    """
    return Linearized("curvature.linearize", loss_fn, arguments, method, tangent_dtype)


def hvp(
    loss_fn: Callable[[Any], Tensor],
    params: Any,
    tangents: Any,
    *,
    method: str = "auto",
    tangent_dtype: torch.dtype | None = None,
    create_graph: bool = False,
) -> Any:
    """``H v``, exact, with ``H`` the Hessian of ``loss_fn(params) -> scalar``; K vectors at once.

    Args:
        loss_fn: the function. With ``params`` the inputs of a network it gives the Hessian in input space.
        params: a tensor, or a list or dict of tensors.
        tangents: like ``params``, or each with K in front: ``[K, *shape]``.
        method, tangent_dtype: as in :class:`fastflat.curvature.Hessian`.
        create_graph: results that can be differentiated again by the params and by whatever else the function reads, as
            a regulariser of curvature needs; by double backward, one vector after another. Params that require a
            gradient are then the leaves.

    Returns:
        Like ``tangents``. Zeros for what does not reach the loss; empty for K = 0.

    Raises:
        TypeError, ValueError: the loss is no scalar, tangents do not fit. Nothing is changed in any case.

    The function is traced at each call; :func:`linearize` does it once for many products at one point.

    Example::

        model_loss = lambda p: F.cross_entropy(torch.func.functional_call(model, p, (x,)), y)
        params = dict(model.named_parameters())
        hv = ff.curvature.hvp(model_loss, params, {k: torch.randn(8, *p.shape) for k, p in params.items()})
        in_input_space = ff.curvature.hvp(lambda x: F.cross_entropy(model(x), y), x, torch.randn(8, *x.shape))
    """
    if create_graph:
        return _differentiable(loss_fn, params, tangents, method, tangent_dtype)
    return Linearized("curvature.hvp", loss_fn, (params,), method, tangent_dtype).push(tangents)


def _differentiable(loss_fn: Callable, params: Any, tangents: Any, method: str, tangent_dtype: Any) -> Any:
    if method not in ("auto", "double_backward") or tangent_dtype is not None:
        got = repr(method) if tangent_dtype is None else f"tangent_dtype={tangent_dtype}"
        _checks.fail("curvature.hvp", "create_graph", "come with method='auto' or 'double_backward' alone", got)
    linear = Linearized("curvature.hvp", loss_fn, (params,), "double_backward", None)
    leaves, spec = pytree.tree_flatten(params)
    moving, k = linear._checked(tangents, leaves, spec)
    if k == 0:
        return pytree.tree_unflatten([p.new_zeros(0, *p.shape) for p in leaves], spec)
    found = double_backward(linear._loss, leaves, moving, create_graph=True)
    return pytree.tree_unflatten([f[0] if k is None else f for f in found], spec)


def mixed_hvp(
    loss_fn: Callable[[Any, Any], Tensor], params: Any, inputs: Any, directions: Any, *, method: str = "auto"
) -> Any:
    """``d/dw <u, grad_x L(w, x)>`` for one u or K of them: how the gradient by the parameters moves with the inputs.

    Args:
        loss_fn: ``(params, inputs) -> scalar``.
        params, inputs: tensors, or lists and dicts of tensors.
        directions: u, like ``inputs``, or each with K in front.
        method: as in :func:`hvp`.

    Returns:
        Like ``params``, with K in front where ``directions`` have it. By the symmetry of second derivatives it is the
        derivative of the parameters' gradient along u.
    """
    linear = Linearized("curvature.mixed_hvp", loss_fn, (params, inputs), method, None)
    return linear.push(directions, moved=1, wanted=0)

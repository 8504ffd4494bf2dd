# SPDX-License-Identifier: Apache-2.0
"""First derivatives inside a trace, and the loops that stand in where there is none: double backward, differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastflat import _checks
from fastflat.curvature._program import Untraceable


def scalar(name: str, loss: object) -> Tensor:
    """The loss, if it is one number."""
    if not isinstance(loss, Tensor):
        _checks.fail(name, "loss_fn", "return a tensor", type(loss))
    if loss.numel() != 1 or not loss.is_floating_point():
        _checks.fail(name, "loss_fn", "return a scalar", f"shape {list(loss.shape)}, {loss.dtype}", "; reduce it")
    return loss.reshape(())


def gradient(
    of: Tensor | Sequence[Tensor],
    leaves: Sequence[Tensor],
    cotangents: Sequence[Tensor] | None = None,
    *,
    twice: bool,
) -> list[Tensor | None]:
    """The gradient, while a trace is made, of functions whose derivatives a trace shows whole; with ``twice`` in a form
    that autograd can differentiate again.

    Raises:
        Untraceable: an autograd.Function of others' making: its forward says nothing about its tangents.
    """
    of = [of] if isinstance(of, Tensor) else list(of)
    if not any(t.requires_grad for t in of):
        return [None] * len(leaves)
    seen, open_ = set(), [t.grad_fn for t in of]
    while open_:
        node = open_.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, BackwardCFunction) and not node._forward_cls.__module__.startswith("fastflat."):
            raise Untraceable(f"{node._forward_cls.__qualname__} is an autograd.Function: no trace shows its tangents")
        open_ += [following for following, _ in node.next_functions]
    return list(torch.autograd.grad(of, leaves, cotangents, create_graph=twice, allow_unused=True))


#: The loss at given parameters.
Loss = Callable[[list[Tensor]], Tensor]


def _filled(found: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(p) if f is None else f for f, p in zip(found, like, strict=True)]


class Twice:
    """The gradient of a loss with its graph, for products with its derivative one after another.

    With ``create_graph`` these can be differentiated again, by the params themselves where those require a gradient.
    """

    def __init__(self, loss: Loss, params: Sequence[Tensor], create_graph: bool = False) -> None:
        self._again = create_graph
        self._leaves = [p if create_graph and p.requires_grad else p.detach().requires_grad_() for p in params]
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            value = loss(self._leaves)
            self._first: Sequence[Tensor | None] = [None] * len(params)
            if value.requires_grad:
                self._first = torch.autograd.grad(value, self._leaves, create_graph=True, allow_unused=True)

    def gradients(self) -> list[Tensor]:
        """Of the loss, without their graph; zeros where it is not reached."""
        return [g.detach() for g in _filled(self._first, self._leaves)]

    def products(self, tangents: Sequence[Tensor]) -> list[Tensor]:
        """``H v_k``, one k after another, by the derivative of ``<gradient, v_k>``; all of shape ``[K, *shape]``."""
        moving = [(g, t) for g, t in zip(self._first, tangents, strict=True) if g is not None and g.requires_grad]
        if not moving:
            return [torch.zeros_like(t) for t in tangents]
        rows = []
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            for k in range(tangents[0].shape[0]):
                along = [t[k].to(g.dtype) for g, t in moving]
                found = torch.autograd.grad(
                    [g for g, _ in moving],
                    self._leaves,
                    along,
                    retain_graph=True,
                    create_graph=self._again,
                    allow_unused=True,
                )
                rows.append(_filled(found, self._leaves))
            return [torch.stack(column) for column in zip(*rows, strict=True)]


def double_backward(
    loss: Loss, params: Sequence[Tensor], tangents: Sequence[Tensor], create_graph: bool = False
) -> list[Tensor]:
    """The products of a :class:`Twice` that is not kept."""
    return Twice(loss, params, create_graph).products(tangents)


def once(loss: Loss, params: Sequence[Tensor]) -> list[Tensor]:
    """The gradient alone; zeros where it is not reached."""
    leaves = [p.detach().requires_grad_() for p in params]
    with torch.enable_grad():
        value = loss(leaves)
        if not value.requires_grad:
            return [torch.zeros_like(p) for p in params]
        return _filled(torch.autograd.grad(value, leaves, allow_unused=True), params)


def finite_difference(loss: Loss, params: Sequence[Tensor], tangents: Sequence[Tensor]) -> list[Tensor]:
    """``(g(w + h v_k) - g(w - h v_k)) / 2h`` with ``h = eps^(1/3) (1 + |w|) / |v_k|``: two gradients a vector, of any
    function. The error is about eps^(2/3), 2e-5 in float32; of a quantizer the differences see the steps, not the
    straight-through rule."""

    size = 1 + _norm(params)
    rows = []
    for k in range(tangents[0].shape[0]):
        along = [t[k] for t in tangents]
        length = _norm(along)
        step = torch.finfo(params[0].dtype).eps ** (1 / 3) * size / torch.where(length == 0, 1.0, length)
        up = once(loss, [p + step * v for p, v in zip(params, along, strict=True)])
        down = once(loss, [p - step * v for p, v in zip(params, along, strict=True)])
        rows.append([(a - b) / (2 * step) for a, b in zip(up, down, strict=True)])
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([t.detach().norm() for t in tensors]).norm()

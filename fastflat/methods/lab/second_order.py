# SPDX-License-Identifier: Apache-2.0
"""Products with the Hessian of each sample's loss in its input, for attacks: Krylov spaces of all samples at once, with
a number of products that is known beforehand."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fastflat import _checks
from fastflat._ops import compute_dtype
from fastflat.curvature import InputHessian
from fastflat.evaluate.attacks import Attack


class SecondOrderAttack(Attack):
    """An attack that takes products with the Hessians where it is."""

    def _linearized(self, x: Tensor) -> tuple[InputHessian, Tensor, Tensor]:
        """(Hessians of the samples' losses, gradients ``[B, d]``, logits ``[B, C]``) at x."""
        seen: list[Tensor] = []

        def loss(logits: Tensor, y: Tensor) -> Tensor:
            losses = self._of(logits)
            if not losses.requires_grad:
                _checks.fail(self.name, "model", "be differentiable in its inputs", "outputs without a gradient")
            seen.append(logits.detach())
            return losses.sum()

        op = InputHessian(self.model, loss, x.to(self.x.dtype), self.y, reduction="sum", method="double_backward")
        g = op.gradients()
        self._finite &= g.isfinite().all()
        return op, g, seen[-1]


@dataclasses.dataclass(frozen=True)
class RowSpaces:
    """Krylov spaces of ``H_i`` and ``b_i``: ``H_i V_i' = [V_i; v_i]' T_i``.

    Attributes:
        V: orthonormal rows, zeros behind a space that is complete, ``[B, m, d]``.
        T: ``[B, m + 1, m]`` in float64, tridiagonal.
        length: ``|b_i|``, ``[B, 1]``.
        held: 1 for each vector that there is, else 0, ``[B, m]`` in float64.
    """

    V: Tensor
    T: Tensor
    length: Tensor
    held: Tensor

    def largest(self) -> Tensor:
        """The largest Ritz value of each row, ``[B]`` in float64: never above the largest eigenvalue, and equal to it
        where the space is complete and b has a part along its vector; 0 where b is 0, NaN where T is not finite."""
        square = self.T[:, :-1].clone()
        # A missing vector must not show as an eigenvalue 0; the first quotient is never above the largest value.
        square.diagonal(dim1=1, dim2=2).add_((1 - self.held) * square[:, :1, 0])
        if square.shape[1] == 1:
            return square[:, 0, 0]
        finite = square.isfinite().flatten(1).all(1)
        values = torch.linalg.eigvalsh(torch.where(finite[:, None, None], square, 0))[:, -1]
        return torch.where(finite, values, torch.nan)


def row_lanczos(op: Any, B: Tensor, m: int) -> RowSpaces:
    """m products (at most d) for all rows together, each vector made orthogonal to all before it twice.

    Args:
        op: ``op.matmat(V)`` gives ``H_i v_i`` for the rows of V ``[B, d]``, H_i symmetric.
        B: the first vectors, ``[B, d]``; rows may be 0.
        m: dimension of the spaces, at least 1.
    """
    m = max(1, min(m, B.shape[1]))
    wide = compute_dtype(B.dtype)
    # A vector whose length is rounding errors of the product that made it ends the space: 100 epsilons of the largest
    # entry of T, what sums over d of the float32 products that made it may leave.
    floor = 100 * torch.finfo(B.dtype).eps
    length = torch.linalg.vector_norm(B.to(wide), dim=1, keepdim=True)
    basis = [B.to(wide) / length.clamp(min=torch.finfo(wide).tiny)]
    T = B.new_zeros(len(B), m + 1, m, dtype=torch.float64)
    scale = B.new_zeros(len(B), 1, dtype=wide)
    alive = length > 0
    for j in range(m):
        w = op.matmat(basis[j].to(B.dtype)).to(wide)
        Q = torch.stack(basis, 1)
        for _ in range(2):
            c = torch.einsum("bjd,bd->bj", Q, w)
            w = w - torch.einsum("bjd,bj->bd", Q, c)
            T[:, j, j] += c[:, j]
        beta = torch.linalg.vector_norm(w, dim=1, keepdim=True)
        scale = torch.maximum(scale, torch.maximum(T[:, j, j : j + 1].abs().to(wide), beta))
        alive = alive & (beta > floor * scale)
        beta = torch.where(alive, beta, 0)
        basis.append(torch.where(alive, w / beta.clamp(min=torch.finfo(wide).tiny), 0))
        T[:, j + 1, j] = beta[:, 0]
        if j + 1 < m:
            T[:, j, j + 1] = beta[:, 0]
    V = torch.stack(basis[:m], 1)
    return RowSpaces(V, T, length, (V != 0).any(2).to(torch.float64))

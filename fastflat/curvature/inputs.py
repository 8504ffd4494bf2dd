# SPDX-License-Identifier: Apache-2.0
"""Curvature in the inputs: a Hessian of its own for each sample, all samples in one product."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from fastflat import _checks
from fastflat.curvature import _batch, _solve
from fastflat.curvature._estimate import Estimate
from fastflat.curvature.functional import linearize

_NAME = "curvature.InputHessian"


class InputHessian:
    """The Hessians ``H_i = d^2 l(f(x_i), y_i) / dx_i^2`` of the samples of one batch, ``[d, d]`` each.

    Samples do not see each other, so one product of the whole batch is a product for each of them: row i of V meets
    H_i. ``solve`` and what else takes an operator with ``rowwise`` treats rows so. For cross-entropy behind a piecewise
    linear network (ReLU, max-pool, straight-through quantizers) H_i has rank C - 1 at most: as many products solve.

    Args:
        model: any module, in the mode it is in; with batch norm in eval mode.
        loss_fn: ``(output, target) -> scalar``, the mean or the sum over the rows.
        inputs: ``[B, ...]``; d is the size of one.
        targets: what ``loss_fn`` takes.
        reduction: ``"mean"`` or ``"sum"``, as in ``loss_fn``.
        method: as in :func:`fastflat.curvature.hvp`.

    Attributes:
        shape, dtype, device: of one sample's matrix.
        batch: B.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Source: Moosavi-Dezfooli et al., CVPR 2019 (CURE), and Singla and Feizi, ICML 2020, for what they are used for.
    """

    rowwise = True

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        inputs: Tensor,
        targets: Any,
        *,
        reduction: str = "mean",
        method: str = "auto",
    ) -> None:
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or inputs.dim() < 2:
            got = f"{list(inputs.shape)}, {inputs.dtype}" if isinstance(inputs, Tensor) else type(inputs)
            _checks.fail(_NAME, "inputs", "be a floating tensor [B, ...]", got)
        if reduction not in ("mean", "sum"):
            _checks.fail(_NAME, "reduction", "be 'mean' or 'sum'", repr(reduction))
        name = _batch.coupling(model)
        if name is not None:
            _checks.fail(_NAME, "model", "keep samples apart", f"{name} in train mode", "; put it into eval mode")
        self._inputs = inputs.detach()
        self.batch, n = len(inputs), inputs[0].numel() if len(inputs) else 0
        self.shape, self.dtype, self.device = (n, n), inputs.dtype, inputs.device
        self._scale = self.batch if reduction == "mean" else 1

        def loss(x: Tensor) -> Tensor:
            return loss_fn(model(x), targets)

        self._linear = linearize(loss, self._inputs, method=method)

    @property
    def blocks(self) -> Mapping[str, slice]:
        return {"inputs": slice(0, self.shape[0])}

    def matmat(self, V: Tensor) -> Tensor:
        """``H_i v_i`` for each row of V ``[B, d]``; with K in front, ``[K, B, d]``, K products for each sample."""
        if not isinstance(V, Tensor) or V.dim() not in (2, 3) or tuple(V.shape[-2:]) != (self.batch, self.shape[0]):
            want = f"have shape [B={self.batch}, d={self.shape[0]}] or [K, B, d]"
            _checks.fail(_NAME, "V", want, list(V.shape) if isinstance(V, Tensor) else type(V))
        lead = V.shape[:-2]
        return self._linear.hvp(V.reshape(*lead, *self._inputs.shape)).mul_(self._scale).reshape(V.shape)

    def gradients(self) -> Tensor:
        """The gradients of the samples' losses by their inputs, ``[B, d]``."""
        return (self._linear.gradient() * self._scale).reshape(self.batch, -1)

    def solve(self, B: Tensor, damping: float = 0.0, tol: float = 1e-3, **options: Any) -> Estimate:
        """``(H_i + damping I) x_i = b_i`` for each row of B ``[B, d]``, samples that are done taking no further
        products; see :func:`fastflat.curvature.solve`. With ``B = -gradients()`` they are Newton steps in the inputs,
        of least squares where H_i is singular."""
        if not isinstance(B, Tensor) or tuple(B.shape) != (self.batch, self.shape[0]):
            got = list(B.shape) if isinstance(B, Tensor) else type(B)
            _checks.fail(_NAME, "B", f"have shape [B={self.batch}, d={self.shape[0]}]", got)
        return _solve.solve(self, B, damping, tol, **options)

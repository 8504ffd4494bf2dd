# SPDX-License-Identifier: Apache-2.0
"""The same quantizer without our kernels: as Python code writes it, and by PyTorch's builtin operator.

They are what :class:`fastflat.quant.Quantizer` replaces, and what it is measured against; ``prepare(...,
quantizer=EagerQuantizer)`` puts them into a model.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from fastflat import _checks
from fastflat.quant.quantizer import Quantizer


class _Round(Function):
    """Round to even; the gradient passes."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


class _Scaled(Function):
    """The identity with a factor on its gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


def lsq(x: Tensor, scale: Tensor, qmin: int, qmax: int, axis: int | None = None, factor: float = 1.0) -> Tensor:
    """``y = round(clamp(x / s, qmin, qmax)) * s`` in plain PyTorch operations, one kernel and one stored tensor each.

    Args:
        x: any shape.
        scale: ``[]``, or ``[C]`` along `axis`; its gradient is multiplied by `factor`.

    Returns:
        y, in the type that PyTorch's promotion gives: fp32 for 16-bit x with an fp32 scale per channel.
    """
    if scale.requires_grad:
        scale = _Scaled.apply(scale, factor)
    if axis is not None:
        shape = [1] * x.dim()
        shape[axis] = -1
        scale = scale.view(shape)
    return _Round.apply(torch.clamp(x / scale, qmin, qmax)) * scale


class EagerQuantizer(Quantizer):
    """Learned step size in plain PyTorch operations, one kernel and one stored tensor each::

        y = round(clamp(x / s, qmin, qmax)) * s

    Gradients as the paper's: those of clamp and of round passed straight through. Symmetric specs, per tensor or per
    channel, with ``mask="before"`` and ``arithmetic="divide"``.
    """

    def __init__(self, spec, *args, **kwargs) -> None:
        super().__init__(spec, *args, **kwargs)
        _plain(type(self).__name__, spec, mask="before", arithmetic="divide")

    def quantize(self, x: Tensor, dtype: torch.dtype | None) -> Tensor:
        spec = self.spec
        factor = spec.grad_factor(x.numel(), max(self.scale.numel(), 1))
        y = lsq(x, self.scale, spec.qmin, spec.qmax, spec.axis, factor)
        return y.to(x.dtype if dtype is None else dtype)


class BuiltinQuantizer(Quantizer):
    """PyTorch's ``torch._fake_quantize_learnable_per_tensor_affine`` and ``..._per_channel_affine``, fp32.

    Its mask is taken after rounding and it multiplies by 1/s, so its numbers differ from the paper's in the last bits.
    """

    def __init__(self, spec, *args, **kwargs) -> None:
        super().__init__(spec, *args, **kwargs)
        _plain(type(self).__name__, spec)
        self.register_buffer("_zero", torch.zeros_like(self.scale.detach()).reshape(-1), persistent=False)

    def quantize(self, x: Tensor, dtype: torch.dtype | None) -> Tensor:
        spec, scale = self.spec, self.scale.reshape(-1)
        factor = spec.grad_factor(x.numel(), scale.numel())
        kind = x.dtype
        x = x.float()
        if spec.axis is None:
            y = torch._fake_quantize_learnable_per_tensor_affine(x, scale, self._zero, spec.qmin, spec.qmax, factor)
        else:
            axis = spec.axis % x.dim()
            y = torch._fake_quantize_learnable_per_channel_affine(
                x, scale, self._zero, axis, spec.qmin, spec.qmax, factor
            )
        return y.to(kind if dtype is None else dtype)


def _plain(label: str, spec, **fields: str) -> None:
    """Refuse specs that the code above does not compute."""
    plain = {"format": "int", "rounding": "even", "noise": "none", "scale_is": "s"}
    if spec.estimator not in ("ste", "lsq"):
        _checks.fail(label, "spec.estimator", "be 'ste' or 'lsq'", repr(spec.estimator))
    fixed = {"symmetric": True, "group": None, **plain, **fields}
    for field, want in fixed.items():
        if getattr(spec, field) != want:
            _checks.fail(label, f"spec.{field}", f"be {want!r}", repr(getattr(spec, field)))

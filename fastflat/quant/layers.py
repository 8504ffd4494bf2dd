# SPDX-License-Identifier: Apache-2.0
"""Linear, convolutions and embedding with a quantized weight and input."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from fastflat import _checks
from fastflat._spec import QuantSpec
from fastflat.quant._layer import Factory, Input, QuantLayer

__all__ = [
    "Factory",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConvTranspose1d",
    "QuantConvTranspose2d",
    "QuantEmbedding",
    "QuantLayer",
    "QuantLinear",
]


class QuantLinear(QuantLayer, nn.Linear):
    """``y = Q(x) Q(W)^T + b``: ``nn.Linear`` with a quantized weight and input.

    ``weight_quantizer`` and ``input_quantizer`` are :class:`Quantizer` or ``None``. Under autocast the fp32 weight is
    quantized and cast in one pass. Made by :meth:`from_float` or :func:`fastflat.prepare`.

    Shapes: x ``[..., in_features]``, y ``[..., out_features]``; a scale of the weight with ``axis=0`` is
    ``[out_features]``, one of the input with ``axis=-1`` ``[in_features]``.
    """

    inputs = (Input("input_quantizer", "in_features", (-1,)),)

    def forward(self, x: Tensor) -> Tensor:
        x, weight = self._quantized(x)
        return F.linear(x, weight, self.bias)


class QuantConv1d(QuantLayer, nn.Conv1d):
    """``y = conv1d(Q(x), Q(W)) + b``: ``nn.Conv1d`` with a quantized weight and input; as :class:`QuantConv2d`.

    Shapes: x ``[N, in_channels, L]``; scales ``[out_channels]`` (weight, ``axis=0``), ``[in_channels]`` (input,
    ``axis=1``).
    """

    inputs = (Input("input_quantizer", "in_channels", (1, -2)),)

    def forward(self, x: Tensor) -> Tensor:
        x, weight = self._quantized(x)
        return self._conv_forward(x, weight, self.bias)


class QuantConv2d(QuantLayer, nn.Conv2d):
    """``y = conv2d(Q(x), Q(W)) + b``: ``nn.Conv2d`` with a quantized weight and input; as :class:`QuantLinear`.

    The input is quantized before padding, so padded zeros stay zero.

    Shapes: x ``[N, in_channels, H, W]``; scales ``[out_channels]`` (weight, ``axis=0``), ``[in_channels]`` (input,
    ``axis=1``).
    """

    inputs = (Input("input_quantizer", "in_channels", (1, -3)),)

    def forward(self, x: Tensor) -> Tensor:
        x, weight = self._quantized(x)
        return self._conv_forward(x, weight, self.bias)


class _Transposed(QuantLayer):
    """Transposed convolutions: their weight is ``[in, out/groups, ...]``, so the output channels are its axis 1."""

    @classmethod
    def weight_spec(cls, spec: QuantSpec) -> QuantSpec:
        return spec.replace(axis=1) if spec.axis == 0 else spec


class QuantConvTranspose1d(_Transposed, nn.ConvTranspose1d):
    """``y = conv_transpose1d(Q(x), Q(W)) + b``; as :class:`QuantConvTranspose2d`.

    Shapes: x ``[N, in_channels, L]``; scales ``[out_channels/groups]`` (weight, ``axis=0`` or 1), ``[in_channels]``
    (input, ``axis=1``).
    """

    inputs = (Input("input_quantizer", "in_channels", (1, -2)),)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        extra = self._output_padding(
            x, output_size, self.stride, self.padding, self.kernel_size, 1, dilation=self.dilation
        )
        x, weight = self._quantized(x)
        return F.conv_transpose1d(
            x, weight, self.bias, self.stride, self.padding, extra, self.groups, dilation=self.dilation
        )


class QuantConvTranspose2d(_Transposed, nn.ConvTranspose2d):
    """``y = conv_transpose2d(Q(x), Q(W)) + b``: ``nn.ConvTranspose2d`` with a quantized weight and input.

    The weight is ``[in_channels, out_channels/groups, kH, kW]``. A spec with ``axis=0``, which elsewhere means the
    output channels, means them here too and becomes ``axis=1``: ``weight_quantizer.spec`` says so. With ``groups > 1``
    the scale has ``out_channels/groups`` entries, and entry j belongs to the j-th output channel of every group.

    Shapes: x ``[N, in_channels, H, W]``; scales ``[out_channels/groups]`` (weight, ``axis=0`` or 1), ``[in_channels]``
    (input, ``axis=1``).
    """

    inputs = (Input("input_quantizer", "in_channels", (1, -3)),)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        extra = self._output_padding(
            x, output_size, self.stride, self.padding, self.kernel_size, 2, dilation=self.dilation
        )
        x, weight = self._quantized(x)
        return F.conv_transpose2d(
            x, weight, self.bias, self.stride, self.padding, extra, self.groups, dilation=self.dilation
        )


class QuantEmbedding(QuantLayer, nn.Embedding):
    """``y = Q(W)[indices]``: ``nn.Embedding`` with a quantized weight; its inputs are indices and stay as they are.

    The whole table is quantized in each call. The row of ``padding_idx`` gets no gradient; symmetric grids, and affine
    ones with integer zero-points, keep a row of zeros at zero. ``max_norm`` (which rewrites the table in ``forward``)
    and ``sparse`` (whose gradient does not pass a quantizer) are refused.

    Shapes: indices ``[...]``, y ``[..., embedding_dim]``; a scale with ``axis=0`` is ``[num_embeddings]``, in groups
    ``[num_embeddings, embedding_dim/group]``.
    """

    casts_weight = False

    @classmethod
    def refuse(cls, module: nn.Module, label: str) -> None:
        if module.max_norm is not None:
            hint = ": it rewrites the table in forward; skip the layer"
            _checks.fail(label, "max_norm", "be None in a quantized embedding", module.max_norm, hint)
        if module.sparse:
            hint = ": the quantizer's gradient is dense; skip the layer"
            _checks.fail(label, "sparse", "be False in a quantized embedding", True, hint)

    def forward(self, indices: Tensor) -> Tensor:
        weight = self.quantized_weight()
        return F.embedding(indices, weight, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)

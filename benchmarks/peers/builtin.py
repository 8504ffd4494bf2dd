# SPDX-License-Identifier: Apache-2.0
"""PyTorch's own fake-quantization. Groups are rows of a view; 16-bit data is cast where the operator wants fp32."""

from __future__ import annotations

import torch


def _wants_scale(data) -> None:
    if data.scale is None:
        raise ValueError("no scale from the data")


def learnable(data):
    """``torch._fake_quantize_learnable_per_tensor_affine`` and ``..._per_channel_affine``."""
    _wants_scale(data)
    spec, factor, dtype = data.case.spec, data.factor, data.x.dtype
    zero = torch.zeros(data.scale.numel(), device=data.x.device)
    if spec.axis is None and spec.group is None:

        def per_tensor(x, scale):
            y = torch._fake_quantize_learnable_per_tensor_affine(
                x.float(), scale.view(1), zero, spec.qmin, spec.qmax, factor
            )
            return y.to(dtype)

        return per_tensor
    group = spec.group or data.x.shape[1]

    def per_channel(x, scale):
        y = torch._fake_quantize_learnable_per_channel_affine(
            x.float().view(-1, group), scale.view(-1), zero, 0, spec.qmin, spec.qmax, factor
        )
        return y.view(x.shape).to(dtype)

    return per_channel


def fixed(data):
    """``torch.fake_quantize_per_tensor_affine`` and ``..._per_channel_affine``: no gradient of the scale."""
    _wants_scale(data)
    spec, scale = data.case.spec, data.scale.detach()
    if spec.axis is None and spec.group is None:
        zero = torch.zeros((), dtype=torch.int32, device=data.x.device)
        return lambda x, _: torch.fake_quantize_per_tensor_affine(x, scale, zero, spec.qmin, spec.qmax)
    group = spec.group or data.x.shape[1]
    rows = scale.view(-1)
    zeros = torch.zeros(rows.numel(), dtype=torch.int32, device=data.x.device)

    def per_channel(x, _):
        y = torch.fake_quantize_per_channel_affine(x.view(-1, group), rows, zeros, 0, spec.qmin, spec.qmax)
        return y.view(x.shape)

    return per_channel

# SPDX-License-Identifier: Apache-2.0
"""Min-max observers of ``torch.ao.quantization``: their state and their scale, with their arithmetic, in fewer steps.

With m and M the extremes of x, c the averaging constant, all in fp32 with a rounding an operation::

    low, high  <-  min(low, m), max(high, M)                      MinMax
    low, high  <-  low + c (m - low), high + c (M - high)         moving average; the first batch gives m and M
    symmetric      scale = max(max(-low, high, 0) / ((qmax - qmin) / 2), eps)
    affine         scale = max((max(high, 0) - min(low, 0)) / (qmax - qmin), eps)
                   zero = clamp(qmin - round(min(low, 0) / scale), qmin, qmax)
"""

from __future__ import annotations

import ctypes
import math
import sys
from typing import Any

import torch
from torch import Tensor, nn

from fastflat._spec import TINY

_PACKAGES = ("torch.ao.quantization.observer", "torchao.quantization.pt2e.observer")
_TENSOR = {"MinMaxObserver": False, "MovingAverageMinMaxObserver": True}  # whether it averages
_CHANNEL = {"PerChannelMinMaxObserver": False, "MovingAveragePerChannelMinMaxObserver": True}


def extremes(x: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of a tensor, or of each channel: amin and amax reduce many times faster than aminmax
    along an axis."""
    if axis is None:
        return torch.aminmax(x)
    axis %= x.dim()
    if axis == 0 and x.is_contiguous():
        rows = x.view(x.shape[0], -1)
        return rows.amin(1), rows.amax(1)
    others = [d for d in range(x.dim()) if d != axis]
    return x.amin(others), x.amax(others)


def on_grid(low: float, high: float, scale: float, zero_point: int, qmin: int, qmax: int) -> bool:
    """Whether all codes of numbers from low to high lie on the grid: then a fake-quantization hands back the gradient
    as it is. False for NaN and infinities. The codes are those of the kernels: round(x (1/s)) + z in fp32."""
    if not (math.isfinite(low) and math.isfinite(high) and TINY <= scale < math.inf):
        return False
    inverse = _single(1.0 / scale)
    lowest, highest = _single(low * inverse), _single(high * inverse)
    if not (abs(lowest) < 2.0**23 and abs(highest) < 2.0**23):
        return False
    return round(lowest) + zero_point >= qmin and round(highest) + zero_point <= qmax


def observe(observer: nn.Module, x: Tensor) -> tuple[Any, Any, list[float] | None] | None:
    """Take x into the state of an observer; its scale and zero-point, tensors or one number each, and the extremes of x
    where they are at hand. None, with nothing changed, where this is left to the observer itself."""
    kind = type(observer)
    hooked = observer._forward_hooks or observer._forward_pre_hooks or "forward" in vars(observer)
    if hooked or x.numel() == 0 or observer.min_val.dtype is not torch.float32:
        return None
    stock = any(getattr(sys.modules.get(p), kind.__name__, None) is kind for p in _PACKAGES)
    if stock and kind.__name__ in _TENSOR:
        return _of_tensor(observer, x, _TENSOR[kind.__name__]) if x.device.type == "cpu" else None
    if stock and kind.__name__ in _CHANNEL:
        return _of_channels(observer, x, _CHANNEL[kind.__name__])
    return None


def _single(value: float) -> float:
    """Rounded to fp32. Of sums, products and quotients of fp32 numbers in fp64 this is the fp32 operation."""
    return ctypes.c_float(value).value


def _of_tensor(observer: nn.Module, x: Tensor, averages: bool) -> tuple[float, int, list[float]] | None:
    found = low, high = [t.item() for t in torch.aminmax(x)]
    old_low, old_high = observer.min_val.item(), observer.max_val.item()
    fresh = old_low == math.inf and old_high == -math.inf
    if not fresh:
        if not (math.isfinite(old_low) and math.isfinite(old_high)):
            return None
        if averages:
            c = _single(observer.averaging_constant)
            low = _single(old_low + _single(c * _single(low - old_low)))
            high = _single(old_high + _single(c * _single(high - old_high)))
        else:
            low, high = min(low, old_low), max(high, old_high)
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        return None
    observer.min_val.fill_(low)
    observer.max_val.fill_(high)
    return *_scale_of(observer, min(low, 0.0), max(high, 0.0)), found


def _scale_of(observer: nn.Module, low: float, high: float) -> tuple[float, int]:
    qmin, qmax, eps = observer.quant_min, observer.quant_max, observer.eps.item()
    if observer.qscheme is torch.per_tensor_symmetric:
        scale = _single(max(-low, high) / _single(float(qmax - qmin) / 2))
        return max(scale, eps), _middle(observer)
    scale = max(_single(_single(high - low) / _single(qmax - qmin)), eps)
    return scale, min(max(qmin - round(_single(low / scale)), qmin), qmax)


def _middle(observer: nn.Module) -> int:
    """The zero-point of symmetric grids."""
    if observer.dtype in (torch.quint8, torch.uint8):
        return (observer.quant_min + observer.quant_max) // 2 if observer.has_customized_qrange else 128
    return 2**15 if observer.dtype is torch.uint16 else 0


def _of_channels(observer: nn.Module, x: Tensor, averages: bool) -> tuple[Tensor, Tensor, None] | None:
    if observer.qscheme not in (torch.per_channel_symmetric, torch.per_channel_affine):
        return None
    low, high = extremes(x.to(torch.float32), observer.ch_axis)
    if observer.min_val.numel() == 0 or observer.max_val.numel() == 0:
        observer.min_val.resize_(low.shape).copy_(low)
        observer.max_val.resize_(high.shape).copy_(high)
    elif averages:
        observer.min_val.add_(low.sub_(observer.min_val).mul_(observer.averaging_constant))
        observer.max_val.add_(high.sub_(observer.max_val).mul_(observer.averaging_constant))
    else:
        observer.min_val.copy_(torch.minimum(low, observer.min_val))
        observer.max_val.copy_(torch.maximum(high, observer.max_val))
    low, high = observer.min_val, observer.max_val
    if bool((low > high).any()):
        return *observer.calculate_qparams(), None  # which says what is wrong
    qmin, qmax = observer.quant_min, observer.quant_max
    low, high = low.clamp(max=0), high.clamp(min=0)
    if observer.qscheme is torch.per_channel_symmetric:
        scale = torch.maximum(torch.maximum(low.neg_(), high).div_(float(qmax - qmin) / 2), observer.eps)
        return scale, torch.full(scale.shape, _middle(observer), dtype=torch.int32, device=scale.device), None
    scale = torch.maximum((high - low).div_(float(qmax - qmin)), observer.eps)
    return scale, (qmin - low.div_(scale).round_().to(torch.int32)).clamp_(qmin, qmax), None

# SPDX-License-Identifier: Apache-2.0
"""The raw ops on CPU tensors through the emulated CUDA kernels, with the signatures of the reference backend."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from fastflat._ops import compute_dtype, scale_shape

PAIRS = {
    (torch.float32, torch.float32): "f32_f32",
    (torch.bfloat16, torch.bfloat16): "bf16_bf16",
    (torch.float16, torch.float16): "f16_f16",
    (torch.float64, torch.float64): "f64_f64",
    (torch.float32, torch.bfloat16): "f32_bf16",
    (torch.float32, torch.float16): "f32_f16",
}

STREAM = 0x57  # any address: the kernels only hand it on


def _part(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{__name__}_{name}", Path(__file__).with_name(f"emulated_{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Emulated(
    _part("lists").ListOps,
    _part("vectors").VectorOps,
    _part("tangents").TangentOps,
    _part("row_tangents").RowTangentOps,
    _part("logits").LogitsOps,
    _part("inputs").InputsOps,
    _part("weight_norms").WeightNormsOps,
):
    """Launches the kernels of `module` on dense CPU tensors whose storage starts on 16 bytes."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def geometry(self, x: Tensor, axis: int, group: int):
        """Outer, channels, inner of x in storage order."""
        n = x.numel()
        if group:
            return self.module.Geometry(1, n // group, group)
        if axis < 0:
            return self.module.Geometry(1, 1, n)
        channels = x.shape[axis]
        inner = n if channels == 1 else x.stride(axis)
        return self.module.Geometry(n // (channels * inner) if n else 0, channels, inner)

    def identity(self, x: Tensor) -> Tensor:
        y = poisoned(x, x.dtype)
        self._check(self.module.identity(x.data_ptr(), y.data_ptr(), x.numel() * x.element_size(), STREAM))
        return y

    def bitplane(self, p, q, m, scale, beta, hard_w, hard_m, dtype=None) -> Tensor:
        w = poison(torch.empty(p.shape[1:], dtype=dtype or p.dtype))
        a = self._bitplanes(p, q, m, scale, beta, hard_w, hard_m)
        self._check(self.module.bitplane(self._pair(p, w), a, w.data_ptr(), STREAM))
        return w

    def bitplane_bwd(self, gw, p, q, m, scale, beta, hard_w, hard_m) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        results = tuple(poisoned(t, t.dtype) for t in (p, q, m, scale))
        pair, a = self._pair(p, gw), self._bitplanes(p, q, m, scale, beta, hard_w, hard_m)
        work = poison(torch.empty(self.module.bitplane_bwd_workspace(pair, a), dtype=torch.uint8))
        addresses = [t.data_ptr() for t in (gw, *results, work)]
        self._check(self.module.bitplane_bwd(pair, a, *addresses, STREAM))
        return results

    def bitplane_jvp(self, tp, tq, tm, ts, p, q, m, scale, beta, hard_w, hard_m, dtype=None) -> Tensor:
        tw = poison(torch.empty(p.shape[1:], dtype=dtype or p.dtype))
        a = self._bitplanes(p, q, m, scale, beta, hard_w, hard_m)
        tangents = [0 if t is None else t.data_ptr() for t in (tp, tq, tm, ts)]
        self._check(self.module.bitplane_jvp(self._pair(p, tw), a, *tangents, tw.data_ptr(), STREAM))
        return tw

    def _bitplanes(self, p, q, m, scale, beta, hard_w, hard_m):
        addresses = [t.data_ptr() for t in (p, q, m, scale, beta)]
        return self.module.BitplaneArguments(*addresses, p.numel() // len(p), len(p), hard_w, hard_m)

    def fake_quantize(self, x, scale, zero_point, qmin, qmax, axis, group, eps, rules, dtype=None) -> Tensor:
        y = poisoned(x, dtype or x.dtype)
        q = self._quantizer(scale, zero_point, qmin, qmax, eps, 1.0, rules)
        g = self.geometry(x, axis, group)
        self._check(self.module.fake_quantize(self._pair(x, y), g, q, x.data_ptr(), y.data_ptr(), STREAM))
        return y

    def fake_quantize_bwd(
        self, gy, x, scale, zero_point, qmin, qmax, axis, group, eps, rules, factor, need_scale
    ) -> tuple[Tensor, Tensor, Tensor]:
        m = self.module
        pair, g = self._pair(x, gy), self.geometry(x, axis, group)
        q = self._quantizer(scale, zero_point, qmin, qmax, eps, factor, rules)
        gx = poisoned(x, x.dtype)
        none = scale.new_empty(0)
        if not need_scale:
            self._check(m.fake_quantize_ste(pair, g, q, gy.data_ptr(), x.data_ptr(), gx.data_ptr(), STREAM))
            return gx, none, none
        gs = poisoned(scale, scale.dtype)
        gz = none if zero_point is None else poisoned(scale, scale.dtype)
        work = poison(torch.empty(m.fake_quantize_bwd_workspace(pair, g), dtype=torch.uint8))
        self._check(
            m.fake_quantize_bwd(
                pair,
                g,
                q,
                gy.data_ptr(),
                x.data_ptr(),
                gx.data_ptr(),
                gs.data_ptr(),
                0 if zero_point is None else gz.data_ptr(),
                work.data_ptr(),
                STREAM,
            )
        )
        return gx, gs, gz

    def fake_quantize_list(self, xs, scales, zero_points, *grids) -> list[Tensor]:
        dtype = grids[6] if len(grids) > 6 else None
        calls = zip(xs, scales, zero_points or [None] * len(xs), *grids[:6], strict=True)
        return [self.fake_quantize(*call, dtype) for call in calls]

    def fake_quantize_list_bwd(self, gys, xs, scales, zero_points, *grids) -> tuple[list[Tensor], ...]:
        calls = zip(gys, xs, scales, zero_points or [None] * len(xs), *grids, strict=True)
        return tuple(map(list, zip(*(self.fake_quantize_bwd(*call) for call in calls), strict=True)))

    def fake_quantize_jvp(
        self, tx, ts, tz, x, scale, zero_point, qmin, qmax, axis, group, eps, rules, factor, dtype=None
    ) -> Tensor:
        ty = poisoned(x, dtype or x.dtype)
        of_result = tx is not None and tx.dtype != x.dtype
        q = self._quantizer(scale, zero_point, qmin, qmax, eps, factor, rules)
        tangents = [0 if t is None else t.data_ptr() for t in (tx, ts, tz)]
        self._check(
            self.module.fake_quantize_jvp(
                self._pair(x, ty),
                of_result,
                self.geometry(x, axis, group),
                q,
                *tangents,
                x.data_ptr(),
                ty.data_ptr(),
                STREAM,
            )
        )
        return ty

    def fake_quantize_absmax(self, x, qmin, qmax, axis, group, eps, rules, dtype=None) -> tuple[Tensor, Tensor]:
        m = self.module
        y = poisoned(x, dtype or x.dtype)
        scale = poison(torch.empty(scale_shape(x.shape, axis, group), dtype=compute_dtype(x.dtype)))
        pair, g = self._pair(x, y), self.geometry(x, axis, group)
        work = poison(torch.empty(m.fake_quantize_absmax_workspace(pair, g), dtype=torch.uint8))
        q = m.Quantizer(0, 0, qmin, qmax, eps, 1.0, rules)
        self._check(
            m.fake_quantize_absmax(pair, g, q, x.data_ptr(), y.data_ptr(), scale.data_ptr(), work.data_ptr(), STREAM)
        )
        return y, scale

    def mixquant(self, x, scale, qmin, qmax, weight, axis, group, eps, rules, dtype=None) -> Tensor:
        y = poisoned(x, dtype or x.dtype)
        mixture = self._mixture(scale, qmin, qmax, weight, None, eps, rules)
        g = self.geometry(x, axis, group)
        self._check(self.module.mixquant(self._pair(x, y), g, mixture, x.data_ptr(), y.data_ptr(), STREAM))
        return y

    def mixquant_bwd(
        self, gy, x, scale, qmin, qmax, weight, factor, axis, group, eps, rules
    ) -> tuple[Tensor, Tensor, Tensor]:
        m, pair, g = self.module, self._pair(x, gy), self.geometry(x, axis, group)
        mixture = self._mixture(scale, qmin, qmax, weight, factor, eps, rules)
        gx, gs, gw = poisoned(x, x.dtype), poisoned(scale, scale.dtype), poisoned(weight, weight.dtype)
        work = poison(torch.empty(m.mixquant_bwd_workspace(pair, g, len(weight)), dtype=torch.uint8))
        results = (t.data_ptr() for t in (gx, gs, gw, work))
        self._check(m.mixquant_bwd(pair, g, mixture, gy.data_ptr(), x.data_ptr(), *results, STREAM))
        return gx, gs, gw

    def mixquant_jvp(
        self, tx, ts, tw, x, scale, qmin, qmax, weight, factor, axis, group, eps, rules, dtype=None
    ) -> Tensor:
        ty = poisoned(x, dtype or x.dtype)
        of_result = tx is not None and tx.dtype != x.dtype
        mixture = self._mixture(scale, qmin, qmax, weight, factor, eps, rules)
        tangents = [0 if t is None else t.data_ptr() for t in (tx, ts, tw)]
        pair, g = self._pair(x, ty), self.geometry(x, axis, group)
        self._check(
            self.module.mixquant_jvp(pair, of_result, g, mixture, *tangents, x.data_ptr(), ty.data_ptr(), STREAM)
        )
        return ty

    def _mixture(self, scale, qmin, qmax, weight, factor, eps, rules):
        tensors = (0 if t is None else t.data_ptr() for t in (scale, qmin, qmax, weight, factor))
        return self.module.Mixture(*tensors, len(weight), eps, rules)

    def general_quantize(
        self, x, scale, zero_point, state, nu, a, qmin, qmax, axis, group, eps, rules, dtype=None
    ) -> Tensor:
        y = poisoned(x, dtype or x.dtype)
        q = self._general(scale, zero_point, state, nu, a, None, qmin, qmax, eps, 1.0, rules)
        g = self.geometry(x, axis, group)
        self._check(self.module.general_quantize(self._pair(x, y), g, q, x.data_ptr(), y.data_ptr(), STREAM))
        return y

    def general_quantize_bwd(
        self, gy, x, scale, zero_point, state, nu, a, delta, qmin, qmax, axis, group, eps, rules, factor, need_scale,
        need_delta
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        m = self.module
        pair, g = self._pair(x, gy), self.geometry(x, axis, group)
        q = self._general(scale, zero_point, state, nu, a, delta, qmin, qmax, eps, factor, rules)
        gx, none = poisoned(x, x.dtype), scale.new_empty(0)
        data = gy.data_ptr(), x.data_ptr(), gx.data_ptr()
        need_delta = need_delta and delta is not None
        if not need_scale and not need_delta:
            self._check(m.general_quantize_gx(pair, g, q, *data, STREAM))
            return gx, none, none, none
        gs = poisoned(scale, scale.dtype) if need_scale else none
        gz = poisoned(scale, scale.dtype) if need_scale and zero_point is not None else none
        gd = poison(scale.new_empty(())) if need_delta else none
        work = poison(torch.empty(m.general_quantize_bwd_workspace(pair, g, need_delta), dtype=torch.uint8))
        sums = [0 if t is none else t.data_ptr() for t in (gs, gz, gd)]
        self._check(m.general_quantize_bwd(pair, g, q, *data, *sums, work.data_ptr(), STREAM))
        return gx, gs, gz, gd

    def general_quantize_jvp(
        self, tx, ts, tz, x, scale, zero_point, state, nu, a, qmin, qmax, axis, group, eps, rules, factor, dtype=None
    ) -> Tensor:
        ty = poisoned(x, dtype or x.dtype)
        of_result = tx is not None and tx.dtype != x.dtype
        q = self._general(scale, zero_point, state, nu, a, None, qmin, qmax, eps, factor, rules)
        pointers = [0 if t is None else t.data_ptr() for t in (tx, ts, tz, x, ty)]
        pair, g = self._pair(x, ty), self.geometry(x, axis, group)
        self._check(self.module.general_quantize_jvp(pair, of_result, g, q, *pointers, STREAM))
        return ty

    def general_quantize_dynamic(
        self, x, state, nu, a, outer, qmin, qmax, axis, group, eps, rules, dtype=None
    ) -> tuple[Tensor, Tensor]:
        m = self.module
        scale = poison(torch.empty(scale_shape(x.shape, axis, group), dtype=compute_dtype(x.dtype)))
        y = poisoned(x, dtype or x.dtype)
        q = self._general(scale, None, state, nu, a, None, qmin, qmax, eps, 1.0, rules)
        pair, g = self._pair(x, y), self.geometry(x, axis, group)
        work = poison(torch.empty(m.general_quantize_scale_workspace(pair, g), dtype=torch.uint8))
        over = 0 if outer is None else outer.data_ptr()
        pointers = (over, x.data_ptr(), scale.data_ptr(), work.data_ptr())
        self._check(m.general_quantize_scale(pair, g, q, *pointers, STREAM))
        self._check(m.general_quantize(pair, g, q, x.data_ptr(), y.data_ptr(), STREAM))
        return y, scale

    def _general(self, scale, zero_point, state, nu, a, delta, *rest):
        pointers = [0 if t is None else t.data_ptr() for t in (scale, zero_point, state, nu, a, delta)]
        return self.module.GeneralQuantizer(*pointers, *rest)

    def liq_moments(self, w, axis) -> tuple[Tensor, Tensor]:
        m, pair, g = self.module, self._pair(w, w), self.geometry(w, axis, 0)
        shape, compute = scale_shape(w.shape, axis, 0), compute_dtype(w.dtype)
        mean, std = (poison(torch.empty(shape, dtype=compute)) for _ in range(2))
        work = poison(torch.empty(m.liq_moments_workspace(pair, g), dtype=torch.uint8))
        addresses = (t.data_ptr() for t in (w, mean, std, work))
        self._check(m.liq_moments(pair, g, *addresses, STREAM))
        return mean, std

    def liq(self, w, mean, std, clip, levels, axis, eps, dtype=None) -> Tensor:
        y = poisoned(w, dtype or w.dtype)
        point, g = self._liq_point(mean, std, clip, levels, eps), self.geometry(w, axis, 0)
        self._check(self.module.liq(self._pair(w, y), g, point, w.data_ptr(), y.data_ptr(), STREAM))
        return y

    def liq_bwd(self, gy, w, mean, std, clip, levels, axis, eps) -> tuple[Tensor, Tensor]:
        m, pair, g = self.module, self._pair(w, gy), self.geometry(w, axis, 0)
        gw, gclip = poisoned(w, w.dtype), poison(clip.new_empty(()))
        work = poison(torch.empty(m.liq_bwd_workspace(pair, g), dtype=torch.uint8))
        point = self._liq_point(mean, std, clip, levels, eps)
        addresses = (t.data_ptr() for t in (gy, w, gw, gclip, work))
        self._check(m.liq_bwd(pair, g, point, *addresses, STREAM))
        return gw, gclip

    def liq_jvp(self, tw, tclip, w, mean, std, clip, levels, axis, eps, dtype=None) -> Tensor:
        ty = poisoned(w, dtype or w.dtype)
        point, g = self._liq_point(mean, std, clip, levels, eps), self.geometry(w, axis, 0)
        addresses = (0 if t is None else t.data_ptr() for t in (tw, tclip, w, ty))
        self._check(self.module.liq_jvp(self._pair(w, ty), g, point, *addresses, STREAM))
        return ty

    def _liq_point(self, mean, std, clip, levels, eps):
        return self.module.LiqPoint(mean.data_ptr(), std.data_ptr(), clip.data_ptr(), levels, eps)

    def binarize(self, x, h, axis, group, dtype=None) -> tuple[Tensor, Tensor]:
        pair, g, h = self._pair(x, x), self.geometry(x, axis, group), expanded(h, x)
        alpha = self._quotients("alpha", pair, g, h, x, axis, group, x)
        y = poisoned(x, dtype or x.dtype)
        addresses = (t.data_ptr() for t in (x, alpha, y))
        self._check(self.module.binarize(self._pair(x, y), g, *addresses, STREAM))
        return y, alpha

    def binarize_bwd(self, gy, ga, x, h, alpha, clip, through_alpha, axis, group) -> Tensor:
        pair, g, h, k = self._pair(x, gy), self.geometry(x, axis, group), expanded(h, x), None
        if through_alpha or ga is not None:
            k = self._quotients("k", pair, g, h, x, axis, group, gy if through_alpha else None, ga, x)
        gx = poisoned(x, x.dtype)
        addresses = (0 if t is None else t.data_ptr() for t in (gy, x, h, alpha, k, gx))
        self._check(self.module.binarize_gx(pair, g, clip, *addresses, STREAM))
        return gx

    def binarize_jvp(self, tx, x, h, alpha, clip, through_alpha, axis, group, dtype=None) -> tuple[Tensor, Tensor]:
        pair, g, h = self._pair(x, x), self.geometry(x, axis, group), expanded(h, x)
        ta = self._quotients("ta", pair, g, h, x, axis, group, tx, x)
        ty = poisoned(x, dtype or x.dtype)
        addresses = (0 if t is None else t.data_ptr() for t in (tx, x, alpha, ta if through_alpha else None, ty))
        self._check(self.module.binarize_ty(self._pair(x, ty), g, clip, *addresses, STREAM))
        return ty, ta

    def _quotients(self, which, pair, g, h, x, axis, group, *inputs) -> Tensor:
        result = poison(torch.empty(scale_shape(x.shape, axis, group), dtype=compute_dtype(x.dtype)))
        work = poison(torch.empty(self.module.binarize_workspace(pair, g, h is not None), dtype=torch.uint8))
        addresses = (0 if t is None else t.data_ptr() for t in (*inputs, h, result, work))
        self._check(getattr(self.module, f"binarize_{which}")(pair, g, *addresses, STREAM))
        return result

    def _pair(self, x: Tensor, y: Tensor):
        return getattr(self.module.Pair, PAIRS[x.dtype, y.dtype])

    def _quantizer(self, scale, zero_point, qmin, qmax, eps, factor, rules):
        zero = 0 if zero_point is None else zero_point.data_ptr()
        return self.module.Quantizer(scale.data_ptr(), zero, qmin, qmax, eps, factor, rules)

    @staticmethod
    def _check(error: int) -> None:
        if error:
            raise RuntimeError(f"launch failed with cudaError_t {error}")


def poison(t: Tensor) -> Tensor:
    """Fills t with a byte pattern that no kernel writes by chance: an element left out shows."""
    if t.numel():
        flat = torch.as_strided(t, (t.numel(),), (1,))
        flat.view(torch.uint8).fill_(0xA5)
    return t


def poisoned(like: Tensor, dtype: torch.dtype) -> Tensor:
    return poison(torch.empty_like(like, dtype=dtype))


def expanded(t: Tensor | None, like: Tensor) -> Tensor | None:
    """t with an element for each of `like`, in its layout."""
    return None if t is None else torch.empty_like(like, dtype=t.dtype).copy_(t)

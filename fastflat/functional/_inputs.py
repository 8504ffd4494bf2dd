# SPDX-License-Identifier: Apache-2.0
"""Noise and attack steps on inputs as users call them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastflat import _checks
from fastflat._ops.inputs import LAWS, NORMS
from fastflat.autograd import inputs as rule
from fastflat.autograd._modes import transformed
from fastflat.backends import kernels
from fastflat.functional._noise import state_for

__all__ = ["noise_batch", "pgd_step"]


def noise_batch(
    x: Tensor,
    K: int = 1,
    *,
    law: str = "uniform",
    smax: float,
    keep_prob: float = 1.0,
    generator: torch.Generator | None = None,
    state: Tensor | None = None,
) -> Tensor:
    """K noisy copies of a batch in one write, the strength of the noise drawn for each sample and copy::

        out[k, b] = x[b] + sigma_kb m xi        xi ~ N(0, 1) for each element
        sigma_kb  = smax (const), U(0, smax) (uniform), or exponential with mean smax (exp)
        m         = 1 with chance keep_prob for each element, else 0

    Draws are Philox4x32-10 of a state of two numbers: the same state gives the same noise on every backend. xi reaches
    5.77 standard deviations, m has a resolution of 2^-16 and sigma one of 2^-23. Arithmetic in fp32 (fp64 for fp64 x,
    draws fp32), one rounding to the type of x. The gradient of each copy to x is 1: dL/dx = sum_k dL/dout[k].

    Args:
        x: ``[B, ...]``, float32, bfloat16, float16 or float64.
        K: copies, 1 or more.
        law: ``const``, ``uniform`` or ``exp``.
        smax: strength in units of x, finite and not negative.
        keep_prob: chance in [0, 1] that an element has noise.
        generator: draws the state, else the default one of the device (``torch.manual_seed``).
        state: int64[2] of :func:`draw_state`, instead of a new one.

    Returns:
        ``[K, *x.shape]``, contiguous, dtype of x.

    Raises:
        TypeError, ValueError: an argument does not fit, in one line that names it, what was wanted and what came.

    Source: Tsiligkaridis and Tsiligkaridis, "Diverse Gaussian Noise Consistency Regularization", arXiv 2104.01231.
    """
    op = "noise_batch"
    _batch(op, "x", x)
    if isinstance(K, bool) or not isinstance(K, int):
        _checks.fail(op, "K", "be an int", type(K))
    if K < 1:
        _checks.fail(op, "K", "be 1 or more", K)
    if law not in LAWS:
        _checks.fail(op, "law", f"be one of {', '.join(LAWS)}", repr(law))
    _number(op, "smax", smax, 0.0, math.inf)
    _number(op, "keep_prob", keep_prob, 0.0, 1.0)
    if smax == math.inf:
        _checks.fail(op, "smax", "be finite", smax)
    state = state_for(op, x, state, generator)
    found = None if torch.compiler.is_compiling() else kernels(x.device.type)
    return rule.noise(x, state, rule.Plan(K, LAWS[law], float(smax), float(keep_prob), found))


def pgd_step(
    xa: Tensor,
    x0: Tensor,
    g: Tensor,
    *,
    step: float,
    eps: float,
    norm: str = "linf",
    lo: float = 0.0,
    hi: float = 1.0,
    active: Tensor | None = None,
) -> Tensor:
    """One step of projected gradient ascent on inputs, each read once::

        linf:  d = clamp(xa + step sign(g) - x0, -eps, eps)
        l2:    d = xa + step g / |g|_2 - x0,   d <- d min(1, eps / |d|_2)          norms over each sample
        out    = clamp(x0 + d, lo, hi);  samples that are not active stay xa

    A gradient of 0 moves nothing, NaN stays NaN (in l2 all of its sample). A step has no derivative; arithmetic in
    fp32 (fp64 for fp64 xa), linf the same bits on every backend.

    Args:
        xa: ``[B, ...]`` the iterate; float32, bfloat16, float16 or float64.
        x0: the clean inputs, and g: the gradient of the loss at xa; shape, dtype and device of xa.
        step, eps: in units of x, finite and not negative.
        norm: ``linf`` or ``l2``.
        lo, hi: range of valid inputs; infinite for none.
        active: bool ``[B]``; None for all.

    Returns:
        The next iterate, shape and dtype of xa, contiguous.

    Raises:
        TypeError, ValueError: an argument does not fit, in one line that names it, what was wanted and what came; one
            of them asks for a gradient.

    Source: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", arXiv 1706.06083.
    """
    op = "pgd_step"
    _batch(op, "xa", xa)
    for name, t in (("x0", x0), ("g", g)):
        _checks.dense_data(op, name, t, None)
        if t.shape != xa.shape:
            _checks.fail(op, name, f"have the shape of xa, {list(xa.shape)}", list(t.shape))
        if t.dtype != xa.dtype:
            _checks.fail(op, name, f"have the dtype of xa ({xa.dtype})", t.dtype)
        if t.device != xa.device:
            _checks.fail(op, name, f"be on the device of xa ({xa.device})", t.device)
    for name, value in (("step", step), ("eps", eps)):
        _number(op, name, value, 0.0, math.inf)
        if value == math.inf:
            _checks.fail(op, name, "be finite", value)
    for name, value in (("lo", lo), ("hi", hi)):
        _number(op, name, value, -math.inf, math.inf)
    if lo > hi:
        _checks.fail(op, "lo", f"not exceed hi ({hi})", lo)
    if norm not in NORMS:
        _checks.fail(op, "norm", f"be one of {', '.join(NORMS)}", repr(norm))
    if active is not None:
        if not isinstance(active, Tensor):
            _checks.fail(op, "active", "be a tensor", type(active))
        if active.dtype != torch.bool or tuple(active.shape) != (xa.shape[0],):
            found = f"{active.dtype} of shape {list(active.shape)}"
            _checks.fail(op, "active", f"be bool of shape [B={xa.shape[0]}]", found)
        if active.device != xa.device:
            _checks.fail(op, "active", f"be on the device of xa ({xa.device})", active.device)
    if transformed():
        raise NotImplementedError(f"fastflat::{op}: a step has no derivative; call it outside of torch.func transforms")
    if torch.is_grad_enabled():
        for name, t in (("xa", xa), ("x0", x0), ("g", g)):
            if t.requires_grad:
                _checks.fail(op, name, "need no gradient", "one that does", f"; write {name}.detach()")
    compiling = torch.compiler.is_compiling()
    run = torch.ops.fastflat.inputs_pgd_step if compiling else kernels(xa.device.type).inputs_pgd_step
    return run(xa, x0, g, active, float(step), float(eps), NORMS[norm], float(lo), float(hi))


def _batch(op: str, name: str, x: object) -> None:
    _checks.dense_data(op, name, x, None)
    if x.dim() == 0:
        _checks.fail(op, name, "have a batch axis", "a scalar")


def _number(op: str, name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        _checks.fail(op, name, "be a number", type(value))
    if not low <= value <= high:
        _checks.fail(op, name, f"lie in [{low}, {high}]", value)

# SPDX-License-Identifier: Apache-2.0
"""Steps of optimizers. A maker here takes a case's data and returns the call that does one step of two passes, with the
gradients given: who computes them is not measured.

In bf16 everyone keeps fp32 masters: a bf16 weight alone would lose most of a perturbation.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from fastflat import optim

from ..networks import ResNet18

RHO, RATE = 0.05, 1e-4
_OPTIONS = {"sgd": {"momentum": 0.9}, "lars": {"momentum": 0.9}}
_TORCH = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
Call = Callable[[], None]


def _give(params: list[Tensor], grads: list[Tensor]) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = g


def _torch_base(data, params: list[Tensor], **options) -> torch.optim.Optimizer:
    return _torch_class(data)(params, **_options(data), **options)


def _torch_class(data) -> type[torch.optim.Optimizer]:
    if data.case.base not in _TORCH:
        raise ValueError(f"torch has no {data.case.base}")
    return _TORCH[data.case.base]


def _options(data) -> dict[str, float]:
    return {"lr": RATE, **_OPTIONS.get(data.case.base, {})}


def _halves(data) -> bool:
    return data.case.dtype.itemsize < 4


def _ours(data, storage: str) -> Call:
    params = data.parameters()
    storage = "master" if _halves(data) else storage
    opt = optim.SAM(params, data.case.base, rho=RHO, storage=storage, **_options(data))
    return _two_passes(data, params, opt)


def backup(data) -> Call:
    """fastflat as it comes."""
    return _ours(data, "backup")


def swap(data) -> Call:
    """fastflat with parameters that alternate between two places."""
    if _halves(data):
        raise ValueError("bf16 has masters")
    return _ours(data, "swap")


class _Masters:
    """fp32 masters of parameters in 16 bits, with stock operations; of fp32 parameters, themselves."""

    def __init__(self, data):
        self.params = data.parameters()
        self.split = _halves(data)
        self.masters = [p.detach().float().requires_grad_() for p in self.params] if self.split else self.params

    def give(self, grads: list[Tensor]) -> None:
        _give(self.masters, [g.float() for g in grads] if self.split else grads)

    def publish(self, values: list[Tensor]) -> None:
        if self.split:
            torch._foreach_copy_([p.data for p in self.params], values)


def loop(data) -> Call:
    """The popular loop: clone, perturb tensor by tensor, swap the clones back, torch's base as it comes."""
    if _halves(data):
        raise ValueError("the loop has no masters")
    params = data.parameters()
    base = _torch_base(data, params)

    def call() -> None:
        _give(params, data.first)
        with torch.no_grad():
            norm = torch.norm(torch.stack([p.grad.norm(p=2) for p in params]), p=2)
            scale, before = RHO / (norm + 1e-12), {}
            for p in params:
                before[p] = p.data.clone()
                p.add_(p.grad * scale)
            _give(params, data.second)
            for p in params:
                p.data = before[p]
        base.step()

    return call


def add_sub(data) -> Call:
    """Perturbation kept, added and subtracted by foreach operations (inexact), torch's fused base."""
    if _halves(data):
        raise ValueError("16 bits forget the perturbation")
    params = data.parameters()
    base = _torch_base(data, params, fused=True)

    def call() -> None:
        _give(params, data.first)
        with torch.no_grad():
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(data.first)))
            e = torch._foreach_mul(data.first, RHO / norm)
            torch._foreach_add_(params, e)
            _give(params, data.second)
            torch._foreach_sub_(params, e)
        base.step()

    return call


def stock(data) -> Call:
    """The least traffic that stock operations reach: perturbed weights in new memory, torch's fused base."""
    m = _Masters(data)
    base = _torch_base(data, m.masters, fused=True)

    def call() -> None:
        with torch.no_grad():
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(data.first)))
            scale = (RHO / norm).item()
            if m.split:
                m.publish(torch._foreach_add(m.masters, [g.float() for g in data.first], alpha=scale))
            else:
                before = [p.data for p in m.params]
                for p, w in zip(m.params, torch._foreach_add(before, data.first, alpha=scale), strict=True):
                    p.data = w
            m.give(data.second)
            if not m.split:
                for p, w in zip(m.params, before, strict=True):
                    p.data = w
        base.step()
        with torch.no_grad():
            m.publish([w.detach() for w in m.masters])

    return call


def pytorch_optimizer(data) -> Call:
    """The package of that name, where it is installed (``make peers``)."""
    try:
        package = importlib.import_module("pytorch_optimizer")
    except ImportError:
        raise ValueError("pytorch_optimizer is not installed: make peers") from None
    if _halves(data):
        raise ValueError("pytorch_optimizer has no masters")
    params = data.parameters()
    opt = package.SAM(params, _torch_class(data), rho=RHO, **_options(data))
    return _two_passes(data, params, opt)


def passes(data) -> Call:
    """No optimizer: the two forward and backward passes that its step stands beside, of 32 images of 64x64."""
    if (data.case.granularity, data.case.dtype) != ("resnet18 sgd", torch.float32):
        raise ValueError("the passes are measured once, with resnet18, sgd and fp32")
    model = ResNet18().to(data.x.device)
    images = torch.randn(32, 3, 64, 64, device=data.x.device)
    classes = torch.arange(32, device=data.x.device)

    def call() -> None:
        for _ in range(2):
            torch.nn.functional.cross_entropy(model(images), classes).backward()
            model.zero_grad()

    return call


def base(data) -> Call:
    """fastflat's base alone."""
    params = data.parameters()
    kind = {"sgd": optim.SGD, "adam": optim.Adam, "adamw": optim.AdamW, "padam": optim.Padam, "lars": optim.LARS,
            "lamb": optim.LAMB}[data.case.base]  # fmt: skip
    return _one_pass(data, params, kind(params, **_options(data)))


def torch_fused(data) -> Call:
    """torch's base in its fused form."""
    if _halves(data):
        raise ValueError("torch's fused step of 16 bits on CPU is wrong before 2.14")
    params = data.parameters()
    return _one_pass(data, params, _torch_base(data, params, fused=True))


def torch_plain(data) -> Call:
    """torch's base as it comes."""
    params = data.parameters()
    return _one_pass(data, params, _torch_base(data, params))


def _two_passes(data, params: list[Tensor], opt) -> Call:
    def call() -> None:
        _give(params, data.first)
        opt.first_step()
        _give(params, data.second)
        opt.second_step()

    return call


def _one_pass(data, params: list[Tensor], opt: torch.optim.Optimizer) -> Call:
    def call() -> None:
        _give(params, data.second)
        opt.step()

    return call

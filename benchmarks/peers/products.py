# SPDX-License-Identifier: Apache-2.0
"""Products with curvature matrices. A maker takes a case's data and returns a call that gives ``[K, n]``."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp, linearize, vjp, vmap

from fastflat import curvature

Call = Callable[[], Tensor]


def gradient(data) -> Call:
    """The unit of the comparison: one gradient, forward and backward."""

    def call() -> Tensor:
        found = torch.autograd.grad(data.loss(data.model(data.x), data.y), data.parameters())
        return torch.cat([g.flatten() for g in found])[None]

    return call


def fused(data) -> Call:
    """fastflat."""
    if data.case.mode != "forms":
        return _ours(data)
    # Two vectors share a second-order tangent, as in a trace.
    sharing = 2 if len(data.v) % 2 == 0 else 1

    operator = curvature.Hessian(data.model, data.loss, [(data.x, data.y)])
    operator.mean_forms(data.v[:sharing], sharing)

    def call() -> Tensor:
        _moved(data)
        return operator.mean_forms(data.v, sharing).mean()[None, None]

    return call


def formed(make: Callable) -> Callable:
    """The same peer where it gives products, and the mean of ``v^T H v`` made of them where that is asked for."""

    @functools.wraps(make)
    def maker(data) -> Call:
        if data.case.mode != "forms":
            return make(data)
        products = make(dataclasses.replace(data, case=dataclasses.replace(data.case, mode="hessian")))
        return lambda: (data.v * products()).sum(1).mean()[None, None]

    return maker


@formed
def fused_bf16(data) -> Call:
    """fastflat with tangents in bfloat16."""
    return _ours(data, tangent_dtype=torch.bfloat16)


@formed
def finite_difference(data) -> Call:
    """Central differences of the gradient."""
    if data.case.mode != "hessian":
        raise ValueError("differences of gradients give the Hessian")
    return _ours(data, method="finite_difference")


def _ours(data, **options) -> Call:
    kind = {"hessian": curvature.Hessian, "ggn": curvature.GGN}[data.case.mode]
    operator = kind(data.model, data.loss, [(data.x, data.y)], **options)
    operator.matmat(data.v[:1])

    def call() -> Tensor:
        _moved(data)
        return operator.matmat(data.v)

    return call


def _moved(data) -> None:
    """A step of the parameters, of length zero: an operator linearises anew. Its trace stays, as for a next batch."""
    with torch.no_grad():
        data.parameters()[0].add_(0)


@formed
def double_backward(data) -> Call:
    """Double backward with one graph for all K vectors, one after another."""
    if data.case.mode != "hessian":
        raise ValueError("double backward gives the Hessian")

    def call() -> Tensor:
        params = data.parameters()
        grads = torch.autograd.grad(data.loss(data.model(data.x), data.y), params, create_graph=True)
        rows = []
        for k in range(len(data.v)):
            v = [t[k] for t in data.split(data.v)]
            found = torch.autograd.grad(grads, params, v, retain_graph=True, allow_unused=True)
            rows.append(torch.cat([_or_zeros(h, p).flatten() for h, p in zip(found, params, strict=True)]))
        return torch.stack(rows)

    return call


@formed
def pyhessian(data) -> Call:
    """PyHessian's products at one batch, where it is installed."""
    package = _package("pyhessian", data, "hessian")
    product = importlib.import_module("pyhessian.utils").hessian_vector_product

    def call() -> Tensor:
        data.model.zero_grad()
        operator = package.hessian(data.model, data.loss, data=(data.x, data.y), cuda=data.x.is_cuda)
        rows = []
        for k in range(len(data.v)):
            found = product(operator.gradsH, operator.params, [t[k] for t in data.split(data.v)])
            rows.append(torch.cat([h.flatten() for h in found]))
        data.model.zero_grad()
        return torch.stack(rows)

    return call


@formed
def curvlinops(data) -> Call:
    """curvlinops, where it is installed; without its check that products repeat."""
    package = _package("curvlinops", data)
    kind = {"hessian": "HessianLinearOperator", "ggn": "GGNLinearOperator"}[data.case.mode]
    loss = torch.nn.CrossEntropyLoss()

    def call() -> Tensor:
        operator = getattr(package, kind)(
            data.model, loss, data.parameters(), [(data.x, data.y)], check_deterministic=False
        )
        return (operator @ data.v.t()).t()

    return call


@formed
def eigenthings(data) -> Call:
    """hessian-eigenthings, where it is installed: one vector at a time."""
    package = _package("hessian_eigenthings.operators", data, "hessian")

    def loss(model, batch) -> Tensor:
        return data.loss(model(batch[0]), batch[1])

    def call() -> Tensor:
        operator = package.HessianOperator(data.model, [(data.x, data.y)], loss)
        return torch.stack([operator.matvec(v) for v in data.v])

    return call


@formed
def func_vmap(data) -> Call:
    """``vmap(jvp(grad))``, for Gauss-Newton ``vmap`` of jvp, the loss's product and vjp."""
    one = _one_product(data)

    def call() -> Tensor:
        return _joined(vmap(one)(_named(data)), len(data.v))

    return call


@formed
def func_loop(data) -> Call:
    """The same without vmap."""
    one = _one_product(data)

    def call() -> Tensor:
        vectors = _named(data)
        rows = [_joined({n: t[None] for n, t in one({n: t[k] for n, t in vectors.items()}).items()}, 1)
                for k in range(len(data.v))]  # fmt: skip
        return torch.cat(rows)

    return call


@formed
def func_linearize(data) -> Call:
    """``vmap`` of ``torch.func.linearize``."""
    if data.case.mode != "hessian":
        raise ValueError("one linearisation of the gradient gives the Hessian")
    if data.case.quantized:
        raise ValueError("a linearised program holds fastflat's raw ops, over which vmap only loops")

    def call() -> Tensor:
        params = _detached(data)
        _, push = linearize(grad(_loss_of(data)), params)
        return _joined(vmap(push)(_named(data)), len(data.v))

    return call


@formed
def func_compiled(data) -> Call:
    """``torch.compile`` of ``vmap(jvp(grad))``, one object for the shape."""
    if data.case.quantized:
        raise ValueError("torch.func inside torch.compile: fastflat's quantizers refuse it")
    compiled = torch.compile(vmap(_one_product(data)), dynamic=False)

    def call() -> Tensor:
        return _joined(compiled(_named(data)), len(data.v))

    return call


def _one_product(data) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    params = _detached(data)
    if data.case.mode == "hessian":
        of = grad(_loss_of(data))
        return lambda v: jvp(of, (params,), (v,))[1]

    def outputs(at: dict[str, Tensor]) -> Tensor:
        return functional_call(data.model, at, (data.x,))

    def product(v: dict[str, Tensor]) -> dict[str, Tensor]:
        z, rz = jvp(outputs, (params,), (v,))
        _, hz = jvp(grad(lambda out: data.loss(out, data.y)), (z,), (rz,))
        return vjp(outputs, params)[1](hz)[0]

    return product


def _loss_of(data) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda params: data.loss(functional_call(data.model, params, (data.x,)), data.y)


def _detached(data) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in data.model.named_parameters()}


def _named(data) -> dict[str, Tensor]:
    return dict(zip(_detached(data), data.split(data.v), strict=True))


def _joined(of_parameters: dict[str, Tensor], k: int) -> Tensor:
    return torch.cat([t.reshape(k, -1) for t in of_parameters.values()], 1)


def _or_zeros(t: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if t is None else t


def _package(name: str, data, only: str | None = None) -> ModuleType:
    if only is not None and data.case.mode != only:
        raise ValueError(f"{name.split('.')[0]} has no {data.case.mode} here")
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"{name.split('.')[0]} is not installed") from None

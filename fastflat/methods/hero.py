# SPDX-License-Identifier: Apache-2.0
"""HERO: "HERO: Hessian-Enhanced Robust Optimization for Unifying and Improving Generalization and Quantization
Performance", Yang, Yang, Gong and Chen, DAC 2022, arXiv 2111.11986.

A step goes to the worst place of adaptive SAM and penalises how much the gradient changed on the way::

    e  = h w^2 g / ||w| g|                     the norm over all tensors
    R  = strength sum_i mean((grad_i L(w + e) - g_i)^2)        g constant; i over tensors of two axes or more
    u  = grad L(w + e) + grad R = g' + H(w + e) r,   r_i = 2 strength/n_i (g'_i - g_i), 0 for the other tensors
    w <- base step from w along u

Two ways to the product with the Hessian: :class:`ExactHERO` differentiates R (two passes, the second differentiated
twice); :class:`HERO` takes a finite difference along r (three passes, any operation with one derivative).

Our reading: the paper writes the norm of the change, its code the mean of its square for each tensor; ours is the
code's, and ``strength`` belongs to that mean. Tensors of one axis (biases, normalisation) enter the ascent but not R,
as in the code, which finds them by name. Defaults: ``rho`` (h) 0.5 and ``strength`` 5, its command for ResNet-20.

Defects of the released code that are not repeated: the first epoch neither differentiates R nor puts the weights back
where ``zero_grad`` sets None, and diverges; statistics of batch normalisation move twice a step (``model=`` keeps those
of the first pass); one layer in four of VGG is skipped by its position.

```python
import torch
import fastflat as ff

model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 3))
opt = ff.methods.ExactHERO(model, lr=0.1, momentum=0.9, rho=0.5, strength=5.0)
for _ in range(3):
    x, y = torch.randn(16, 8), torch.randint(3, (16,))

    def closure():
        opt.zero_grad()
        loss = opt.penalized(torch.nn.functional.cross_entropy(model(x), y))
        loss.backward()
        return loss

    loss = opt.step(closure)
```
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastflat.methods import lab
from fastflat.methods._contract import Arm, Check, Claim, Experiment, Figure, Method, Settings
from fastflat.methods._hook import Hook
from fastflat.optim import HERO, SAM, SGD

__all__ = ["HERO", "METHOD", "ExactHERO"]

_BITS = (8, 4, 3, 2)


class ExactHERO(SAM):
    """HERO with the exact product with the Hessian, by differentiating the second pass twice.

    Args:
        params: parameters, groups, or a model, whose buffers then stay as the first pass left them.
        base: see :class:`fastflat.optim.SAM`.
        rho: radius of the adaptive ascent, at least 0; 0 is the base.
        strength: weight of the penalty, at least 0; 0 is adaptive SAM.

    The loss passes through :meth:`penalized` in each call of the closure. Every operation must have a second
    derivative. Others as :class:`fastflat.optim.SAM`; without ``torch.amp.GradScaler``, whose factor the penalty would
    have squared. Source: arXiv 2111.11986.
    """

    def __init__(self, params, base="sgd", rho: float = 0.5, strength: float = 5.0, **options: Any):
        op = "fastflat.methods.ExactHERO"
        if not 0 <= strength < float("inf"):
            raise ValueError(f"{op}: strength must be a finite number of at least 0, got {strength!r}")
        if not options.pop("adaptive", True):
            raise ValueError(f"{op}: adaptive must be True, got False; its ascent is the adaptive one")
        self.strength = float(strength)
        super().__init__(params, base, rho, True, **options)

    def first_step(self, zero_grad: bool = False) -> None:
        """The ascent; see :meth:`fastflat.optim.SAM.first_step`. The gradients are kept for the penalty."""
        super().first_step(zero_grad=False)
        if self.strength:
            self._firsts = {p: p.grad.clone() for p in self._all() if p.grad is not None and p.dim() > 1}
        self._end_pass(zero_grad)

    def penalized(self, loss: Tensor) -> Tensor:
        """The loss in the first pass, ``loss + R`` in the second: what ``backward`` is called on.

        Args:
            loss: a scalar, as the network gave it.

        Raises:
            RuntimeError: no tensor of two axes or more has a gradient in both passes.
        """
        if not self._between or not self.strength:
            return loss
        chosen = [p for p in self._firsts if p.requires_grad]
        grads = torch.autograd.grad(loss, chosen, create_graph=True, allow_unused=True) if chosen else ()
        pairs = [(g, self._firsts[p]) for p, g in zip(chosen, grads, strict=True) if g is not None]
        if not pairs:
            raise RuntimeError("fastflat.methods.ExactHERO: no tensor of two axes or more has both gradients")
        return loss + self.strength * sum((g - first).square().mean() for g, first in pairs)

    def second_step(self, zero_grad: bool = False) -> None:
        """The base's step; see :meth:`fastflat.optim.SAM.second_step`."""
        if any(of is not None for of in self._scaling()):
            self.restore()
            raise RuntimeError("fastflat.methods.ExactHERO: must step without a GradScaler; use HERO or bfloat16")
        super().second_step(zero_grad)


class _Penalty(Hook):
    """The loop's loss through :meth:`ExactHERO.penalized`."""

    def start(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        self._penalized = getattr(optimizer, "penalized", lambda loss: loss)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        loss, scores = super().loss(model, x, y)
        return self._penalized(loss), scores


def _moved(kind: type, loss: Callable[[Tensor], Tensor], start: Tensor, steps: int = 1, **options: Any) -> Tensor:
    """Where so many steps lead from a place."""
    w = nn.Parameter(start.clone())
    opt = kind([w], **options)
    penalized = getattr(opt, "penalized", lambda value: value)

    def closure() -> Tensor:
        opt.zero_grad()
        value = penalized(loss(w))
        value.backward()
        return value

    for _ in range(steps):
        opt.step(closure)
    return w.detach()


def _check() -> Iterator[Check]:
    g = torch.Generator().manual_seed(0)
    start = torch.randn(6, 1, dtype=torch.float64, generator=g)
    a = torch.randn(6, 6, dtype=torch.float64, generator=g)
    a = (a + a.T) / 4
    h, strength = 0.3, 2.0

    def quadratic(w: Tensor) -> Tensor:
        return (w.T @ a @ w).sum() / 2

    def quartic(w: Tensor) -> Tensor:
        return quadratic(w) + w.pow(4).sum() / 8 + w.sin().prod()

    slope = a @ start
    e = h * start.square() * slope / (start * slope).norm()
    options = {"lr": 1.0, "rho": h, "strength": strength}
    for kind, tolerance in ((ExactHERO, 1e-13), (HERO, 1e-9)):
        want = a @ (start + e) + 2 * strength / 6 * a @ a @ e
        off = float((start - _moved(kind, quadratic, start, **options) - want).abs().max())
        yield Check(f"{kind.__name__}: error on w'Aw / 2", 0.0, off, tolerance, "g' + 2 strength/n A^2 e")
    exact = _moved(ExactHERO, quartic, start, **options)
    errors = [float((_moved(HERO, quartic, start, **options, fd_radius=r) - exact).norm()) for r in (1e-4, 1e-5)]
    yield Check("error of the finite difference, radius 1e-4 over 1e-5", 10.0, errors[0] / errors[1], 0.05, "order 1")
    plain = {"lr": 0.05, "momentum": 0.9, "steps": 4}
    sam = _moved(SAM, quartic, start, rho=h, adaptive=True, **plain)
    sgd = _moved(SGD, quartic, start, **plain)
    for kind in (ExactHERO, HERO):
        other = _moved(kind, quartic, start, rho=h, strength=0.0, **plain)
        yield Check(f"{kind.__name__}: bits beside ASAM", 0, int((other != sam).sum()), 0, "strength = 0")
    other = _moved(ExactHERO, quartic, start, rho=0.0, strength=strength, **plain)
    yield Check("ExactHERO: distance from SGD", 0.0, float((other - sgd).abs().max()), 1e-14, "h = 0")


def _network() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))


def _train(name: str, seed: int, settings: Settings) -> dict[str, float]:
    parts = lab.two_moons(seed=seed)
    common = {"lr": settings.choice["lr"], "momentum": 0.9, "weight_decay": 5e-4}
    make = {
        "sgd": functools.partial(SGD, **common),
        "sam": functools.partial(SAM, rho=0.3, **common),
        "asam": functools.partial(SAM, rho=0.5, adaptive=True, **common),
        "hero": functools.partial(ExactHERO, rho=0.5, strength=5.0, **common),
        "hero_fd": functools.partial(HERO, rho=0.5, strength=5.0, **common),
    }[name]
    done = lab.fit(
        _network,
        lambda m: make(m.parameters()),
        parts.train,
        settings.steps,
        seed,
        batch=settings.batch,
        hook=_Penalty(),
    )
    found = lab.measure(done, parts, bits=_BITS, axis=None, eigenvalue=True)
    with torch.no_grad():
        found["largest_weight"] = max(float(p.abs().max()) for p in done.model.parameters() if p.dim() > 1)
    return found


def _arm(name: str, passes: float) -> Arm:
    return Arm(name, lambda seed, settings: _train(name, seed, settings), passes)


METHOD = Method(
    name="hero",
    number=1,
    title="HERO: Hessian-Enhanced Robust Optimization for Unifying and Improving Generalization and Quantization"
    " Performance",
    authors="Yang, Yang, Gong, Chen",
    year=2022,
    arxiv="2111.11986",
    claim=(
        "Penalising the change of the gradient along the adaptive ascent gives flatter networks whose weights bear low"
        " bits; tested beside SAM, which is flat too but whose weights grow, so that rounding to few bits ruins it."
    ),
    kernels=("sharpness", "descent"),
    check=_check,
    recipe={"optimizer": "hero"},
    experiment=Experiment(
        summary="Two moons, two hidden layers of 64 tanh units, weights rounded on one grid a layer; equal passes.",
        arms=(_arm("sgd", 1), _arm("sam", 2), _arm("asam", 2), _arm("hero", 4), _arm("hero_fd", 3)),
        claims=(
            Claim("accuracy_3", "hero", "sgd"),
            Claim("top_eigenvalue", "hero", "sgd", "lower"),
            Claim("accuracy_3", "hero_fd", "sgd"),
            Claim("top_eigenvalue", "sam", "sgd", "lower"),
            Claim("accuracy_3", "sam", "sgd", "lower"),
            Claim("accuracy_3", "hero", "sam"),
        ),
        full=Settings(passes=6000, seeds=5),
        quick=Settings(passes=400, seeds=1, tune=False),
        grid={"lr": (0.1, 0.05, 0.2)},
        tried=(
            "SAM does not round worse than SGD: the two lie within each other's spread over five seeds. ASAM,"
            " whose ascent scales with the weights as HERO's does, keeps nearly as much at 3 bits as HERO."
        ),
        figure=Figure(
            "lines",
            tuple(f"accuracy_{n}" for n in _BITS),
            tuple(map(str, _BITS)),
            "bits of the weights after training",
            "test accuracy",
        ),
    ),
)

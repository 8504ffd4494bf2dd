# SPDX-License-Identifier: Apache-2.0
"""CURE: "Robustness via Curvature Regularization, and Vice Versa", Moosavi-Dezfooli, Fawzi, Uesato and Frossard, CVPR
2019, arXiv 1811.09716.

A network whose loss bends little in its inputs resists small perturbations of them. With g_i the gradient of the loss
of sample i in its input, the curvature along the direction in which an attack would go is a difference of two::

    z_i = sign(g_i(x_i)) / |sign(g_i(x_i))|                      taken as a constant
    G_i = g_i(x_i + h z_i) - g_i(x_i)                            h H_i z_i, to first order
    L   = cross-entropy + strength mean_i |G_i|^2                squared=True, the paper
    L   = cross-entropy + strength mean_i |G_i|                  squared=False, the released code

The cross-entropy is taken in the mode the model is in, the penalty in evaluation mode, in which samples do not see each
other. Its gradient in the weights is that of ``<u_i, g_i(x_i + h z_i) - g_i(x_i)>`` with ``u_i = 2 G_i`` or
``G_i / |G_i|``, 0 where G_i vanishes: a double backward through both points. A step costs five passes, a double
backward counted as two.

The hidden batch factor. The released code differentiates the mean over a batch of B, which makes g_i smaller by B, and
starts backward at B ones, which old torch summed: B again, so that its G_i were those of the single losses, and its
strength was tuned for them. Current torch refuses the ones; leaving them out weakens the penalty by B, squared by B^2.
Ours are gradients of the single losses, whatever B; ``strength`` has the released code's scale.

Our reading. The sign of a zero is zero and does not count in the length of z (the released code adds 1e-7). Where the
paper fine-tunes a clean network, the lengths may as well rise from the start: with a small h the penalty hardly acts.
Behind piecewise linear networks (ReLU) the Hessian is that of the softmax alone, and so is what the penalty sees.
Defaults: lengths 0.1, 0.4, 0.8, 1.8, 3 by epoch, then 3, and strength 4, of the released code, in units of normalised
CIFAR-10 and tuned for the unsquared form. Its import of ``zero_gradients``, which current torch lacks, is not
repeated.

```python
import torch
import fastflat as ff

model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3))
opt = torch.optim.Adam(model.parameters(), lr=1e-3)
objective = ff.methods.CURELoss(lengths=(0.1, 0.4, 0.8), strength=4.0)
for epoch in range(3):
    objective.set_epoch(epoch)
    x, y = torch.randn(16, 8), torch.randint(3, (16,))
    opt.zero_grad()
    loss, scores = objective(model, x, y)
    loss.backward()
    opt.step()
bends = ff.methods.curvature_penalty(model, x, y, h=0.8, squared=False)
```
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fastflat import _checks, curvature
from fastflat._ops import compute_dtype
from fastflat.curvature import _batch
from fastflat.evaluate import _runs
from fastflat.methods import lab
from fastflat.methods._contract import Arm, Check, Claim, Experiment, Figure, Method, Settings
from fastflat.methods._hook import Hook
from fastflat.methods.lab import robust

__all__ = ["METHOD", "CURELoss", "curvature_penalty"]

_LENGTHS = (0.1, 0.4, 0.8, 1.8, 3.0)


def curvature_penalty(
    model: nn.Module,
    x: Tensor,
    y: Any,
    h: float,
    *,
    squared: bool = True,
    loss: Callable[[Tensor, Any], Tensor] | None = None,
) -> Tensor:
    """``|G_i|^2`` or ``|G_i|`` of each sample, ``[B]``, differentiable in the parameters unless gradients are off.

    The model runs in evaluation mode on copies of its buffers; modes, buffers and ``.grad`` stay as they are.

    Args:
        model: returns logits ``[B, C]``, or what ``loss`` takes; batch norm with running statistics.
        x: inputs ``[B, ...]``, floating; ``x + h z`` may leave the range of the data.
        y: classes ``[B]``, or what ``loss`` takes.
        h: length of the difference, in the l2 norm of x; over 0.
        squared: of the paper; else the released code's.
        loss: ``(output, y) -> [B]``, one number for each sample; cross-entropy by default.

    Raises:
        TypeError, ValueError: an argument is not as above, or the loss does not depend on x.
    """
    name = "methods.curvature_penalty"
    _runs.module(name, model)
    _positive(name, "h", h)
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2 or not x.numel():
        got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x)
        _checks.fail(name, "x", "be a floating tensor [B, ...] of at least one sample", got)
    if loss is None and (not isinstance(y, Tensor) or y.is_floating_point() or y.shape != x.shape[:1]):
        got = f"{y.dtype} {list(y.shape)}" if isinstance(y, Tensor) else type(y)
        _checks.fail(name, "y", f"be integers [B={len(x)}]", got)
    if torch.is_inference_mode_enabled():
        _checks.fail(name, "the call", "lie outside of torch.inference_mode()", "one inside")
    further = torch.is_grad_enabled()
    with _runs.undisturbed(model, evaluating=True), torch.enable_grad():
        coupled = _batch.coupling(model)
        if coupled is not None:
            _checks.fail(name, "model", "keep samples apart", f"{coupled} without running statistics")
        here = _input_gradient(name, model, x.detach(), y, loss, further)
        sign = here.detach().sign().flatten(1)
        z = (sign / sign.norm(dim=1, keepdim=True).clamp(min=1)).view_as(x)
        there = _input_gradient(name, model, (x.detach() + h * z).to(x.dtype), y, loss, further)
        G = (there - here).flatten(1)
        return G.square().sum(1) if squared else torch.linalg.vector_norm(G, dim=1)


def _input_gradient(name: str, model: nn.Module, x: Tensor, y: Any, loss: Callable | None, further: bool) -> Tensor:
    """The gradient of each sample's loss in its input, at least in float32."""
    leaf = x.requires_grad_()
    output = model(leaf)
    if loss is None:
        if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != len(x):
            got = list(output.shape) if isinstance(output, Tensor) else type(output)
            _checks.fail(name, "model", f"return logits [B={len(x)}, C]", got)
        losses = F.cross_entropy(output.to(compute_dtype(output.dtype)), y, reduction="none")
    else:
        losses = loss(output, y)
        if not isinstance(losses, Tensor) or losses.shape != x.shape[:1]:
            got = list(losses.shape) if isinstance(losses, Tensor) else type(losses)
            _checks.fail(name, "loss", f"return one number for each sample, [B={len(x)}]", got, "; reduction='none'")
    # The sum, not the mean: no gradient carries the size of the batch.
    found = [None]
    if losses.requires_grad:
        found = torch.autograd.grad(losses.sum(), leaf, create_graph=further, allow_unused=True)
    if found[0] is None:
        _checks.fail(name, "model", "be differentiable in its inputs", "a loss without a gradient in them")
    return found[0].to(compute_dtype(found[0].dtype))


def _positive(name: str, argument: str, value: Any, zero: bool = False) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not (value >= 0 if zero else value > 0):
        _checks.fail(name, argument, f"be a finite number {'of at least' if zero else 'over'} 0", repr(value))


class CURELoss:
    """Cross-entropy with the penalty, for a plain loop: ``objective(model, x, y)`` gives (loss, scores).

    The scores are those of x in the mode the model is in, of one pass, which alone moves running statistics.

    Args:
        lengths: h, or the h of each epoch, the last one from there on; :meth:`set_epoch` tells which it is.
        strength: factor of the penalty's mean over the batch; 0 leaves it out.
        squared: the paper's form, else the released code's.

    Attributes:
        h: of the present epoch.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    def __init__(
        self, lengths: float | Sequence[float] = _LENGTHS, strength: float = 4.0, squared: bool = True
    ) -> None:
        name = "methods.CURELoss"
        self.lengths = tuple(lengths) if isinstance(lengths, (tuple, list)) else (lengths,)
        if not self.lengths:
            _checks.fail(name, "lengths", "hold at least one", "none")
        for h in self.lengths:
            _positive(name, "lengths", h)
        _positive(name, "strength", strength, zero=True)
        self.strength, self.squared, self.h = strength, bool(squared), self.lengths[0]

    def set_epoch(self, epoch: int) -> None:
        """Before the passes of epoch 0, 1, ..."""
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
            _checks.fail("methods.CURELoss.set_epoch", "epoch", "be an integer of at least 0", repr(epoch))
        self.h = self.lengths[min(epoch, len(self.lengths) - 1)]

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        scores = model(x)
        loss = F.cross_entropy(scores.to(compute_dtype(scores.dtype)), y)
        if self.strength:
            loss = loss + self.strength * curvature_penalty(model, x, y, self.h, squared=self.squared).mean()
        return loss, scores


class _Rising(Hook):
    """CURE whose lengths rise over the first half of the steps."""

    def __init__(self, strength: float = 4.0, squared: bool = True) -> None:
        self._objective = CURELoss(strength=strength, squared=squared)

    def start(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        self._each = max(1, steps // (2 * len(_LENGTHS)))

    def before(self, step: int) -> None:
        self._objective.set_epoch(step // self._each)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._objective(model, x, y)


def _check() -> Iterator[Check]:
    g = torch.Generator().manual_seed(0)
    double = {"dtype": torch.float64, "generator": g}
    A, x, h = torch.randn(6, 6, **double), torch.randn(5, 6, **double), 1.5
    H = A + A.T
    z = (x @ H).sign() / 6**0.5
    bent = curvature_penalty(nn.Identity(), x, None, h, squared=False, loss=lambda v, _: ((v @ H) * v).sum(1) / 2)
    off = float((bent - h * (z @ H).norm(dim=1)).detach().abs().max())
    yield Check("quadratic loss: error of |G|", 0.0, off, 1e-12, "h |H z|")

    w, v = 1.7, torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    logistic = nn.Linear(1, 2, bias=False, dtype=torch.float64)
    with torch.no_grad():
        logistic.weight.copy_(torch.tensor([[0.0], [w]]))
    p = torch.sigmoid(w * v[:, 0])
    rate = curvature_penalty(logistic, v, torch.zeros(9, dtype=torch.long), 1e-6, squared=False).detach() / 1e-6
    off = float((rate - p * (1 - p) * w * w).abs().max())
    yield Check("logistic input: error of |G| / h as h -> 0", 0.0, off, 1e-5, "p (1 - p) w^2")

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    y = torch.tensor([0, 1, 2, 0, 1])
    summed = functools.partial(F.cross_entropy, reduction="sum")
    op = curvature.InputHessian(net, summed, x, y, reduction="sum")
    z = op.gradients().sign() / 6**0.5
    rate = curvature_penalty(net, x, y, 1e-6, squared=False).detach() / 1e-6
    off = float((rate - op.matmat(z).norm(dim=1)).abs().max())
    yield Check("tanh network: error of |G| / h as h -> 0", 0.0, off, 1e-5, "|H z|")

    G = curvature.InputHessian(net, summed, x + h * z, y, reduction="sum").gradients() - op.gradients()
    names, weights = zip(*net.named_parameters(), strict=True)
    for squared, u in ((True, 2 * G), (False, G / G.norm(dim=1, keepdim=True))):
        found = torch.autograd.grad(curvature_penalty(net, x, y, h, squared=squared).sum(), weights)

        def loss(params: Any, inputs: Tensor) -> Tensor:
            return summed(functional_call(net, dict(zip(names, params, strict=True)), inputs), y)

        there, here = (curvature.mixed_hvp(loss, list(weights), at, u) for at in (x + h * z, x))
        off = max(float((f - (a - b)).abs().max()) for f, a, b in zip(found, there, here, strict=True))
        kind = "squared" if squared else "unsquared"
        yield Check(f"{kind}: error of the gradient in the weights", 0.0, off, 1e-12, "d/dw <u, g(x + hz) - g(x)>")

    alone = torch.cat([curvature_penalty(net, x[i : i + 1], y[i : i + 1], h) for i in range(5)])
    off = float((alone - curvature_penalty(net, x, y, h)).detach().abs().max())
    yield Check("change of |G|^2 with the batch", 0.0, off, 1e-14, "gradients of single losses")
    mean = curvature_penalty(net, x, y, h, loss=lambda s, t: F.cross_entropy(s, t, reduction="none") / 5)
    ratio = float((curvature_penalty(net, x, y, h).sum() / mean.sum()).detach())
    yield Check("B = 5: the penalty over that of gradients of the mean", 25.0, ratio, 1e-10, "B^2, squared")


def _input_curvature(model: nn.Module, data: tuple[Tensor, Tensor], products: int = 10) -> float:
    """The mean over 200 samples of the largest eigenvalue of the Hessian in the input, by the power method from g."""
    x, y = data[0][:200], data[1][:200]
    with _runs.evaluating(model):
        op = curvature.InputHessian(model, functools.partial(F.cross_entropy, reduction="sum"), x, y, reduction="sum")
        v = F.normalize(op.gradients())
        for _ in range(products):
            v = F.normalize(op.matmat(v))
        return float((v * op.matmat(v)).sum(1).mean())


_EPS = 0.1
_PGD_STEPS = 7


def _hook(name: str, choice: Mapping[str, float], eps: float, lo: float, hi: float) -> Hook:
    """What an arm trains on."""
    if name == "plain":
        return Hook()
    if name == "pgd":
        return robust.AdversarialTraining(eps, steps=_PGD_STEPS, lo=lo, hi=hi)
    return _Rising(choice["strength"], squared=name == "cure")


def _train(name: str, seed: int, settings: Settings) -> dict[str, float]:
    hook = _hook(name, settings.choice, *robust.ball(_EPS, settings))
    parts, done = robust.fit(hook, seed, settings)
    right = {
        part: robust.robust_correct(done.model, parts, part, _EPS, robust.pgd_attack(20)).double().mean()
        for part in ("validation", "test")
    }
    found = lab.measure(done, parts)
    return {
        **found,
        "robust_accuracy": float(right["test"]),
        # Robust accuracy alone would choose a dead network for the plain arm: one guess in ten is right.
        "mean_validation_accuracy": (found["validation_accuracy"] + float(right["validation"])) / 2,
        "input_curvature": _input_curvature(done.model, parts.test),
    }


def _arm(name: str, passes: float) -> Arm:
    return Arm(name, lambda seed, settings: _train(name, seed, settings), passes)


METHOD = Method(
    name="cure",
    number=16,
    title="Robustness via Curvature Regularization, and Vice Versa",
    authors="Moosavi-Dezfooli, Fawzi, Uesato, Frossard",
    year=2019,
    arxiv="1811.09716",
    claim=(
        "A loss that bends little in its inputs makes a network about as robust as adversarial training does, which"
        " itself lowers the curvature; tested at equal passes against plain and PGD adversarial training, which the"
        " published table puts 7.4 points ahead of it under attack and 1.8 behind without."
    ),
    kernels=("curvature", "descent"),
    check=_check,
    hook=_Rising,
    experiment=Experiment(
        summary=(
            "Fashion-MNIST, eps 0.1 of the range of a pixel, a network of two hidden layers; plain training, training"
            " on inputs of 7 steps of PGD, and CURE in both forms, with lengths that rise to 3, with equal passes."
            " The mean of clean and robust accuracy on validation images is tuned."
        ),
        arms=(_arm("plain", 1), _arm("pgd", _PGD_STEPS + 1), _arm("cure", 5), _arm("cure_unsquared", 5)),
        claims=(
            Claim("robust_accuracy", "cure", "plain"),
            Claim("robust_accuracy", "cure_unsquared", "plain"),
            Claim("robust_accuracy", "cure", "pgd", margin=-0.08),
            Claim("test_accuracy", "cure", "pgd"),
            Claim("input_curvature", "cure", "plain", "lower"),
            Claim("input_curvature", "pgd", "plain", "lower"),
        ),
        full=Settings(passes=5000, seeds=3, images=6000, test_images=2000),
        quick=Settings(passes=600, seeds=1, images=1200, test_images=400, tune=False),
        grid={"lr": (0.05, 0.02), "strength": (1.0, 4.0)},
        tuned_on="mean_validation_accuracy",
        figure=Figure("dots", ("test_accuracy", "robust_accuracy"), ("none", "PGD"), "attack", "accuracy"),
    ),
)

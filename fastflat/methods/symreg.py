# SPDX-License-Identifier: Apache-2.0
"""SymReg and SatNL: "Symmetry Regularization and Saturating Nonlinearity for Robust Quantization", Park, Jang and Park,
ECCV 2022, arXiv 2208.00338.

Rounding the weights of an output o changes it by ``sum_i dW_oi x_i``. Behind a ReLU the inputs have a positive mean mu,
so the mean change is ``mu sum_i dW_oi``, which is zero where the row W_o is symmetric about 0 (rounding is odd).
Symmetric rows of a bounded range bear many bit-widths with one set of weights::

    SymReg, "order"     R = gamma sum_o 1/n sum_i (w_(i) + w_(n+1-i))^2       w_(i): the row, sorted
    SymReg, "moments"   R = gamma sum_o (mean(W_o)^2 + c skew(W_o)^2)         skew = m_3 / m_2^1.5
    SatNL               w~ = alpha tanh(w / alpha)

"order" is 0 only for rows that are symmetric; "moments" costs no sorting. The layer computes with w~, so that no
weight, and no step of a grid, is above alpha; its derivatives are ``1 - tanh^2`` and, where alpha is trained,
``tanh - (w/alpha)(1 - tanh^2)``.

Our reading. Of the paper its stated ideas could be read (less error propagation, a clamped range, robustness inherited
by many bits); the equations are ours. Symmetry is by output channel, since that is where errors add up. Defaults are
ours: gamma = 1, c = 0.01, alpha = 3 standard deviations of the layer's weights, fixed. At the start w is chosen so that
w~ are the model's weights, cut at 0.99 alpha. Weight decay acts on w, not on w~.

Batch normalisation that is estimated again after rounding absorbs part of a mean error; the experiment does not do
that. Asymmetric grids, and rounding halves up, break ``Q(-w) = -Q(w)``.

```python
import torch
import fastflat as ff

model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3))
ff.methods.saturate(model)  # SatNL; before the optimizer is made
penalty = ff.methods.SymReg(model, gamma=1.0)
opt = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(3):
    x, y = torch.randn(16, 8), torch.randint(3, (16,))
    opt.zero_grad()
    (torch.nn.functional.cross_entropy(model(x), y) + penalty()).backward()
    opt.step()
ff.methods.bake(model)  # plain weights again, those that the layers computed with
```
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from fastflat import _checks, functional
from fastflat._ops import compute_dtype
from fastflat.evaluate.ptq import post_training_accuracy
from fastflat.methods import lab
from fastflat.methods._contract import Arm, Check, Claim, Experiment, Figure, Method, Settings
from fastflat.methods._hook import Hook
from fastflat.methods.bit_allocation import rounded
from fastflat.methods.lab.networks import ConvNet
from fastflat.optim import SGD

__all__ = ["METHOD", "SatNL", "SymReg", "bake", "saturate", "symmetry"]

_KINDS = ("order", "moments")
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_BITS = (8, 6, 4, 3, 2)
#: Where weights beyond alpha are cut, as a share of it.
_EDGE = 0.99


def symmetry(w: Tensor, kind: str = "order", *, axis: int = 0, skew: float = 0.01) -> Tensor:
    """How far each channel of a weight is from symmetric about 0, summed over channels; differentiable.

    Args:
        w: floating point, two axes or more.
        kind: ``"order"``: mean over i of ``(w_(i) + w_(n+1-i))^2``; ``"moments"``: ``mean^2 + skew * skewness^2``.
        axis: of the output channels.
        skew: factor of the squared skewness.

    Returns:
        A scalar, in fp32 for 16-bit weights.
    """
    if kind not in _KINDS:
        _checks.fail("symmetry", "kind", f"be one of {', '.join(_KINDS)}", repr(kind))
    if not isinstance(w, Tensor) or not w.is_floating_point() or w.dim() < 2:
        got = list(w.shape) if isinstance(w, Tensor) else type(w)
        _checks.fail("symmetry", "w", "be a floating-point tensor of two axes or more", got)
    if not -w.dim() <= axis < w.dim():
        _checks.fail("symmetry", "axis", f"lie in {-w.dim()} to {w.dim() - 1}", axis)
    rows = w.movedim(axis, 0).flatten(1)
    rows = rows.to(compute_dtype(rows.dtype))
    if rows.numel() == 0:
        return rows.sum()
    if kind == "order":
        ordered = rows.sort(1).values
        return (ordered + ordered.flip(1)).square().mean(1).sum()
    found = functional.weight_reduce(rows)
    return found.mean.square().sum() + skew * found.skew.square().sum()


def _layers(op: str, model: nn.Module) -> list[nn.Module]:
    found = [m for m in model.modules() if isinstance(m, _LAYERS)]
    if not found:
        _checks.fail(op, "model", "hold linear or convolution layers", "none")
    return found


class SymReg:
    """The penalty of a model's linear and convolution weights (quantized layers: their float weights), called once a
    step and added to the loss.

    Args:
        model: layers are found once, here; weights are read at each call, saturated ones as the layer computes them.
        gamma: its strength, at least 0.
        kind, skew: see :func:`symmetry`.

    Raises:
        ValueError: no such layers, or an argument out of range.
    """

    def __init__(self, model: nn.Module, gamma: float = 1.0, kind: str = "order", *, skew: float = 0.01) -> None:
        for name, value in (("gamma", gamma), ("skew", skew)):
            if not (math.isfinite(value) and value >= 0):
                _checks.fail("SymReg", name, "be finite and at least 0", value)
        if kind not in _KINDS:
            _checks.fail("SymReg", "kind", f"be one of {', '.join(_KINDS)}", repr(kind))
        self.gamma, self.kind, self.skew = gamma, kind, skew
        self._layers = _layers("SymReg", model)

    def __call__(self) -> Tensor:
        """``gamma`` times the sum over the weights; a weight that layers share counts once."""
        seen: dict[int, Tensor] = {}
        for m in self._layers:
            key = id(m.parametrizations.weight.original) if parametrize.is_parametrized(m, "weight") else id(m.weight)
            if key not in seen:
                axis = 1 if isinstance(m, _TRANSPOSED) else 0
                seen[key] = symmetry(m.weight, self.kind, axis=axis, skew=self.skew)
        return self.gamma * torch.stack(list(seen.values())).sum()


class SatNL(nn.Module):
    """``w~ = alpha tanh(w / alpha)``, a parametrization of a weight (``torch.nn.utils.parametrize``).

    Args:
        alpha: positive, of any shape that broadcasts to the weight's; infinity is the identity.
        learn: make alpha a parameter; then it must be finite.
    """

    def __init__(self, alpha: Tensor | float, learn: bool = False) -> None:
        super().__init__()
        alpha = torch.as_tensor(alpha, dtype=torch.get_default_dtype() if isinstance(alpha, float) else None).detach()
        if not bool((alpha > 0).all()) or (learn and not bool(torch.isfinite(alpha).all())):
            _checks.fail(
                "SatNL", "alpha", "be positive" + (" and finite" if learn else ""), alpha.flatten()[:3].tolist()
            )
        if learn:
            self.alpha = nn.Parameter(alpha.clone())
        else:
            self.register_buffer("alpha", alpha.clone())
        #: The kernel takes a single alpha that bounds.
        self._fused = alpha.dim() == 0 and math.isfinite(alpha)

    def forward(self, w: Tensor) -> Tensor:
        """The saturated weight."""
        if self._fused:
            wide = compute_dtype(w.dtype)
            return functional.saturate(w, self.alpha.to(wide))
        return _saturate(w, self.alpha)

    @torch.no_grad()
    def right_inverse(self, w: Tensor) -> Tensor:
        """The w whose saturation is that; weights from 0.99 alpha on are cut there."""
        alpha = self.alpha.to(w.dtype)
        found = alpha * torch.atanh((w / alpha).clamp(-_EDGE, _EDGE))
        return torch.where(torch.isinf(alpha), w, found)


def _saturate(w: Tensor, alpha: Tensor) -> Tensor:
    alpha = alpha.to(w.dtype)
    # An infinite alpha passes w; the other branch must be finite for its derivative.
    safe = torch.where(torch.isinf(alpha), torch.ones_like(alpha), alpha)
    return torch.where(torch.isinf(alpha), w, safe * torch.tanh(w / safe))


def saturate(model: nn.Module, deviations: float = 3.0, *, learn: bool = False) -> nn.Module:
    """Every linear and convolution layer computes with saturated weights from now on, in place.

    Call it before the optimizer is made, and after :func:`fastflat.prepare` on quantized models, whose weight scales
    are taken anew. Weights that layers share are refused. :func:`bake` takes it back.

    Args:
        model: with such layers.
        deviations: alpha in standard deviations of a layer's weights.
        learn: train alpha.

    Raises:
        ValueError: no such layers, one that is saturated, shared or constant, or an argument out of range. Nothing has
            changed then.
    """
    if not deviations > 0:
        _checks.fail("saturate", "deviations", "be positive", deviations)
    layers, seen = _layers("saturate", model), set()
    for m in layers:
        if parametrize.is_parametrized(m, "weight"):
            _checks.fail("saturate", "model", "have plain weights", f"a parametrized one in {type(m).__name__}")
        if id(m.weight) in seen:
            _checks.fail("saturate", "model", "have a weight of its own in each layer", "a shared one")
        seen.add(id(m.weight))
        spread = float(m.weight.detach().float().std(correction=0)) if m.weight.numel() else 0.0
        if not (math.isfinite(spread) and spread > 0):
            _checks.fail("saturate", "model", "have weights that vary and are finite", f"a deviation of {spread}")
    for m in layers:
        w = m.weight.detach()
        alpha = deviations * (w.to(compute_dtype(w.dtype))).std(correction=0)
        parametrize.register_parametrization(m, "weight", SatNL(alpha, learn))
        quantizer = getattr(m, "weight_quantizer", None)
        if quantizer is not None:
            quantizer.initialise_from(m.weight.detach())
    return model


def bake(model: nn.Module) -> nn.Module:
    """Plain weights in the place of saturated ones, with the values that the layers computed with, in place."""
    for m in model.modules():
        if parametrize.is_parametrized(m, "weight"):
            chain = m.parametrizations.weight
            if len(chain) == 1 and isinstance(chain[0], SatNL):
                parametrize.remove_parametrizations(m, "weight", leave_parametrized=True)
    return model


class _Hook(Hook):
    """Both, or one of them, in an ordinary loop."""

    def __init__(self, gamma: float = 1.0, kind: str = "order", saturated: bool = True) -> None:
        self.gamma, self.kind, self.saturated = gamma, kind, saturated
        self._model: nn.Module | None = None
        self._penalty: SymReg | None = None

    def prepare(self, model: nn.Module) -> None:
        if self.saturated:
            saturate(model)

    def start(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        self._model, self._penalty = model, SymReg(model, self.gamma, self.kind)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        scores = model(x)
        loss = F.cross_entropy(scores.float(), y)
        return (loss + self._penalty() if self.gamma else loss), scores

    def finish(self) -> None:
        if self.saturated:
            bake(self._model)


def _check() -> Iterator[Check]:
    g = torch.Generator().manual_seed(0)
    half = torch.rand(4, 500, generator=g, dtype=torch.float64) + 0.05
    paired, one_sided = torch.cat([half, -half], 1), torch.cat([half, half.flip(1) * 0.7], 1)
    change = [float((rounded(w, 3, scale="absmax") - w).sum(1).abs().max()) for w in (paired, one_sided)]
    yield Check("sum of rounding errors, paired weights", 0.0, change[0], 1e-11, "Q(-w) = -Q(w)")
    yield Check("the same, one-sided weights", 1.0, change[1], 0.0, "for contrast", "at least")
    for kind in _KINDS:
        zero = float(symmetry(paired[:, torch.randperm(1000, generator=g)], kind))
        yield Check(f"{kind}: R of symmetric rows", 0.0, zero, 1e-25, "R = 0 iff symmetric")
        some = float(symmetry(one_sided, kind))
        yield Check(f"{kind}: R of one-sided rows", 1e-3, some, 0.0, "R > 0", "at least")
        w = torch.randn(3, 7, generator=g, dtype=torch.float64, requires_grad=True)
        right = torch.autograd.gradcheck(functools.partial(symmetry, kind=kind), (w,))
        yield Check(f"{kind}: gradient agrees with differences", 1, int(right), 0, "gradcheck")
    w = torch.tensor([[0.0, 1.0, 5.0]], dtype=torch.float64)
    # (0 + 5)^2, (1 + 1)^2, (5 + 0)^2 over 3.
    yield Check("order: R of the row 0, 1, 5", 18.0, float(symmetry(w)), 1e-12, "54 / 3")

    v, alpha = torch.randn(1000, generator=g, dtype=torch.float64), torch.tensor(1.5, dtype=torch.float64)
    v.requires_grad_(), alpha.requires_grad_()
    out = _saturate(v, alpha)
    gv, galpha = torch.autograd.grad(out.sum(), (v, alpha))
    t = torch.tanh(v / alpha).detach()
    yield Check("SatNL: largest weight", 1.5, float(out.detach().abs().max()), 0.0, "|w~| < alpha", "at most")
    yield Check("SatNL: error of d/dw", 0.0, float((gv - (1 - t * t)).abs().max()), 1e-14, "1 - tanh^2")
    want = float((t - v.detach() / 1.5 * (1 - t * t)).sum())
    yield Check("SatNL: d/d alpha", want, float(galpha), 1e-10, "tanh - (w/alpha)(1 - tanh^2)")
    moved = int((_saturate(v, torch.tensor(math.inf)) != v).sum())
    yield Check("SatNL: weights that alpha = inf moves", 0, moved, 0, "the identity")
    back = float((SatNL(alpha).right_inverse(out.detach()) - v.detach()).abs().max())
    yield Check("SatNL: error of the inverse", 0.0, back, 1e-9, "w -> w~ -> w")
    x = torch.rand(2000, 1000, generator=g, dtype=torch.float64).abs()
    ratio = [float(((rounded(w, 3, scale="absmax") - w) @ x.T).mean(1).abs().max()) for w in (paired, one_sided)]
    yield Check("mean change of outputs, paired over one-sided", 0.1, ratio[0] / ratio[1], 0.0, "mu sum dW", "at most")


_ARMS: dict[str, Callable[[float], Hook]] = {
    "sgd": lambda gamma: Hook(),
    "symreg": lambda gamma: _Hook(gamma, saturated=False),
    "satnl": lambda gamma: _Hook(0.0),
    "both": lambda gamma: _Hook(gamma),
}


def _train(name: str, seed: int, settings: Settings) -> dict[str, float]:
    parts = lab.images(settings.images, settings.test_images)
    net = functools.partial(ConvNet, 1, 28, parts.classes)

    def make(model: nn.Module) -> torch.optim.Optimizer:
        return SGD(model.parameters(), lr=settings.choice["lr"], momentum=0.9, weight_decay=5e-4)

    hook = _ARMS[name](settings.choice["gamma"])
    done = lab.fit(net, make, parts.train, settings.steps, seed, batch=settings.batch, hook=hook)
    found = lab.measure(done, parts, bits=_BITS)
    swept = post_training_accuracy(done.model, parts.batches("validation"), _BITS)
    found["validation_sweep"] = sum(swept.values()) / len(swept)
    found["asymmetry"] = float(SymReg(done.model)().detach())
    found["largest_weight"] = max(float(p.detach().abs().max()) for p in done.model.parameters() if p.dim() > 1)
    return found


def _arm(name: str) -> Arm:
    return Arm(name, lambda seed, settings: _train(name, seed, settings))


METHOD = Method(
    name="symreg",
    number=9,
    title="Symmetry Regularization and Saturating Nonlinearity for Robust Quantization",
    authors="Park, Jang, Park",
    year=2022,
    arxiv="2208.00338",
    claim=(
        "Weights that are symmetric by channel and bounded in range bear rounding to many bit-widths after training;"
        " tested by rounding one training's weights to 8, 6, 4, 3 and 2 bits."
    ),
    kernels=("fake_quantize", "weight_norms"),
    check=_check,
    hook=_Hook,
    experiment=Experiment(
        summary=(
            "Fashion-MNIST, a convolutional network of four layers; SGD alone, with SymReg, with SatNL and with both,"
            " rounded after training to five widths."
        ),
        arms=tuple(map(_arm, _ARMS)),
        claims=(
            *(Claim(f"accuracy_{n}", "both", "sgd") for n in (4, 3, 2)),
            Claim("accuracy_3", "symreg", "sgd"),
            Claim("accuracy_3", "satnl", "sgd"),
            Claim("test_accuracy", "both", "sgd", margin=-0.01),
        ),
        full=Settings(passes=1000, seeds=3, images=6000, test_images=2000),
        quick=Settings(passes=60, seeds=1, images=640, test_images=400, tune=False),
        # All arms choose by the mean accuracy over the widths, on validation images.
        grid={"lr": (0.05, 0.1), "gamma": (1.0, 0.1)},
        tuned_on="validation_sweep",
        tried=(
            "Plain training still stands at 4 and 3 bits (86.4 and 85.5 %), which leaves little to gain there. At"
            " 2 bits the penalty, the saturation and both keep 56, 74 and 85 % where SGD keeps 37 %."
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

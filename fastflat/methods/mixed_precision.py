# SPDX-License-Identifier: Apache-2.0
"""Bit-widths layer by layer: "Mixed-Precision Neural Networks: A Survey", Rakka, Fouda, Khargonekar and Kurdahi, 2022,
arXiv 2208.06064.

One framework for each of its families, on one network under one budget of weight bits, all ending in the same training
at the widths found:

==================  ===================================================================================================
sensitivity         HAWQ ``lambda_max``, HAWQ-V2/V3 ``(tr H / n) |Q_b(W) - W|^2``: :func:`sensitive_bits`
data-free           ``|Q_b(W) - W|^2 / |W|^2``, no example read: :func:`sensitive_bits` with ``kind="weights"``
differentiable      DNAS, EdMIPS, FracBits, DiffQ: :class:`SoftBits`
bit planes          :class:`fastflat.methods.CSQ`, in the line of BSQ
reinforcement       :class:`fastflat.methods.SAMQ`
==================  ===================================================================================================

::

    DNAS       w = sum_j pi_j Q_j(w),  pi = softmax((a + Gumbel) / tau)          arXiv 1812.00090
    EdMIPS     w = sum_j pi_j Q_j(w),  pi = softmax(a)                           arXiv 2004.05795
    FracBits   w = (1 - f) Q_k(w) + f Q_(k+1)(w),  k = floor(b), f = b - k       arXiv 2007.02017
    DiffQ      w = w + s/2 U(-1, 1),  s = (max w - min w) / (2^b - 1)            arXiv 2104.09987
    penalty    strength |E bits / target - 1|,  E bits = sum n_l E b_l / sum n_l

Our readings. The survey compares numbers that differ in layers left in floats, in weights alone or activations too, in
size or operations; here all that is the same. Whatever a search has learned, its last word is an integer programme, so
that the budget holds: of ``n_l (b - E b_l)^2``, the likeliest candidate of a pi that has not settled being the cheapest
one all too often. The penalty is two-sided, or momentum carries the widths below the target.
HAWQ's order by ``lambda_max`` becomes scores ``lambda_max / n |Q_b(W) - W|^2``, since a ranking alone has no widths.
Evolution and simulated annealing are not here: they need cheap evaluations, no kernel.

Defaults: widths 2 to 8, tau 1, strength 1; published strengths differ by orders of magnitude with their costs' units,
which the relative penalty takes away.

```python
import torch
import fastflat as ff

model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3))
x, y = torch.randn(64, 8), torch.randint(3, (64,))
soft = ff.methods.SoftBits(model, kind="edmips", widths=(2, 3, 4, 8), target=4)
opt = torch.optim.Adam(model.parameters(), 1e-2)
for _ in range(5):
    loss = torch.nn.functional.cross_entropy(model(x), y) + soft.penalty()
    opt.zero_grad()
    loss.backward()
    opt.step()
bits = soft.finish()
by_curvature = ff.methods.sensitive_bits(model, torch.nn.functional.cross_entropy, [(x, y)], target=4)
model = ff.prepare(model, weights=ff.QuantSpec.lsq(bits=4), bits=bits)
```
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from fastflat import curvature, functional, quant
from fastflat._ops import compute_dtype
from fastflat._spec import QuantSpec
from fastflat.methods import lab
from fastflat.methods._contract import Arm, Check, Claim, Experiment, Figure, Method, Settings
from fastflat.methods._hook import Hook
from fastflat.methods.bit_allocation import allocate_bits, rounded, rounding_errors, sensitivities
from fastflat.methods.csq import CSQ
from fastflat.methods.lab.networks import ConvNet, ends
from fastflat.methods.saq import SAMQ, SAQ, prepare_liq
from fastflat.optim import SGD

__all__ = ["METHOD", "SoftBits", "sensitive_bits"]

KINDS = ("dnas", "edmips", "fracbits", "diffq")
SCORES = ("trace", "eigenvalue", "weights")
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)
_FORM = QuantSpec.lsq(bits=8)


def _chosen(op: str, model: nn.Module, widths: Sequence[int], target: float, skip: Sequence[str]):
    """The layers, after a look at the arguments that all searches share."""
    if (
        list(widths) != sorted(set(widths))
        or not widths
        or not all(isinstance(b, int) and 2 <= b <= 16 for b in widths)
    ):
        raise ValueError(f"{op}: widths must be ascending ints from 2 to 16, got {tuple(widths)}")
    if not widths[0] <= target < math.inf:
        raise ValueError(f"{op}: target must be at least the narrowest width, {widths[0]}, got {target!r}")
    found: dict[str, nn.Module] = {}
    for name, m in model.named_modules():
        if not isinstance(m, _LAYERS) or any(fnmatch.fnmatch(name, pattern) for pattern in skip):
            continue
        if parametrize.is_parametrized(m, "weight") or getattr(m, "weight_quantizer", None) is not None:
            raise ValueError(
                f"{op}: weights must be in floats, got a quantized or parametrized one in {name!r}; skip it"
            )
        if any(m.weight is other.weight for other in found.values()):
            raise ValueError(f"{op}: weights must not be shared between layers, got that of {name!r} again; skip one")
        found[name] = m
    if not found:
        raise ValueError(f"{op}: model must hold a linear or convolution layer that is not skipped, got none")
    return found


def _within(scores: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], target: float) -> dict[str, int]:
    """The widths of least score whose mean over the weights is at most the target."""
    costs = {name: {b: float(b * sizes[name]) for b in of_layer} for name, of_layer in scores.items()}
    return allocate_bits(scores, costs, target * sum(sizes.values())).bits


def sensitive_bits(
    model: nn.Module,
    loss_fn: Callable | None = None,
    data: Iterable | None = None,
    *,
    target: float,
    kind: str = "trace",
    widths: Sequence[int] = (2, 3, 4, 5, 6, 8),
    skip: Sequence[str] = (),
    max_products: int = 200,
) -> dict[str, int]:
    """Widths of a trained model's weights by what their rounding does, at a mean of ``target`` bits or fewer.

    Args:
        model: in floats, as it should be evaluated (``eval()``).
        loss_fn, data: as for :class:`fastflat.curvature.Hessian`; not read with ``kind="weights"``.
        target: mean bits of a weight.
        kind: ``"trace"`` (HAWQ-V2, V3), ``"eigenvalue"`` (HAWQ) or ``"weights"`` (data-free).
        widths: 2 to 16, ascending.
        skip: patterns of names of layers that stay.
        max_products: Hessian products at most: of all traces together, or of each layer's eigenvalue.

    Raises:
        ValueError: arguments out of range, or no data where they are read.
    """
    op = "fastflat.methods.sensitive_bits"
    layers = _chosen(op, model, widths, target, skip)
    if kind not in SCORES:
        raise ValueError(f"{op}: kind must be one of {', '.join(SCORES)}, got {kind!r}")
    weights = {name: m.weight for name, m in layers.items()}
    sizes = {name: w.numel() for name, w in weights.items()}
    errors = rounding_errors(weights, widths)
    if kind == "weights":
        norms = {name: max(float(w.detach().double().square().sum()), 1e-300) for name, w in weights.items()}
        return _within({n: {b: e / norms[n] for b, e in of.items()} for n, of in errors.items()}, sizes, target)
    if loss_fn is None or data is None:
        raise ValueError(f"{op}: loss_fn and data must be given for kind {kind!r}, got none; kind='weights' needs none")
    names = {name: f"{name}.weight" if name else "weight" for name in layers}
    data = list(data)
    if kind == "trace":
        found = curvature.Hessian(model, loss_fn, data, list(names.values())).layer_traces(max_products=max_products)
        values = {name: float(found[full].value) for name, full in names.items()}
    else:
        values = {}
        for name, full in names.items():
            top = curvature.Hessian(model, loss_fn, data, [full]).eigenvalues(1, tol=0.05, max_products=max_products)
            values[name] = float(top.value.max())
    return _within(sensitivities(values, sizes, errors), sizes, target)


class _Soft(nn.Module):
    """A weight between widths, as a parametrization."""

    def __init__(self, w: Tensor, kind: str, widths: tuple[int, ...], target: float, tau: float) -> None:
        super().__init__()
        dtype = compute_dtype(w.dtype)
        self.kind, self.widths, self.tau = kind, widths, tau
        self.register_buffer("values", torch.tensor(widths, dtype=dtype, device=w.device), persistent=False)
        wide = w.detach().to(dtype)
        if kind in ("dnas", "edmips"):
            self.logits = nn.Parameter(torch.zeros_like(self.values))
            # The grid of width b that a weight's rounding of least error lies on: its largest value over qmin.
            steps = [_step(wide, b) for b in widths]
            self.scales = nn.Parameter(torch.stack(steps))
        else:
            self.bits = nn.Parameter(self.values.new_tensor(min(max(target + 1.0, widths[0]), widths[-1])))
            if kind == "fracbits":
                self.range = nn.Parameter(wide.abs().amax().clamp(min=1e-8))

    def forward(self, w: Tensor) -> Tensor:
        if self.kind in ("dnas", "edmips"):
            a = self.logits
            if self.kind == "dnas" and self.training:
                gumbel = -torch.log(-torch.log(torch.rand_like(a).clamp(1e-10, 1 - 1e-7)))
                a = (a + gumbel) / self.tau
            return functional.mixquant(w, self.scales, a.softmax(0), bits=self.widths, spec=_FORM)
        bits = self.held()
        if self.kind == "fracbits":
            return functional.frac_quantize(w, self.range, bits, spec=_FORM)
        step = (w.detach().amax() - w.detach().amin()) / (2.0**bits - 1)
        noise = torch.rand_like(w) * 2 - 1 if self.training else torch.zeros_like(w)
        return (w + step.to(w.dtype) / 2 * noise).to(w.dtype)

    def held(self) -> Tensor:
        """The learned width within those allowed, with a gradient beyond them too, so that it can return."""
        return self.bits + (self.bits.clamp(self.widths[0], self.widths[-1]) - self.bits).detach()

    def expected(self) -> Tensor:
        """E b, 0-dim."""
        return (self.logits.softmax(0) * self.values).sum() if self.kind in ("dnas", "edmips") else self.held()

    def scores(self, size: int) -> dict[int, float]:
        """What each width costs in the last choice."""
        off = (self.values - self.expected().detach()).square() * size
        return dict(zip(self.widths, off.tolist(), strict=True))


def _step(w: Tensor, bits: int) -> Tensor:
    """The step of the rounding of least squared error."""
    levels = rounded(w, bits, QuantSpec(bits=8, mask="none")).abs()
    largest = levels.amax()
    # Neighbouring levels differ by the step, and 0 is one of them.
    least = torch.where(levels > 0, levels, largest).amin()
    return torch.where(largest > 0, least, torch.ones_like(largest))


class SoftBits:
    """Puts every layer's weight, in place, between candidate widths that an optimizer moves, and ends in whole ones.

    Args:
        model: any; its linear and convolution layers are taken. What the search learns are parameters of the model.
        kind: ``"dnas"``, ``"edmips"``, ``"fracbits"`` or ``"diffq"``.
        widths: candidates, 2 to 16, ascending; 8 at most for the first two.
        target: mean bits of a weight.
        strength: of the penalty for expected bits off the target.
        tau: temperature of DNAS.
        skip: patterns of names of layers that stay.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        kind: str,
        target: float,
        widths: Sequence[int] = (2, 3, 4, 5, 6, 8),
        strength: float = 1.0,
        tau: float = 1.0,
        skip: Sequence[str] = (),
    ) -> None:
        op = "fastflat.methods.SoftBits"
        if kind not in KINDS:
            raise ValueError(f"{op}: kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if not 0 <= strength < math.inf or not 0 < tau < math.inf:
            raise ValueError(f"{op}: strength must be at least 0 and tau positive, got {strength!r} and {tau!r}")
        layers = _chosen(op, model, widths, target, skip)
        if kind in ("dnas", "edmips") and len(widths) > 8:
            raise ValueError(f"{op}: widths must be 8 candidates at most for {kind!r}, got {len(widths)}")
        self.target, self.strength, self.layers = float(target), float(strength), layers
        self.sizes = {name: m.weight.numel() for name, m in layers.items()}
        for m in layers.values():
            made = _Soft(m.weight, kind, tuple(widths), self.target, tau).train(m.training)
            parametrize.register_parametrization(m, "weight", made)

    def _parts(self) -> Iterator[tuple[str, _Soft]]:
        for name, m in self.layers.items():
            if not parametrize.is_parametrized(m, "weight"):
                raise RuntimeError("fastflat.methods.SoftBits: the search must go on, got one that finish() has ended")
            yield name, m.parametrizations.weight[0]

    def expected_bits(self) -> Tensor:
        """Mean of E b over the weights, 0-dim, with its gradient."""
        return torch.stack([part.expected() * self.sizes[n] for n, part in self._parts()]).sum() / sum(
            self.sizes.values()
        )

    def penalty(self) -> Tensor:
        """To be added to the loss; no synchronisation."""
        return self.strength * (self.expected_bits() / self.target - 1).abs()

    def choose(self) -> dict[str, int]:
        """Widths nearest to what was learned whose mean is at most the target."""
        return _within({name: part.scores(self.sizes[name]) for name, part in self._parts()}, self.sizes, self.target)

    def finish(self) -> dict[str, int]:
        """:meth:`choose`, and ordinary layers with their float weights again; ``fastflat.prepare`` takes the widths."""
        bits = self.choose()
        for m in self.layers.values():
            # The float weight stays the parameter that optimizers hold.
            parametrize.remove_parametrizations(m, "weight", leave_parametrized=False)
        return bits


def _check() -> Iterator[Check]:
    g = torch.Generator().manual_seed(0)
    w, gy = torch.randn(40, generator=g), torch.randn(40, generator=g)
    scales = torch.tensor([0.9, 0.3, 0.1])
    for j, b in enumerate((2, 3, 4)):
        one = functional.mixquant(w, scales, torch.eye(3)[j], bits=(2, 3, 4), spec=_FORM)
        apart = int((one != functional.fake_quantize(w, scales[j], spec=_FORM.replace(bits=b))).sum())
        yield Check(f"values in which a one-hot mixture differs from {b} bits", 0, apart, 0, "mixquant")
    bits = torch.tensor(3.25, requires_grad=True)
    (slope,) = torch.autograd.grad(functional.frac_quantize(w, torch.tensor(2.0), bits, spec=_FORM), bits, gy)
    three, four = (functional.frac_quantize(w, torch.tensor(2.0), b, spec=_FORM) for b in (3, 4))
    yield Check("FracBits: slope in the width", float((gy * (four - three)).sum()), float(slope), 1e-5, "Q_(k+1) - Q_k")

    layer = nn.Linear(50, 40, bias=False).double()
    soft = SoftBits(layer, kind="edmips", widths=(2, 4, 8), target=2.0)
    part = layer.parametrizations.weight[0]
    with torch.no_grad():
        part.logits.copy_(torch.tensor([0.3, -0.2, 0.5]))
    (got,) = torch.autograd.grad(soft.expected_bits(), part.logits)
    pi = part.logits.detach().softmax(0)
    want = pi * (part.values - (pi * part.values).sum())
    yield Check("EdMIPS: largest error of dE b/da", 0.0, float((got - want).abs().max()), 1e-14, "pi_j (b_j - E b)")

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = torch.randn(200, 200)
        layer = nn.Linear(200, 200, bias=False)
        layer.weight.data.copy_(plain)
        SoftBits(layer, kind="diffq", widths=(2, 8), target=3.0)
        noise = (layer.weight - plain).detach()
        step = (plain.max() - plain.min()) / 15
        ratio = float(noise.square().mean() / (step**2 / 12))
        yield Check("DiffQ: variance over s^2 / 12 at 4 bits", 1.0, ratio, 0.02, "uniform noise")
        rank, excess = _ranks()
    yield Check("HAWQ-V2: rank correlation with the rise of the loss, 12 choices", 0.6, rank, 0.0, "order of Omega",
                "at least")  # fmt: skip
    yield Check("HAWQ-V3: score above the least of all 27 choices", 0.0, excess, 1e-9, "integer programme")


def _ranks() -> tuple[float, float]:
    """Three layers on two moons: rank correlation of scores and measured rises, and what the programme misses."""
    parts = lab.two_moons(200, 200)
    model = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    opt = torch.optim.Adam(model.parameters(), 1e-2)
    x, y = parts.train
    for _ in range(150):
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
    weights = {f"{i}": model[i].weight for i in (0, 2, 4)}
    sizes = {n: w.numel() for n, w in weights.items()}
    traces = curvature.Hessian(model, F.cross_entropy, [(x, y)], [f"{n}.weight" for n in weights]).layer_traces()
    omega = sensitivities({n: float(traces[f"{n}.weight"].value) for n in weights}, sizes,
                          rounding_errors(weights, (2, 3, 4)))  # fmt: skip
    clean = {n: w.detach().clone() for n, w in weights.items()}
    choices = [dict(zip(weights, c, strict=True)) for c in itertools.product((2, 3, 4), repeat=3)]
    scores, losses = [], []
    with torch.no_grad():
        for choice in choices[1::2][:12]:
            for n, b in choice.items():
                weights[n].copy_(rounded(clean[n], b))
            losses.append(float(F.cross_entropy(model(x), y)))
            scores.append(sum(omega[n][b] for n, b in choice.items()))
    a, b = (torch.tensor(v).argsort().argsort().double() for v in (scores, losses))
    found = _within(omega, sizes, 3.0)
    kept = [c for c in choices if sum(sizes[n] * b for n, b in c.items()) <= 3.0 * sum(sizes.values())]
    least = min(sum(omega[n][b] for n, b in c.items()) for c in kept)
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1]), sum(omega[n][b] for n, b in found.items()) - least


_WIDTHS, _TARGET = (2, 3, 4, 5), 3.0
#: Passes that a step of a search takes, where it is not one; products with the Hessian, for each layer's eigenvalue.
_COST = {"samq": 4}
_PRODUCTS = 8
_ARMS = ("uniform", "weights", "eigenvalue", "trace", "dnas", "edmips", "fracbits", "diffq", "csq", "samq")


class _SearchHook(Hook):
    """The search of an arm in the first half of its training."""

    def __init__(self, name: str) -> None:
        self.name, self.bits = name, {}

    def prepare(self, model: nn.Module) -> None:
        skip = ends(model)
        if self.name in KINDS:
            self.soft = SoftBits(model, kind=self.name, widths=_WIDTHS, target=_TARGET, skip=skip)
        elif self.name == "csq":
            self.soft = CSQ(model, planes=_WIDTHS[-1] - 1, target=_TARGET - 1, skip=skip)

    def start(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        self.model, self.optimizer, self.steps = model, optimizer, max(steps, 1)
        if self.name == "csq":
            self.soft.strength = 100.0 / self.steps

    def before(self, step: int) -> None:
        if self.name == "csq":
            self.soft.schedule(step / self.steps)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        loss, scores = super().loss(model, x, y)
        return (loss + self.soft.penalty() if self.name in (*KINDS, "csq") else loss), scores

    def finish(self) -> None:
        if self.name == "csq":
            # A plane for the sign.
            self.bits = {name: layer.bits + 1 for name, layer in self.soft.harden().items()}
        elif self.name in KINDS:
            self.bits = self.soft.finish()


class _Controlled(_SearchHook):
    """SAMQ with the size in place of operations."""

    def __init__(self, layers: Mapping, search: SAMQ, held: tuple[Tensor, Tensor]) -> None:
        super().__init__("samq")
        self.layers, self.search, self.held = layers, search, held

    def before(self, step: int) -> None:
        at = torch.randint(len(self.held[1]), (64,))
        x, y = self.held[0][at], self.held[1][at]
        self.search.update(self.optimizer, lambda: F.cross_entropy(self.model(x), y))
        self.search.apply(self.search.draw().bits)

    def finish(self) -> None:
        self.bits = self.search.choose()
        for name in self.layers:
            parametrize.remove_parametrizations(self.model.get_submodule(name), "weight", leave_parametrized=False)


def _train(name: str, seed: int, settings: Settings) -> dict[str, float]:
    parts = lab.images(settings.images, settings.test_images)
    common = {"lr": settings.choice["lr"], "momentum": 0.9, "weight_decay": 5e-4}
    train, budget = parts.train, settings.steps // 2
    begun = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ConvNet(1, 28, parts.classes)
        skip, hook = ends(model), _SearchHook(name)
        if name == "samq":
            layers = prepare_liq(model, train[0][:64], widths=_WIDTHS, skip=skip, activations=False)
            layers = {n: dataclasses.replace(v, multiplies=v.latent.numel()) for n, v in layers.items()}
            size = sum(v.multiplies for v in layers.values())
            search = SAMQ(model, layers, target=32 * _TARGET * size, lr=0.02)
            held = len(train[1]) // 10
            hook = _Controlled(layers, search, (train[0][:held], train[1][:held]))
            train = (train[0][held:], train[1][held:])

    def make(model: nn.Module) -> torch.optim.Optimizer:
        if name == "samq":
            pairs = [(v.liq, v.latent) for v in layers.values()]
            return SAQ(model, rho=0.1, quantizers=pairs, model=model, **common)
        return SGD(quant.param_groups(model, weight_decay=5e-4), lr=common["lr"], momentum=0.9)

    # A product with the Hessian counts as two passes.
    spent = 2 * _PRODUCTS * {"trace": 1, "eigenvalue": 3}.get(name, 0)  # three inner layers
    steps = max((budget - spent) // _COST.get(name, 1), 1)
    lab.fit(model, make, train, steps, seed, batch=settings.batch, schedule=lab.constant, hook=hook)
    bits = hook.bits
    if name in SCORES:
        model.eval()
        x, y = parts.train[0][: settings.batch], parts.train[1][: settings.batch]
        bits = sensitive_bits(model, F.cross_entropy, [(x, y)], target=_TARGET, kind=name, widths=_WIDTHS, skip=skip,
                              max_products=_PRODUCTS)  # fmt: skip
    searched = time.perf_counter() - begun
    quant.prepare(model, weights=QuantSpec.lsq(bits=int(_TARGET)), bits=bits, skip=skip)

    def plain(model: nn.Module) -> torch.optim.Optimizer:
        return SGD(quant.param_groups(model, weight_decay=5e-4), lr=common["lr"], momentum=0.9)

    done = lab.fit(model, plain, parts.train, settings.steps - budget, seed + 1, batch=settings.batch)
    layers = {n: m.weight.numel() for n, m in model.named_modules() if getattr(m, "weight_quantizer", None) is not None}
    mean = sum(size * bits.get(n, int(_TARGET)) for n, size in layers.items()) / sum(layers.values())
    return lab.measure(done, parts) | {"mean_bits": mean, "search_seconds": searched}


def _arm(name: str) -> Arm:
    return Arm(name, functools.partial(_train, name))


METHOD = Method(
    name="mixed_precision",
    number=13,
    title="Mixed-Precision Neural Networks: A Survey",
    authors="Rakka, Fouda, Khargonekar, Kurdahi",
    year=2022,
    arxiv="2208.06064",
    claim=(
        "Widths chosen layer by layer are more accurate than one width of the same size; tested for one framework of"
        " each family at three bits a weight, search and training in equal passes."
    ),
    kernels=("mixquant", "bitplane", "liq", "fake_quantize", "curvature"),
    check=_check,
    experiment=Experiment(
        summary=(
            "Fashion-MNIST, a convolutional network, weights of inner layers at a mean of 3 bits: one width, and those"
            " of nine searches; half of the passes search, half train with LSQ at the widths found."
        ),
        arms=tuple(map(_arm, _ARMS)),
        claims=tuple(Claim("test_accuracy", name, "uniform") for name in _ARMS[1:]),
        full=Settings(passes=900, seeds=3, images=3000, test_images=2000),
        quick=Settings(passes=140, seeds=1, images=640, test_images=400, tune=False),
        grid={"lr": (0.05, 0.02)},
        tried=(
            "Three inner layers leave little to choose: the data-free rule takes 3 bits for each of them, which is the"
            " uniform arm, and sensitivities end within 0.3 points of it. Searches that learn train mixed, noisy or"
            " gated weights in the half of the passes in which the other arms train floats. SAMQ, whose step takes four"
            " passes, stops below the budget."
        ),
        figure=Figure("dots", ("test_accuracy", "validation_accuracy"), ("test", "validation"), ylabel="accuracy"),
    ),
)

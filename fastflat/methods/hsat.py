# SPDX-License-Identifier: Apache-2.0
"""H-SAT and P-SAT: "SAT: Improving Adversarial Training via Curriculum-Based Loss Smoothing", Sitawarin, Chakraborty
and Wagner, AISec 2021, arXiv 2003.09347. (Not "Smooth Adversarial Training", arXiv 2006.14536.)

Adversarial training on inputs no more difficult than a limit that rises during training. With psi the difficulty::

    minimise  mean_i max_{|d| <= eps} CE(f(x_i + d), y_i)   subject to   psi(x_i + d, y_i) <= lambda_t
    P-SAT     psi = max_{c != y} p_c - p_y,  p = softmax(f(x))          in [-1, 1]
    H-SAT     psi = lambda_max(H_i),  H_i the Hessian of CE(f(x), y_i) in x
    lambda_t  = begin + (end - begin) min(1, t / (ramp T))              step t of T

The maximum is sought by PGD that stops early, sample by sample: psi is taken at the start and after each step; a
sample beyond the limit goes back to its last iterate within it, at first x itself, and stays there. So the step that
leads beyond the limit is never kept. Samples that stopped leave the batch (``compact``), and the passes that they would
have taken are saved. P-SAT with lambda_t = 1 is PGD adversarial training, with lambda_t = -1 training on x. psi of
P-SAT is read off the logits of the pass that gives the gradient; only that after the last step costs a forward pass.

The link. The Hessian in the logits is ``A = diag(p) - pp'`` with ``lambda_max(A) <= 2 max_c p_c (1 - p_c)``, and behind
a piecewise linear network ``H_i = J'AJ``: where the gap is near -1, p_y is near 1, and the loss bends little.

Curvature of all samples together. lambda_max is taken as the largest Ritz value of the Krylov space of H_i and the
gradient g_i after ``products`` products, each one for the whole batch. It is never above lambda_max, and has its sign,
where the power method finds the largest magnitude. One product gives ``g'Hg / g'g``, exact for two classes behind a
piecewise linear network: ``p (1 - p) |w_1 - w_0|^2`` with w the rows of its Jacobian; C - 1 are exact for C classes,
where g has a part along the eigenvector.

Our reading. The first version (2020) stops the attack "when a specified level of difficulty is reached". Released is
the evaluation of its models alone (chawins/ates-minimal), and the abstracts name neither the schedule nor the variable
of H-SAT's Hessian. Ours is the input, in which each sample has its own for the price of a gradient. Its range is not
known beforehand, so H-SAT's limit is lambda_t times the largest psi that attacks met of late (``scale``, fading by 1 %
a step), and lambda_t = 1 stops nothing here, either; a ``scale`` of your own makes it absolute. The limit is tested at
iterates alone: a step may leap over what lies between. Attacks run in evaluation mode, in which samples do not see each
other. Defaults: eps 8/255 and ten steps of a quarter of it are those of adversarial training on CIFAR-10; begin 0.3,
end 1 and ramp 0.6 are ours. ``fastflat train --method hsat`` is P-SAT with seven steps and eps 0.25 in units of the
normalised images, without a range.

```python
import torch
import fastflat as ff

model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3))
opt = torch.optim.SGD(model.parameters(), lr=0.1)
objective = ff.methods.CurriculumAdversarialLoss(eps=0.1, steps=5, lo=None, hi=None)
for step in range(10):
    x, y = torch.randn(16, 8), torch.randint(3, (16,))
    objective.set_progress(step / 10)
    opt.zero_grad()
    loss, scores = objective(model, x, y)
    loss.backward()
    opt.step()
curvature = ff.methods.input_curvature(model, x, y, products=2)
```
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastflat import _checks
from fastflat._ops import compute_dtype
from fastflat.evaluate import _ball, _runs
from fastflat.functional import pgd_step, softmax_stats
from fastflat.methods import lab
from fastflat.methods._contract import Arm, Check, Claim, Experiment, Figure, Method, Settings
from fastflat.methods._hook import Hook
from fastflat.methods.lab import robust
from fastflat.methods.lab.second_order import SecondOrderAttack, row_lanczos

__all__ = ["METHOD", "CurriculumAdversarialLoss", "curriculum_attack", "input_curvature"]

#: Difficulties: of P-SAT and of H-SAT.
_METRICS = ("probability", "hessian")
#: Factor of H-SAT's scale from one step to the next.
_FADING = 0.99

#: lambda: a number, one for each sample, or what is found from the difficulties of the samples of a pass.
Limit = float | Tensor | Callable[[Tensor], float | Tensor]


def input_curvature(model: nn.Module, x: Tensor, y: Tensor, products: int = 1) -> Tensor:
    """The largest Ritz value of the Hessian of each sample's cross-entropy in its input, ``[B]``: ``g'Hg / g'g`` for
    one product, rising to ``lambda_max`` with more; 0 where the gradient is.

    The model keeps its mode, in which samples must not see each other, its buffers and its gradients. More than one
    product waits for the device on CUDA.

    Args:
        model: returns logits ``[B, C]``.
        x: inputs ``[B, ...]``, floating.
        y: labels ``[B]``.
        products: with the Hessians, each for the whole batch, at least 1.

    Returns:
        In units of the loss over inputs squared; float32, float64 for float64 x.

    Raises:
        TypeError, ValueError: an argument is not as above, the model does not depend on x, or numbers are not finite.
    """
    name = "methods.input_curvature"
    _runs.positive_integer(name, "products", products)
    attack = _CurriculumAttack(name, model, x, y, 0.0, "linf", False, None, None, None, None)
    attack.metric, attack.products = "hessian", products
    with _runs.undisturbed(model):
        _, psi = attack.measured(attack.centre, False)
    attack.result(attack.centre)
    return psi


def curriculum_attack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    limit: Limit,
    step: float | None = None,
    steps: int = 10,
    *,
    metric: str = "probability",
    products: int = 1,
    norm: str = "linf",
    random_start: bool = True,
    lo: float | None = 0.0,
    hi: float | None = 1.0,
    active: Tensor | None = None,
    compact: bool | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """PGD in which each sample keeps the last iterate whose difficulty is within a limit, and stops there.

    In the mode the model is in; modes, buffers and gradients stay. Steps are :func:`fastflat.functional.pgd_step`.

    Args:
        model, x, y, norm, random_start, generator: as for :func:`fastflat.evaluate.pgd`.
        eps, lo, hi: radius and range in the units of x, numbers; None for no bound. Where channels are normalised each
            by its own numbers, put the normalisation into the model.
        limit: lambda: a number, a tensor of one or B numbers, or a function that is given the difficulties ``[b]`` of
            the samples of each pass and returns a number or ``[b]``.
        step: length of a step; 2.5 eps / steps by default, at most eps.
        steps: how many.
        metric: ``"probability"`` (P-SAT), in [-1, 1], or ``"hessian"`` (H-SAT), as :func:`input_curvature` gives it.
        products: of :func:`input_curvature`.
        active: bool ``[B]``: the other samples are returned as they are.
        compact: take samples that stopped out of the batch, for which each step waits for the device; by default on
            the CPU.

    Returns:
        The perturbed inputs, ``[B, ...]`` in the type of x, without a graph.

    Raises:
        TypeError, ValueError: an argument is not as above, or as :func:`fastflat.evaluate.pgd`.
    """
    name = "methods.curriculum_attack"
    _check_options(name, eps=eps, step=step, steps=steps, metric=metric, products=products, norm=norm, lo=lo, hi=hi)
    attack = _CurriculumAttack(name, model, x, y, eps, norm, False, None, lo, hi, active)
    attack.metric, attack.products = metric, products
    step = eps * min(1.0, 2.5 / steps) if step is None else step
    box = {"lo": -math.inf if lo is None else lo, "hi": math.inf if hi is None else hi}
    attack.geometry = {"step": step, "eps": eps, "norm": norm, **box}
    if not callable(limit):
        limit = _each(name, limit, x)
    begin = attack.centre
    if random_start:
        begin = attack.inside(begin + _ball.start(begin, eps, norm, generator))
    with _runs.undisturbed(model):
        compact = x.device.type == "cpu" if compact is None else compact
        return attack.result(attack.within(begin, limit, steps, compact))


def _check_options(
    name: str, *, eps: Any, step: Any, steps: Any, metric: Any, products: Any, norm: Any, lo: Any, hi: Any
) -> None:
    """What does not depend on data."""
    _runs.positive_integer(name, "steps", steps)
    _runs.positive_integer(name, "products", products)
    if metric not in _METRICS:
        _checks.fail(name, "metric", f"be one of {', '.join(_METRICS)}", repr(metric))
    for argument, value in (("eps", eps), ("step", step), ("lo", lo), ("hi", hi)):
        if value is None and argument != "eps":
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            hint = "; put the normalisation into the model" if isinstance(value, Tensor) else ""
            _checks.fail(name, argument, "be a number", type(value), hint)
        if argument in ("eps", "step"):
            _ball.radius(name, argument, value, norm, torch.empty(0))
    _ball.bounds(name, lo, hi, torch.empty(0))


def _each(name: str, limit: Any, x: Tensor) -> Tensor:
    """The limit of each sample, ``[B]``."""
    if not isinstance(limit, Tensor):
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or math.isnan(limit):
            _checks.fail(name, "limit", "be a number, a tensor or a function", repr(limit))
        limit = torch.tensor(limit, dtype=torch.float64)
    if limit.dim() > 1 or limit.numel() not in (1, len(x)) or limit.dtype == torch.bool or limit.is_complex():
        _checks.fail(name, "limit", f"hold one number or B={len(x)}", f"{limit.dtype} {list(limit.shape)}")
    return limit.detach().to(x.device).expand(len(x))


class _CurriculumAttack(SecondOrderAttack):
    """Steps of samples whose difficulty is within a limit."""

    metric: str
    products: int
    geometry: dict[str, Any]

    def within(
        self, x: Tensor, limit: Tensor | Callable[[Tensor], float | Tensor], steps: int, compact: bool
    ) -> Tensor:
        """From x on, ``[B, ...]``: the last iterate of each sample within the limit."""
        kept, attack = self.centre.clone(), self
        going = torch.ones(len(x), dtype=torch.bool, device=x.device) if self.active is None else self.active.flatten()
        rows = torch.arange(len(x), device=x.device)
        for number in range(steps + 1):
            if compact and not bool(going.all()):
                left = going.nonzero().flatten()
                if not len(left):
                    break
                attack, x, rows, going = attack._only(left), x[left], rows[left], going[left]
            g, psi = attack.measured(x, number < steps)
            going = going & (psi <= (limit(psi) if callable(limit) else limit[rows]))
            kept[rows] = torch.where(going.view(_ball.per_sample(x)), x, kept[rows])
            if number < steps:
                x = pgd_step(x, attack.centre, g, active=going, **self.geometry)
        return kept

    def _only(self, rows: Tensor) -> _CurriculumAttack:
        """The same attack on some of the samples."""
        fewer = copy.copy(self)
        fewer.x, fewer.centre, fewer.y = self.x[rows], self.centre[rows], self.y[rows.to(self.y.device)]
        return fewer

    def measured(self, x: Tensor, further: bool) -> tuple[Tensor | None, Tensor]:
        """(gradients where a step follows, difficulties ``[B]``) at x."""
        if self.metric == "hessian":
            op, g, _ = self._linearized(x)
            psi = row_lanczos(op, g, self.products).largest().to(self.centre.dtype)
            self._finite &= psi.isfinite().all()
            return g.to(x.dtype).view(x.shape), psi
        if further:
            g, logits = self._gradient(x)
        else:
            with torch.no_grad():
                g, (_, logits) = None, self._losses(x.to(self.x.dtype))
        return g, softmax_stats(logits, self.y.to(logits.device).long()).gap


class CurriculumAdversarialLoss:
    """The cross-entropy at the inputs of :func:`curriculum_attack` whose limit rises, for a plain loop.

    ``objective(model, x, y)`` crafts the inputs in evaluation mode and returns (loss, scores) at them in the mode the
    model is in. Modes, buffers and gradients are touched by the last pass alone.

    Args:
        eps, step, steps, metric, products, norm, random_start, lo, hi, compact: of :func:`curriculum_attack`.
        begin, end: lambda at first and at last.
        ramp: share of the training over which it rises, above 0.
        scale: for the metric "hessian", what lambda is times in the limit, above 0; by default the largest curvature
            that attacks met, fading by 1 % a step.

    Attributes:
        limit: lambda now; :meth:`set_progress` sets it.
        scale: as given, else a tensor ``[]`` from the first batch on.
        samples: that attacks passed through the model so far, ``(steps + 1) B`` for a batch of which none stopped.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    def __init__(
        self,
        eps: float = 8 / 255,
        step: float | None = None,
        steps: int = 10,
        *,
        metric: str = "probability",
        begin: float = 0.3,
        end: float = 1.0,
        ramp: float = 0.6,
        scale: float | None = None,
        products: int = 1,
        norm: str = "linf",
        random_start: bool = True,
        lo: float | None = 0.0,
        hi: float | None = 1.0,
        compact: bool | None = None,
    ) -> None:
        self._name = name = "methods.CurriculumAdversarialLoss"
        options = {"eps": eps, "step": step, "steps": steps, "metric": metric, "products": products, "norm": norm}
        options |= {"lo": lo, "hi": hi}
        _check_options(name, **options)
        for argument, value in (("begin", begin), ("end", end)):
            if not _number(value):
                _checks.fail(name, argument, "be a finite number", repr(value))
        if not _number(ramp) or not 0 < ramp <= 1:
            _checks.fail(name, "ramp", "be above 0 and at most 1", repr(ramp))
        if scale is not None and metric != "hessian":
            _checks.fail(name, "scale", "be None for the metric 'probability', which lies in [-1, 1]", repr(scale))
        if scale is not None and (not _number(scale) or scale <= 0):
            _checks.fail(name, "scale", "be finite and above 0", repr(scale))
        self._attack = functools.partial(curriculum_attack, **options, random_start=random_start, compact=compact)
        self._follows = metric == "hessian" and scale is None
        self.begin, self.end, self.ramp, self.scale, self.limit = begin, end, ramp, scale, float(begin)
        self.samples = 0

    def set_progress(self, share: float) -> None:
        """Before a step, with the share of the training that is done, in [0, 1]."""
        if not _number(share) or not 0 <= share <= 1:
            _checks.fail(f"{self._name}.set_progress", "share", "lie in [0, 1]", repr(share))
        self.limit = self.begin + (self.end - self.begin) * min(1.0, share / self.ramp)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if self._follows and self.scale is not None:
            self.scale = self.scale * _FADING
        with _runs.evaluating(model):
            moved = self._attack(model, x, y, limit=self._limit)
        scores = model(moved)
        return F.cross_entropy(scores.to(compute_dtype(scores.dtype)), y), scores

    def _limit(self, psi: Tensor) -> float | Tensor:
        self.samples += len(psi)
        if self._follows:
            most = psi.max().clamp(min=0)
            self.scale = most if self.scale is None else torch.maximum(self.scale.to(most), most)
        return self.limit if self.scale is None else self.limit * self.scale

    def state_dict(self) -> dict[str, Any]:
        """Limit and scale: what continues a stopped run."""
        return {"limit": self.limit, "scale": self.scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The counterpart; a scale that was given at construction stays.

        Raises:
            ValueError: the state is not one of these.
        """
        name = f"{self._name}.load_state_dict"
        if set(state) != {"limit", "scale"}:
            _checks.fail(name, "state", "hold limit, scale", ", ".join(sorted(map(str, state))))
        limit, scale = state["limit"], state["scale"]
        if not _number(limit):
            _checks.fail(name, "limit", "be a finite number", repr(limit))
        if scale is not None and not _number(scale) and not (isinstance(scale, Tensor) and scale.numel() == 1):
            _checks.fail(name, "scale", "be one number or None", type(scale))
        self.limit = float(limit)
        if self._follows:
            self.scale = None if scale is None else torch.as_tensor(scale).detach().reshape(())


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class _Curriculum(Hook):
    """The objective with a limit that rises over the steps; the default eps is of normalised images."""

    def __init__(
        self, eps: float = 0.25, steps: int = 7, lo: float | None = None, hi: float | None = None, **options: Any
    ) -> None:
        self.objective = CurriculumAdversarialLoss(eps, steps=steps, lo=lo, hi=hi, **options)

    def start(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        self._steps = steps

    def before(self, step: int) -> None:
        self.objective.set_progress(min(1.0, step / self._steps))

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.objective(model, x, y)

    def state_dict(self) -> dict[str, Any]:
        return self.objective.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.objective.load_state_dict(state)


def _check() -> Iterator[Check]:
    g = torch.Generator().manual_seed(0)
    double = {"dtype": torch.float64, "generator": g}
    x, y = torch.randn(24, 12, **double), torch.arange(24) % 2
    two, four, labels = _linear(2, **double), _linear(4, **double), torch.arange(24) % 4
    w = (two.weight[1] - two.weight[0]).detach()
    p = two(x).detach().softmax(1)
    off = float((input_curvature(two, x, y) - p[:, 0] * p[:, 1] * w.square().sum()).abs().max())
    yield Check("two classes, one product: error of lambda_max", 0.0, off, 1e-12, "p (1 - p) |w_1 - w_0|^2")
    p, W = four(x).detach().softmax(1), four.weight.detach()
    exact = torch.linalg.eigvalsh(W.T @ (torch.diag_embed(p) - p[:, :, None] * p[:, None]) @ W)[:, -1]
    off = float((input_curvature(four, x, labels, 3) - exact).abs().max())
    yield Check("four classes, three products: error of lambda_max", 0.0, off, 1e-10, "exact at C - 1 products")
    most = float((input_curvature(four, x, labels) / exact).max())
    yield Check("four classes, one product: largest share of lambda_max", 1.0, most, 1e-12, "g'Hg / g'g", "at most")
    z = 3 * torch.randn(2000, 5, **double)
    p = z.softmax(1)
    ends = torch.linalg.eigvalsh(torch.diag_embed(p) - p[:, :, None] * p[:, None])[:, -1]
    most = float((ends / softmax_stats(z, torch.zeros(2000, dtype=torch.long)).curvature).max())
    yield Check("largest eigenvalue in the logits over its bound", 1.0, most, 1e-12, "2 max p (1 - p)", "at most")

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 4)).double()
    free = {"lo": None, "hi": None, "random_start": False}
    attack = functools.partial(curriculum_attack, net, x, labels, 0.5, step=0.1, steps=8, **free)
    path, gaps = _pgd_path(net, x, labels, 0.5, 0.1, 8)
    yield Check("lambda = 1: elements off PGD", 0, int((attack(1.0) != path[-1]).sum()), 0, "adversarial training")
    yield Check("lambda = -1: elements off x", 0, int((attack(-1.0) != x).sum()), 0, "no sample may move")
    within = (gaps <= 0.1).cumprod(0)
    last = path[(within.sum(0) - 1).clamp(min=0), torch.arange(24)]
    seen: list[int] = []

    def limit(psi: Tensor) -> float:
        seen.append(len(psi))
        return 0.1

    got = attack(limit, compact=True)
    yield Check("lambda = 0.1: elements off the last iterate within", 0, int((got != last).sum()), 0, "early stop")
    want = 24 + int(within[:-1].sum())
    yield Check("lambda = 0.1: samples that passed the model", want, sum(seen), 0, "those that go on, of 9 x 24")
    curvature = functools.partial(input_curvature, net, y=labels, products=3)
    cap = float(curvature(x).median())
    beyond = curvature(attack(cap, metric="hessian", products=3)) - curvature(x).clamp(min=cap)
    source = "last iterate within"
    yield Check("H-SAT: most by which one exceeds the limit", 0.0, float(beyond.max()), 1e-12, source, "at most")

    slope, start, step, most = 2.0, -1.0, 0.07, 0.2
    line = nn.Linear(1, 2, bias=False, dtype=torch.float64)
    with torch.no_grad():
        line.weight.copy_(torch.tensor([[0.0], [slope]]))
    want = start + step * math.floor((math.log((1 + most) / (1 - most)) / slope - start) / step)
    at, label = torch.tensor([[start]], dtype=torch.float64), torch.zeros(1, dtype=torch.long)
    got = float(curriculum_attack(line, at, label, 5.0, most, step, 40, **free))
    yield Check("logistic: the last step before the limit", want, got, 1e-12, "log((1 + l) / (1 - l)) / w")
    moved = [x, *(curriculum_attack(two, x, y, 0.3, 1.0, 0.05, k, **free) for k in range(1, 7))]
    losses = torch.stack([F.cross_entropy(two(m), y, reduction="none").detach() for m in moved])
    rise = float((losses[1:] - losses[:-1]).min())
    yield Check("linear, two classes: least rise of a loss in a step", 0.0, rise, 0.0, "convex in x", "at least")
    optimum = x + 0.3 * torch.where(y[:, None] == 0, w.sign(), -w.sign())
    off = float((moved[-1] - optimum).abs().max())
    yield Check("linear, two classes: error of the linf optimum", 0.0, off, 1e-14, "x + eps sign(w)")
    objective = CurriculumAdversarialLoss()
    for share, want in ((0.0, 0.3), (0.3, 0.65), (0.8, 1.0)):
        objective.set_progress(share)
        yield Check(f"lambda after {share:g} of the training", want, objective.limit, 1e-15, "0.3 to 1 over 0.6")


def _linear(classes: int, dtype: torch.dtype, generator: torch.Generator) -> nn.Linear:
    model = nn.Linear(12, classes, bias=False, dtype=dtype)
    with torch.no_grad():
        model.weight.copy_(torch.randn(classes, 12, dtype=dtype, generator=generator) / 2)
    return model


def _pgd_path(model: nn.Module, x: Tensor, y: Tensor, eps: float, step: float, steps: int) -> tuple[Tensor, Tensor]:
    """(iterates of plain PGD from x ``[steps + 1, B, ...]``, their gaps ``[steps + 1, B]``)."""
    path, gaps = [x], []
    for _ in range(steps + 1):
        leaf = path[-1].clone().requires_grad_()
        logits = model(leaf)
        gaps.append(softmax_stats(logits.detach(), y).gap)
        (g,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), leaf)
        path.append(pgd_step(path[-1], x, g, step=step, eps=eps, lo=-math.inf, hi=math.inf))
    return torch.stack(path[:-1]), torch.stack(gaps)


_EPS = 0.1
_STEPS = 7


def _hook(name: str, choice: Mapping[str, float], eps: float, lo: float, hi: float) -> Hook:
    """What an arm trains on."""
    bounds = {"steps": _STEPS, "lo": lo, "hi": hi}
    if name == "pgd":
        return robust.AdversarialTraining(eps, **bounds)
    if name == "trades":
        return robust.TRADES(eps, choice["beta"], **bounds)
    return _Curriculum(eps, metric="probability" if name == "p_sat" else "hessian", begin=choice["begin"], **bounds)


def _train(name: str, seed: int, settings: Settings) -> dict[str, float]:
    hook = _hook(name, settings.choice, *robust.ball(_EPS, settings))
    parts, done = robust.fit(hook, seed, settings)
    attacks = {"fgsm": robust.fgsm_attack, "pgd": robust.pgd_attack(20), "margin": robust.margin_attack(20, seed=1)}
    right = {kind: robust.robust_correct(done.model, parts, "test", _EPS, attack) for kind, attack in attacks.items()}
    held = robust.robust_correct(done.model, parts, "validation", _EPS, robust.pgd_attack(10)).double().mean()
    found = lab.measure(done, parts) | {f"{kind}_accuracy": float(r.double().mean()) for kind, r in right.items()}
    found["robust_accuracy"] = float(torch.stack(list(right.values())).all(0).double().mean())
    found["mean_validation_accuracy"] = (found["validation_accuracy"] + float(held)) / 2
    x, y = (part[:200] for part in parts.test)
    with _runs.evaluating(done.model):
        found["input_curvature"] = float(input_curvature(done.model, x, y, parts.classes - 1).mean())
    if isinstance(hook, _Curriculum):
        found["attack_passes"] = hook.objective.samples / (settings.steps * settings.batch)
    return found


def _arm(name: str, passes: float) -> Arm:
    return Arm(name, lambda seed, settings: _train(name, seed, settings), passes)


METHOD = Method(
    name="hsat",
    number=7,
    title="SAT: Improving Adversarial Training via Curriculum-Based Loss Smoothing",
    authors="Sitawarin, Chakraborty, Wagner",
    year=2021,
    arxiv="2003.09347",
    claim=(
        "Adversarial training from easy to hard, by probability (P-SAT) or curvature (H-SAT), has a better clean and a"
        " better robust accuracy than adversarial training and TRADES; tested at equal passes, counted as if no sample"
        " stopped early."
    ),
    kernels=("inputs", "logits", "descent", "curvature"),
    check=_check,
    hook=_Curriculum,
    experiment=Experiment(
        summary=(
            "Fashion-MNIST, eps 0.1 of the range of a pixel, a network of two hidden layers; training on inputs of 7"
            " steps of PGD, TRADES, and both curricula, with equal passes. Robust: right after FGSM, 20 steps of PGD on"
            " the cross-entropy and 20 on the margin. Tuned is the mean of clean and robust accuracy on validation"
            " images."
        ),
        arms=(
            _arm("pgd", _STEPS + 1),
            _arm("trades", _STEPS + 2.5),
            # psi after the last step is a forward pass; H-SAT takes a gradient and a product each time.
            _arm("p_sat", _STEPS + 1 + 1 / 3),
            _arm("h_sat", 2 * (_STEPS + 1) + 1),
        ),
        claims=tuple(
            Claim(metric, arm, base)
            for arm in ("p_sat", "h_sat")
            for base in ("pgd", "trades")
            for metric in ("test_accuracy", "robust_accuracy")
        ),
        full=Settings(passes=7200, seeds=3, images=6000, test_images=2000),
        quick=Settings(passes=600, seeds=1, images=1200, test_images=400, tune=False),
        grid={"lr": (0.05, 0.1), "begin": (0.3, 0.0), "beta": (6, 3)},
        tuned_on="mean_validation_accuracy",
        tried=(
            "Few samples stop early here: an input passes the network 7.7 times of 8 in P-SAT's attacks and 7.5 in"
            " H-SAT's, so that what they train on is nearly PGD's. H-SAT's gradients and products in the inputs leave"
            " it less than half of PGD's steps for the same passes. A start at limit 0 in place of 0.3 moves no arm by"
            " more than a point of what is tuned."
        ),
        figure=Figure(
            "dots",
            ("test_accuracy", "fgsm_accuracy", "pgd_accuracy", "margin_accuracy"),
            ("none", "FGSM", "PGD", "PGD, margin"),
            "attack",
            "accuracy",
        ),
    ),
)

# SPDX-License-Identifier: Apache-2.0
"""Saddle-LongTail: "Escaping Saddle Points for Effective Generalization on Class-Imbalanced Data", Rangwani, Aithal,
Mishra and Venkatesh Babu, NeurIPS 2022, arXiv 2212.13827: SAM of a large radius on a loss that is rebalanced.

With ``n_c`` training examples of class c and ``pi_c = n_c / sum n``, for logits z and label y::

    LDAM                CE(s (z - m_y onehot(y)), y),   m_c = m n_c^(-1/4) / max_k n_k^(-1/4)
    VS                  CE(z_c / D_c + tau log pi_c, y),   D_c = (max_k n_k / n_c)^gamma
    logit adjustment    VS with gamma = 0
    DRW                 class weights (1 - beta) / (1 - beta^n_c), scaled to mean 1, from :meth:`reweight` on

Predictions come from z itself. Why SAM helps, as the paper says: on the tail classes training ends at saddles, and SAM
multiplies the second moment of the gradient along an eigenvector of the Hessian with eigenvalue h by ``(1 + rho h)^2``.
On a quadratic the gradient itself is multiplied by ``1 + rho h`` for the ascent ``e = rho g``, and by
``1 + rho h / |g|`` for SAM's, which is normalised (:func:`saddle_multiplier`). With ``h < 0`` magnitude is gained only
beyond ``rho |h| > 2``, sign reversed, and the normalised step points back to the saddle wherever ``|g| < rho |h|``.
That SAM leaves saddles is so a statement about large radii and noise; the experiment measures the least eigenvalue of
the rarest class.

Defaults, from the released code: LDAM m = 0.5, s = 30 and a classifier of cosines (:class:`CosineLinear`); VS
gamma = 0.3, tau = 1; beta = 0.9999, deferred to 0.8 of the training; rho 0.1 for cross-entropy, 0.5 with DRW and 0.8
for LDAM with DRW on CIFAR-10. Our reading: weights are normalised over the batch as torch's weighted mean does.

Defects of released code that are not repeated: statistics are those of the perturbed pass and batch normalisation moves
twice a step (``SAM(model=...)``); the command given for cross-entropy passes LDAM; the radius is rounded to half
precision; tensors are tied to CUDA.

```python
import torch
import fastflat as ff

model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3))
loss_fn = ff.methods.RebalancedLoss([500, 50, 5], "vs", beta=0.9999)
opt = ff.methods.SAM(model.parameters(), base="sgd", lr=0.1, momentum=0.9, rho=0.5, model=model)
x, y = torch.randn(30, 8), torch.arange(30) % 3
for epoch in range(4):
    if epoch == 3:
        loss_fn.reweight()

    def closure():
        opt.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        return loss

    opt.step(closure)
print(ff.methods.classwise_spectra(model, x, y)[2])
```
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastflat import _checks, curvature, evaluate
from fastflat._ops import compute_dtype
from fastflat.evaluate import _runs
from fastflat.functional import rebalanced_ce
from fastflat.methods import lab
from fastflat.methods._contract import Arm, Check, Claim, Experiment, Figure, Method, Settings
from fastflat.methods._hook import Hook
from fastflat.methods.lab.networks import ConvNet
from fastflat.optim import SAM, SGD

__all__ = ["METHOD", "ClassSpectrum", "CosineLinear", "RebalancedLoss", "classwise_spectra", "saddle_multiplier"]

KINDS = ("ce", "ldam", "logit_adjustment", "vs")
_NAME = "methods.RebalancedLoss"
#: Of the experiment: kind of loss and beta of the deferred weights.
_LOSSES = {
    "ce": ("ce", None),
    "ce_drw": ("ce", 0.9999),
    "ldam_drw": ("ldam", 0.9999),
    "logit_adjustment": ("logit_adjustment", None),
    "vs": ("vs", None),
}
#: Most products with the Hessian for each eigenvalue of the experiment.
_PRODUCTS = 60


class RebalancedLoss(nn.Module):
    """Mean cross-entropy of ``scale (mult_c z_c + add_c - margins_y [c = y])``, weighted by the class once
    :meth:`reweight` is called; :func:`fastflat.rebalanced_ce` computes it.

    Args:
        counts: training examples of each class, ``[C]``, at least 1.
        kind: ``"ce"``, ``"ldam"``, ``"logit_adjustment"`` or ``"vs"``.
        margin, scale: of LDAM.
        gamma: of VS.
        tau: of VS and logit adjustment.
        beta: of the weights; None for none, 0 for equal ones, towards 1 for ``1 / n_c``.

    Attributes:
        mult, add, margins: buffers ``[C]``, None for what the kind does not have.
        weight: ``[C]`` buffer, ones until :meth:`reweight`; the state of the schedule, in ``state_dict``.

    Raises:
        TypeError, ValueError: an argument or logits are not as above.
    """

    def __init__(
        self,
        counts: Sequence[int] | Tensor,
        kind: str = "vs",
        *,
        margin: float = 0.5,
        scale: float = 30.0,
        gamma: float = 0.3,
        tau: float = 1.0,
        beta: float | None = None,
    ) -> None:
        super().__init__()
        try:
            n = torch.as_tensor(counts, dtype=torch.float64).cpu()
        except (TypeError, ValueError, RuntimeError):
            _checks.fail(_NAME, "counts", "be a number for each class", repr(counts))
        if n.dim() != 1 or len(n) < 2 or not bool((n.isfinite() & (n >= 1)).all()):
            _checks.fail(_NAME, "counts", "be at least 1 for each of two classes or more", n.tolist())
        if kind not in KINDS:
            _checks.fail(_NAME, "kind", f"be one of {', '.join(KINDS)}", repr(kind))
        for name, value in (("margin", margin), ("gamma", gamma), ("tau", tau)):
            if not 0 <= value < math.inf:
                _checks.fail(_NAME, name, "be at least 0 and finite", value)
        if not 0 < scale < math.inf:
            _checks.fail(_NAME, "scale", "be above 0 and finite", scale)
        if beta is not None and not 0 <= beta < 1:
            _checks.fail(_NAME, "beta", "lie in 0 to 1, below 1, or be None", beta)
        ones, rare = torch.ones_like(n), n**-0.25
        self.kind, self.scale = kind, scale if kind == "ldam" else 1.0
        deferred = None
        if beta is not None:
            # expm1: 1 - beta^n loses nothing for beta near 1.
            deferred = ones if beta == 0 else (1 - beta) / -torch.expm1(n * math.log(beta))
            deferred = deferred / deferred.mean()
        values = {
            "mult": (n / n.max()) ** gamma if kind == "vs" else None,
            "add": tau * (n / n.sum()).log() if kind in ("vs", "logit_adjustment") else None,
            "margins": margin * rare / rare.max() if kind == "ldam" else None,
            "weight": ones,
            "deferred": deferred,
        }
        for name, value in values.items():
            self.register_buffer(name, None if value is None else value.float())

    def reweight(self) -> None:
        """From now on weighs classes (DRW).

        Raises:
            ValueError: the loss was made without ``beta``.
        """
        if self.deferred is None:
            _checks.fail(_NAME, "beta", "be given where classes are weighed", None)
        self.weight.copy_(self.deferred)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Logits ``[B, C]`` of a floating type and int64 labels ``[B]`` to a scalar, in float32 or float64."""
        classes = len(self.weight)
        if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] != classes:
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits)
            _checks.fail(_NAME, "logits", f"be [B, C={classes}]", got)
        wide = compute_dtype(logits.dtype)
        values = (self.mult, self.add, self.margins, self.weight)
        mult, add, margin, weight = (None if v is None else v.to(wide) for v in values)
        return rebalanced_ce(logits, target, mult=mult, add=add, margin=margin, s=self.scale, class_weight=weight)

    def extra_repr(self) -> str:
        return f"{self.kind!r}, classes={len(self.weight)}"


class CosineLinear(nn.Linear):
    """A classifier whose scores are cosines of features and class weights, without a bias, as LDAM wants it."""

    def __init__(self, in_features: int, out_features: int, **options: Any) -> None:
        super().__init__(in_features, out_features, bias=False, **options)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(_directions(input), _directions(self.weight))


def _directions(t: Tensor) -> Tensor:
    """Rows of length 1, or 0 where they are 0; squares of float16 would overflow."""
    wide = t.to(compute_dtype(t.dtype))
    return (wide * wide.square().sum(-1, keepdim=True).clamp_min(1e-24).rsqrt()).to(t.dtype)


@dataclasses.dataclass(frozen=True)
class ClassSpectrum:
    """The Hessian of one class's mean loss.

    Attributes:
        largest, smallest: ends of the spectrum.
        trace, trace_error: estimate by random probes and its standard error.
        converged: whether both ends are as exact as asked.
        examples: of the class.
    """

    largest: float
    smallest: float
    trace: float
    trace_error: float
    converged: bool
    examples: int


def classwise_spectra(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    *,
    classes: Sequence[int] | None = None,
    tol: float = 0.02,
    products: int = 200,
) -> dict[int, ClassSpectrum]:
    """For each class the Hessian ``H_c`` of its own examples' mean loss in the parameters, in evaluation mode:
    ``H = sum_c n_c / n H_c``.

    Args:
        model: returns logits for x; its modes and buffers stay.
        x, y: inputs ``[n, ...]`` and labels ``[n]``.
        loss_fn: a mean over rows.
        classes: which; by default all that y holds.
        tol: of eigenvalues, see :func:`fastflat.curvature.eigenvalues`; that of the trace is ``5 tol``.
        products: most for each end and for the trace, whose error then says what it is worth.

    Raises:
        ValueError: a class without examples.
    """
    found = {}
    for c in sorted(set(y.tolist())) if classes is None else classes:
        mine = y == c
        count = int(mine.sum())
        if not count:
            _checks.fail("methods.classwise_spectra", "classes", "have examples in y", c)
        with _runs.undisturbed(model, evaluating=True):
            H = curvature.Hessian(model, loss_fn, [(x[mine], y[mine])])
            high, low = (H.eigenvalues(1, which, tol, max_products=products) for which in ("largest", "smallest"))
            trace = H.trace(5 * tol, products)
        found[c] = ClassSpectrum(
            float(high.value[0]),
            float(low.value[0]),
            float(trace.value),
            float(trace.stderr),
            bool(high.converged and low.converged),
            count,
        )
    return found


def saddle_multiplier(rho: float, eigenvalue: float, gradient_norm: float | None = None) -> float:
    """What SAM multiplies the gradient by along an eigenvector of a quadratic: ``1 + rho h / |g|``, or ``1 + rho h``
    for the ascent ``e = rho g`` (no ``gradient_norm``)."""
    return 1 + rho * eigenvalue / (1.0 if gradient_norm is None else gradient_norm)


def _check() -> Iterator[Check]:
    g = torch.Generator().manual_seed(0)
    z, y = torch.randn(40, 4, dtype=torch.float64, generator=g), torch.arange(40) % 4
    counts = [800, 200, 40, 8]
    plain = F.cross_entropy(z, y).item()
    same = {"ldam": {"margin": 0.0, "scale": 1.0}, "vs": {"gamma": 0.0, "tau": 0.0}, "logit_adjustment": {"tau": 0.0}}
    for kind, options in same.items():
        got = RebalancedLoss(counts, kind, **options)(z, y).item()
        yield Check(f"{kind} with {', '.join(options)} neutral", plain, got, 1e-14, "is cross-entropy")
    margins = RebalancedLoss(counts, "ldam").margins
    yield Check("margin of 800 over that of 8 examples", 100**-0.25, float(margins[0] / margins[3]), 1e-6, "LDAM")
    loss = RebalancedLoss(counts, "ce", beta=0.9999)
    loss.reweight()
    yield Check("mean of the weights", 1.0, float(loss.weight.mean()), 1e-6, "DRW")
    prior = RebalancedLoss(counts, "vs")(torch.zeros(1, 4, dtype=torch.float64), torch.tensor([3])).item()
    yield Check("VS at logits 0: -log of the class's share", -math.log(8 / 1048), prior, 1e-6, "VS, tau = 1")

    a, b, v = 1.0, 0.5, 0.01
    for normed, rho, want in ((True, 0.05, -4.0), (False, 6.0, -2.0)):
        w = nn.Parameter(torch.tensor([0.0, v], dtype=torch.float64))
        opt = SAM([w], rho=rho if normed else rho * b * v, norm_eps=0.0)
        shape = torch.tensor([a, -b], dtype=torch.float64)
        w.grad = shape * w.detach()
        plain_g = float(w.grad[1])
        opt.first_step()
        got = float((shape * w.detach())[1]) / plain_g
        opt.restore()
        kind = "normalised" if normed else "e = rho g"
        yield Check(f"multiplier along -b, {kind}", want, got, 1e-12, "L = (a u^2 - b v^2) / 2")
        told = saddle_multiplier(rho, -b, b * v if normed else None)
        yield Check(f"saddle_multiplier, {kind}", want, told, 1e-12, "1 + rho h / |g|, 1 + rho h")
    yield Check("products of class Hessians, weighted, off the whole", 0.0, _class_sum(), 1e-12, "H = sum n_c/n H_c")


def _class_sum() -> float:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        x, y = torch.randn(30, 5, dtype=torch.float64), torch.tensor([0] * 20 + [1] * 8 + [2] * 2)
        whole = curvature.Hessian(model, F.cross_entropy, [(x, y)])
        v = torch.randn(3, whole.shape[0], dtype=torch.float64)
    parts = torch.zeros_like(v)
    for c in range(3):
        mine = y == c
        parts += mine.double().mean() * curvature.Hessian(model, F.cross_entropy, [(x[mine], y[mine])]).matmat(v)
    return float((parts - whole.matmat(v)).abs().max())


class _Rebalanced(Hook):
    """The loss, with weights from 0.8 of the steps on."""

    def __init__(self, loss: RebalancedLoss) -> None:
        self.criterion, self._from = loss, 0

    def start(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        self._from = round(0.8 * steps)

    def before(self, step: int) -> None:
        if step == self._from and self.criterion.deferred is not None:
            self.criterion.reweight()

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        scores = model(x)
        return self.criterion(scores, y), scores


def _train(kind: str, beta: float | None, sam: bool, seed: int, settings: Settings) -> dict[str, float]:
    parts = lab.long_tailed(lab.images(settings.images, settings.test_images), 100)
    counts = torch.bincount(parts.train[1], minlength=parts.classes)
    common = {"lr": settings.choice["lr"], "momentum": 0.9, "weight_decay": 2e-4}

    def net() -> nn.Module:
        made = ConvNet(1, 28, parts.classes)
        if kind == "ldam":
            made.fc = CosineLinear(made.fc.in_features, parts.classes)
        return made

    def make(model: nn.Module) -> torch.optim.Optimizer:
        if sam:
            return SAM(model.parameters(), rho=settings.choice["rho"], model=model, **common)
        return SGD(model.parameters(), **common)

    hook = _Rebalanced(RebalancedLoss(counts, kind, beta=beta))
    done = lab.fit(net, make, parts.train, settings.steps, seed, batch=settings.batch, hook=hook)
    found = lab.measure(done, parts)
    tested = evaluate.evaluate(done.model, parts.batches("test"), counts=counts, bounds=None)
    found |= {f"{group}_accuracy": share for group, share in tested.groups.items()}
    rarest = int(counts.argmin())
    spectra = classwise_spectra(
        done.model, *parts.train, hook.criterion, classes=[rarest], tol=0.05, products=_PRODUCTS
    )
    spectrum = spectra[rarest]
    found["rarest_smallest_eigenvalue"], found["rarest_largest_eigenvalue"] = spectrum.smallest, spectrum.largest
    found["rarest_eigenvalues_converged"] = float(spectrum.converged)
    return found


def _arm(name: str, kind: str, beta: float | None, sam: bool) -> Arm:
    return Arm(name, lambda seed, settings: _train(kind, beta, sam, seed, settings), 2 if sam else 1)


METHOD = Method(
    name="saddle_longtail",
    number=11,
    title="Escaping Saddle Points for Effective Generalization on Class-Imbalanced Data",
    authors="Rangwani, Aithal, Mishra, Venkatesh Babu",
    year=2022,
    arxiv="2212.13827",
    claim=(
        "With SAM of a large radius rebalanced losses leave the saddles of rare classes and classify these better;"
        " tested at equal passes, so that SAM makes half the steps."
    ),
    kernels=("sharpness", "descent", "logits", "curvature"),
    check=_check,
    recipe={"optimizer": "sam", "rho": 0.5},
    experiment=Experiment(
        summary=(
            "Fashion-MNIST with a long tail of 1 in 100, a convolutional network of four layers: cross-entropy, the"
            " same with deferred weights, LDAM with deferred weights, logit adjustment and VS, each with SGD and with"
            " SAM; ce_drw_steps makes as many steps as SAM, since curvature fades where all examples are fitted. Tail:"
            " the three rarest of ten classes. Eigenvalues are those of the arm's own loss on the training examples of"
            " the rarest class."
        ),
        arms=tuple(
            _arm(name + ("_sam" if sam else ""), kind, beta, sam)
            for name, (kind, beta) in _LOSSES.items()
            for sam in (False, True)
        )
        + (Arm("ce_drw_steps", lambda seed, settings: _train("ce", 0.9999, False, seed, settings), 2),),
        claims=(
            *(Claim("tail_accuracy", f"{name}_sam", name) for name in _LOSSES),
            *(Claim("test_accuracy", f"{name}_sam", name) for name in _LOSSES),
            Claim("rarest_smallest_eigenvalue", "ce_drw_sam", "ce_drw_steps"),
        ),
        full=Settings(passes=450, seeds=3, images=4000, test_images=2000, batch=32),
        quick=Settings(passes=40, seeds=1, images=1500, test_images=400, batch=32, tune=False),
        grid={"lr": (0.05, 0.1), "rho": (0.1, 0.5)},
        tried=(
            "Networks at radius 0.5 end by saying the largest class alone. From 0.1 downwards tuning takes"
            " smaller radii until nothing of SAM is left but half of the steps (0.004 for three losses of five)."
            " Against as many steps of SGD the rarest class's smallest eigenvalue does rise; against as many"
            " passes SGD has fitted the class and left the saddle without help."
        ),
        figure=Figure(
            "dots",
            ("test_accuracy", "head_accuracy", "tail_accuracy"),
            ("all classes", "most frequent third", "rarest third"),
            "",
            "test accuracy",
        ),
    ),
)

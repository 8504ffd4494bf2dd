# SPDX-License-Identifier: Apache-2.0
"""PoF: "PoF: Post-Training of Feature Extractor for Improving Generalization", Sato, Yamada, Tanaka, Inoue and
Kawakami, ICML 2022, arXiv 2207.01847.

The feature extractor of a trained network is trained on under heads that are worse than its own. In each step, with
another batch of features F and labels::

    (G, g) = grad_(W, b) CE(F W' + b)
    t  = 1, 2, 4, ... until CE(t) > CE(0),  CE(t) = CE(F (W - t G)' + b - t g)
    t* = argmin of CE over t/16, 2t/16, ..., t
    eta ~ U(0, 1) span t*
    theta <- base step along grad_theta CE(f_theta(x) (W - eta G)' + b - eta g)

and the head is (W, b) again, with which the network is used. The features are fixed, so that the scores are affine in
t: ``A - t B`` with ``A = F W' + b`` and ``B = F G' + g``, and both searches are :func:`fastflat.affine_logit_scan`, two
reads of A and B. Nothing waits for the device.

Our reading. span is 2: the released default, which an undefined name overwrites there. Where no t up to 2^13 raises
the loss (a flat one, or separable features) eta is 0, as in its distributed branch. Of the schedule (200 epochs, then
100 more; 10 in the paper for CIFAR) nothing is fixed here: the experiment trains on with what remains of the passes.

Defects of the released code that are not repeated: its optimizer of the classifier steps, not that of the extractor;
the first rank trains nothing; features of the other batch move the statistics of batch normalisation (here they use
the mode of the model and leave its buffers); a step length is brought to the host in each step; the head's momentum
is zeroed by hand (the head has no gradient here).

```python
import torch
import fastflat as ff

model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3))  # trained before
pof = ff.methods.PoF(model)
opt = torch.optim.SGD(pof.parameters(), lr=0.01, momentum=0.9)
for _ in range(3):
    x, y = torch.randn(16, 8), torch.randint(3, (16,))
    other_x, other_y = torch.randn(64, 8), torch.randint(3, (64,))
    with pof.weakened(other_x, other_y):
        opt.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        opt.step()
pof.finish()  # the head may be trained again
```
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastflat import _checks
from fastflat.functional import affine_logit_scan
from fastflat.methods import lab
from fastflat.methods._contract import Arm, Check, Claim, Experiment, Figure, Method, Settings
from fastflat.methods._hook import Hook
from fastflat.methods.lab.networks import ConvNet
from fastflat.optim import SGD
from fastflat.optim._passes import buffers_kept

__all__ = ["METHOD", "PoF"]

_NAME = "methods.PoF"
#: Steps 1, 2, ..., 2^13 bracket, and so many cells divide the bracket.
_DOUBLINGS, _CELLS = 13, 16


def _search(loss: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """``t*`` of ``loss(t [K]) -> [K]``, a scalar on the device of ``like``; 0 where no t raises the loss."""
    doubled = torch.exp2(torch.arange(_DOUBLINGS + 1, device=like.device, dtype=like.dtype))
    found = loss(torch.cat([torch.zeros_like(doubled[:1]), doubled]))
    above = torch.where(found[1:] > found[0], doubled, torch.inf).min()
    bracketed = torch.isfinite(above)
    cells = torch.arange(1, _CELLS + 1, device=like.device, dtype=like.dtype) / _CELLS
    grid = torch.where(bracketed, above, torch.ones_like(above)) * cells
    best = grid.gather(0, loss(grid).argmin(0, keepdim=True))[0]
    return torch.where(bracketed, best, torch.zeros_like(best))


def _gradient(features: Tensor, scores: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients ``[C, D]`` and ``[C]`` of the mean cross-entropy in a linear head's weight and bias."""
    errors = scores.softmax(1)
    errors = errors.scatter_add(1, y[:, None], torch.full_like(errors[:, :1], -1.0)) / len(y)
    return errors.T @ features, errors.sum(0)


class PoF:
    """Weak heads for the post-training of a feature extractor.

    The head's parameters ask for no gradient until :meth:`finish`; give the optimizer :meth:`parameters`.

    Args:
        model: returns the scores ``[B, C]`` of its head; trained.
        head: the name of the head, a plain ``nn.Linear`` of weights that no other layer has; the last one by default.
        span: eta is drawn from 0 to ``span t*``; 0 leaves the head as it is.
        generator: of the draws, on the model's device; by default torch's.

    Attributes:
        length, shift: t* and eta of the last :meth:`weaken`, scalars on the device.

    Raises:
        TypeError, ValueError: the model has no such head, or nothing else to train; nothing has changed then.

    Source: Sato et al. 2022 (arXiv 2207.01847).
    """

    def __init__(
        self,
        model: nn.Module,
        head: str | None = None,
        *,
        span: float = 2.0,
        generator: torch.Generator | None = None,
    ):
        if not isinstance(model, nn.Module):
            _checks.fail(_NAME, "model", "be a torch.nn.Module", type(model))
        if isinstance(span, bool) or not isinstance(span, (int, float)) or not 0 <= span < float("inf"):
            _checks.fail(_NAME, "span", "be a finite number of at least 0", repr(span))
        self.head_name, self._head = _head(model, head)
        own = set(map(id, self._head.parameters()))
        for name, module in model.named_modules():
            if module is not self._head and own & {id(p) for p in module.parameters(recurse=False)}:
                _checks.fail(_NAME, "head", "have weights of its own", f"one shared with {name}")
        self._trained = [p for p in model.parameters() if id(p) not in own and p.requires_grad]
        if not self._trained:
            _checks.fail(_NAME, "model", "have parameters before the head that require a gradient", "none")
        self._model, self.span, self._generator = model, float(span), generator
        self._asked = [(p, p.requires_grad) for p in self._head.parameters()]
        for p, _ in self._asked:
            p.requires_grad_(False)
            p.grad = None
        self._kept: list[Tensor] | None = None
        self.length = self.shift = torch.zeros((), device=self._head.weight.device)

    def parameters(self) -> list[nn.Parameter]:
        """Those of the feature extractor."""
        return list(self._trained)

    @property
    def is_weak(self) -> bool:
        """Whether the head is a weak one now."""
        return self._kept is not None

    @torch.no_grad()
    def weaken(self, x: Any, y: Tensor) -> None:
        """The head becomes a weak one, by the gradient of another batch.

        Args:
            x: inputs of the other batch, as the model takes them; 256 samples in the released code.
            y: their labels, int64 ``[N]``.

        Raises:
            TypeError, ValueError: the model does not return its head's scores, or y are not their labels. The head is
                its own then.
        """
        self.restore()
        features, scores = self._features(x)
        with torch.autocast(features.device.type, enabled=False):
            dtype = torch.promote_types(features.dtype, torch.float32)
            features, scores = features.to(dtype), scores.to(dtype)
            if not isinstance(y, Tensor) or y.dtype != torch.int64 or y.shape != scores.shape[:1]:
                got = f"{y.dtype} {list(y.shape)}" if isinstance(y, Tensor) else type(y)
                _checks.fail(_NAME, "y", f"be int64 [N={len(scores)}]", got)
            y = y.to(scores.device)
            slope, of_bias = _gradient(features, scores, y)
            along = features @ slope.T
            if self._head.bias is not None:
                along = along + of_bias
            self.length = _search(lambda t: affine_logit_scan(scores, along, y, t), scores)
            draw = torch.rand((), generator=self._generator, device=scores.device, dtype=dtype)
            # Infinite features leave the head as it is.
            self.shift = torch.nan_to_num(draw * self.span * self.length, nan=0.0)
            moved = [(self._head.weight, slope)]
            if self._head.bias is not None:
                moved.append((self._head.bias, of_bias))
            self._kept = [p.detach().clone() for p, _ in moved]
            for p, g in moved:
                p.copy_(p.to(dtype) - self.shift * torch.nan_to_num(g, nan=0.0))

    @torch.no_grad()
    def restore(self) -> None:
        """The head is its own again, bit for bit; does nothing where it is."""
        if self._kept is None:
            return
        params = [p for p in (self._head.weight, self._head.bias) if p is not None]
        for p, kept in zip(params, self._kept, strict=True):
            p.copy_(kept)
        self._kept = None

    @contextlib.contextmanager
    def weakened(self, x: Any, y: Tensor) -> Iterator[None]:
        """A weak head inside, its own afterwards; see :meth:`weaken`."""
        self.weaken(x, y)
        try:
            yield
        finally:
            self.restore()

    def finish(self) -> None:
        """The head is its own, and asks for gradients as it did before."""
        self.restore()
        for p, asked in self._asked:
            p.requires_grad_(asked)

    def _features(self, x: Any) -> tuple[Tensor, Tensor]:
        """(features [N, D], scores [N, C]) in the model's mode; its buffers stay."""
        seen: list[tuple[Tensor, Tensor]] = []

        def note(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            seen.append((inputs[0], output))

        handle = self._head.register_forward_hook(note)
        try:
            with buffers_kept(self._model):
                out = self._model(*x) if isinstance(x, (tuple, list)) else self._model(x)
        finally:
            handle.remove()
        if len(seen) != 1 or seen[0][1] is not out:
            got = "something else" if seen else "scores without it"
            _checks.fail(_NAME, "model", f"return what its head {self.head_name!r} gives", got)
        if out.dim() != 2:
            _checks.fail(_NAME, "model", "return scores [N, C]", list(out.shape))
        return seen[0]


def _head(model: nn.Module, name: str | None) -> tuple[str, nn.Linear]:
    modules = dict(model.named_modules())
    if name is None:
        linear = [n for n, m in modules.items() if isinstance(m, nn.Linear)]
        if not linear:
            _checks.fail(_NAME, "model", "have a linear layer as its head", "none")
        name = linear[-1]
    elif name not in modules:
        _checks.fail(_NAME, "head", "be the name of a layer", repr(name))
    head = modules[name]
    # Scores of a quantized head are not affine in its weights.
    if type(head) is not nn.Linear:
        _checks.fail(_NAME, "head", "be a plain torch.nn.Linear", f"{name!r}, a {type(head).__name__}")
    if head is model:
        _checks.fail(_NAME, "model", "have parameters before the head that require a gradient", "none")
    return name, head


class _PostTraining(Hook):
    """Ordinary training, then PoF from a share of the run on; the other batch is that of the steps before.

    Args:
        begin: share of the steps.
        span: of :class:`PoF`.
        memory: examples of the other batch.
    """

    def __init__(self, begin: float = 0.75, span: float = 2.0, memory: int = 256):
        self._begin, self._span, self._memory = begin, span, memory
        self._pof: PoF | None = None
        self._batches: list[tuple[Tensor, Tensor]] = []
        self._own: tuple[Tensor, Tensor] | None = None

    def start(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        self._model, self._first = model, round(self._begin * steps)
        _head(model, None)  # refused before the run, not within it

    def before(self, step: int) -> None:
        if step < self._first:
            return
        if self._pof is None:
            self._pof = PoF(self._model, span=self._span)
        if self._span and self._batches:
            x, y = (torch.cat(of) for of in zip(*self._batches, strict=True))
            self._pof.weaken(x[-self._memory :], y[-self._memory :])

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        self._own = (x.detach(), y)
        return super().loss(model, x, y)

    def after(self, step: int) -> None:
        if self._pof is not None:
            self._pof.restore()
        if self._own is not None:
            self._batches.append(self._own)
            while sum(len(y) for _, y in self._batches[1:]) >= self._memory:
                self._batches.pop(0)

    def finish(self) -> None:
        if self._pof is not None:
            self._pof.finish()

    def state_dict(self) -> dict[str, Any]:
        return {"inputs": [x for x, _ in self._batches], "labels": [y for _, y in self._batches]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._batches = list(zip(state["inputs"], state["labels"], strict=True))


# Checks --------------------------------------------------------------------------------------------------------------


def _net() -> tuple[nn.Module, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) / 2)
    return net, torch.randn(40, 6, generator=g, dtype=torch.float64), torch.randint(4, (40,), generator=g)


def _check() -> Iterator[Check]:
    g = torch.Generator().manual_seed(3)
    h = torch.randn(5, 5, generator=g, dtype=torch.float64)
    h, w = h @ h.T / 40, torch.randn(5, generator=g, dtype=torch.float64)
    slope = h @ w
    best = float(slope @ slope / (slope @ h @ slope))
    bracket: list[Tensor] = []

    def quadratic(t: Tensor) -> Tensor:
        bracket.append(t)
        at = w - t[:, None] * slope
        return ((at @ h) * at).sum(1) / 2

    found = float(_search(quadratic, w))
    cell = float(bracket[1][0])
    yield Check("quadratic: where doubling stops, over t_opt", 3.0, cell * _CELLS / best, 1.0, "in (2, 4] t_opt")
    yield Check("quadratic: t*", best, found, cell / 2, "t_opt = |g|^2 / g'Hg, half a cell")

    net, x, y = _net()
    features = net[1](net[0](x)).detach()
    head = net[2]
    scores = head(features)
    ours = _gradient(features, scores.detach(), y)
    theirs = torch.autograd.grad(F.cross_entropy(scores, y), [head.weight, head.bias])
    off = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
    yield Check("gradient of the head: error", 0.0, off, 1e-15, "(softmax - 1_y)' F / N")
    t = torch.linspace(0, 40, 41, dtype=torch.float64)
    scan = affine_logit_scan(scores.detach(), features @ ours[0].T + ours[1], y, t)
    direct = [F.cross_entropy(features @ (head.weight - s * ours[0]).T + head.bias - s * ours[1], y) for s in t]
    off = float((scan - torch.stack(direct).detach()).abs().max())
    yield Check("scores affine in t: error of the losses", 0.0, off, 1e-12, "A - t B")
    bend = float((scan[2:] - 2 * scan[1:-1] + scan[:-2]).min())
    yield Check("smallest second difference of the scan", 0.0, bend, 1e-12, "convex in t", "at least")

    start = [p.detach().clone() for p in head.parameters()]
    pof = PoF(net, generator=torch.Generator().manual_seed(0))
    with pof.weakened(x, y):
        ratio = float(pof.shift / pof.length)
        moved = float((start[0] - ratio * pof.length * ours[0] - head.weight).abs().max())
    yield Check("weak head: error of W - eta G", 0.0, moved, 1e-14, "eta in (0, 2 t*)")
    yield Check("eta / t*", 2.0, ratio, 0.0, "at most the span", "at most")
    changed = sum(int((p != q).sum()) for p, q in zip(head.parameters(), start, strict=True))
    yield Check("weights of the head that a step does not return", 0, changed, 0, "bit for bit")
    ends = [_trained(span) for span in (None, 0.0)]
    yield Check("span = 0: bits beside training with a fixed head", 0, int((ends[0] != ends[1]).sum()), 0, "eta = 0")
    flat = float(_search(torch.ones_like, w))
    yield Check("t* of a flat loss", 0.0, flat, 0.0, "no t raises it")


def _trained(span: float | None) -> Tensor:
    """The weights after three steps: of PoF, or of plain training with a head that is fixed."""
    net, x, y = _net()
    if span is None:
        net[2].requires_grad_(False)
    pof = None if span is None else PoF(net, span=span)
    opt = SGD([p for p in net.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    for _ in range(3):
        with contextlib.nullcontext() if pof is None else pof.weakened(x[20:], y[20:]):
            opt.zero_grad()
            F.cross_entropy(net(x[:20]), y[:20]).backward()
            opt.step()
    return torch.cat([p.detach().flatten() for p in net.parameters()])


# Experiment ----------------------------------------------------------------------------------------------------------

#: Passes of a step of PoF: its own and a forward pass of 256 examples, a forward pass being a third.
_COST = 1 + 256 / 64 / 3
#: Passes of a step over a run that spends half of its passes on ordinary training.
_MEAN_COST = 2 * _COST / (_COST + 1)

_ARMS: dict[str, Callable[[], Hook]] = {
    "sgd": Hook,
    "fixed_head": lambda: _PostTraining(0.5, 0.0),
    "pof": lambda: _PostTraining(_MEAN_COST / 2, 2.0),
}


def _train(name: str, seed: int, settings: Settings) -> dict[str, float]:
    parts = lab.images(settings.images, settings.test_images)
    net = functools.partial(ConvNet, 1, 28, parts.classes)

    def make(model: nn.Module) -> torch.optim.Optimizer:
        return SGD(model.parameters(), lr=settings.choice["lr"], momentum=0.9, weight_decay=5e-4)

    done = lab.fit(net, make, parts.train, settings.steps, seed, batch=settings.batch, hook=_ARMS[name]())
    found = lab.measure(done, parts, eigenvalue=True)
    found["weak_loss"] = _weak_loss(done.model, *parts.train)
    return found


def _weak_loss(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Mean training loss under heads that are moved by the gradient of other examples, over eta in (0, 2 t*]."""
    model.eval()
    half = min(500, len(x) // 2)
    pof = PoF(model)
    with torch.no_grad():
        features, scores = pof._features(x[: 2 * half])
        slope, of_bias = _gradient(features[:half], scores[:half], y[:half])
        along = features @ slope.T + of_bias
        length = _search(lambda t: affine_logit_scan(scores[:half], along[:half], y[:half], t), scores)
        steps = length * torch.linspace(0.1, 2.0, 20)
        lost = affine_logit_scan(scores[half:], along[half:], y[half : 2 * half], steps)
    pof.finish()
    return float(lost.mean())


def _arm(name: str, passes: float) -> Arm:
    return Arm(name, lambda seed, settings: _train(name, seed, settings), passes)


METHOD = Method(
    name="pof",
    number=10,
    title="PoF: Post-Training of Feature Extractor for Improving Generalization",
    authors="Sato, Yamada, Tanaka, Inoue, Kawakami",
    year=2022,
    arxiv="2207.01847",
    claim=(
        "Training the feature extractor of a trained network on under heads moved along the gradient of other examples"
        " finds flatter features, which generalise better than training on; tested at equal passes."
    ),
    kernels=("logits", "descent"),
    check=_check,
    hook=_PostTraining,
    experiment=Experiment(
        summary=(
            "Fashion-MNIST, a convolutional network of four layers; SGD, and half a run of SGD followed by training"
            " of the features alone under a fixed head or under weak ones."
        ),
        arms=(_arm("sgd", 1), _arm("fixed_head", 1), _arm("pof", _MEAN_COST)),
        claims=(
            Claim("test_accuracy", "pof", "sgd"),
            Claim("test_accuracy", "pof", "fixed_head"),
            Claim("weak_loss", "pof", "fixed_head", "lower"),
            Claim("top_eigenvalue", "pof", "fixed_head", "lower"),
        ),
        full=Settings(passes=1200, seeds=3, images=6000, test_images=2000),
        quick=Settings(passes=60, seeds=1, images=640, test_images=400, tune=False),
        grid={"lr": (0.05, 0.02, 0.1)},
        tried=(
            "Within 1200 passes the extractor that was trained against perturbed heads fits the training images to"
            " 95 to 97 %, the others to more than 99 %, and its loss under weak heads is larger for the same reason."
            " At the rate 0.1 its eigenvalue is below the others' (7.8 against 12.4 in the runs that tuned), at"
            " 0.05, which was chosen, above them."
        ),
        figure=Figure("dots", ("train_accuracy", "test_accuracy"), ("training", "test"), "", "accuracy"),
    ),
)

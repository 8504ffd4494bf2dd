# SPDX-License-Identifier: Apache-2.0
"""RMT: "Learning Rates as a Function of Batch Size: A Random Matrix Theory Approach to Neural Network Training",
Granziol, Zohren and Roberts, JMLR 23, 2022, arXiv 2006.09092, with its learner of rate and momentum on the fly.

The Hessian of B of N examples is that of all with noise, ``H_B = H + E / sqrt(b)``, ``b = B / (1 - B/N)``. Where the
elements of E are independent, of variance sigma^2, and there are P parameters, with ``s = sigma sqrt(P/b)``::

    lambda' = lambda + s^2/lambda                  lambda > s: a spike of H as the batch shows it
    lambda' = 2 s                                  otherwise: lost in the bulk, whose edge this is
    eta     < 2 (1 + mu)/lambda'                   where SGD with momentum mu is stable

For k times the batch, rates of SGD are k times as large by the paper's rule (``scaled_rate``), and
``lambda'(B)/lambda'(k B)`` times by the formula (:func:`sgd_rate`); those of Adam sqrt(k) times, with a damping of
1/sqrt(k) times, since the least one is proportional to eta/B (:func:`adam_rate`).

:class:`LanczosLearner` takes m Lanczos steps with the Hessian of a batch, from a random vector, every so many steps of
training, early ones more often. Of its Ritz values theta and their weights w, which add up to 1 (stochastic Lanczos
quadrature)::

    s^2 = 2 sum_(theta_i < 0) w_i theta_i^2        the bulk's second moment: noise is symmetric, spikes are positive
    l_1 = max(theta_1, 2 s),  l_n = 2 s            l_n = theta_m, the least, where none is negative; at least q^2 l_1
    eta = c (2/(sqrt l_1 + sqrt l_n))^2,  mu = ((sqrt l_1 - sqrt l_n)/(sqrt l_1 + sqrt l_n))^2        heavy ball
    q   = (1 - sqrt mu_max)/(1 + sqrt mu_max)      convex losses have zeros and nothing negative

Our reading. With noise a spike is at most doubled, and in the bulk ``lambda' ~ B^(-1/2)``: the formula gives a rate at
most twice as large, then sqrt(k) times; exactly linear is the paper's rule and not this formula's. In a network noise
is not the same in all directions, ``|E v|`` is far larger along the spikes: there the formula wants the s that the
spike's own eigenvector sees (:func:`hessian_noise`); the experiment shows both. No code of the learner is released, and
its constants are ours. The least eigenvalue of a network is about 0 or below, with which heavy ball has mu = 1: l_n is
the edge of the bulk, below which curvature cannot be told from noise. Eigenvalues of single batches scatter, and means
of them over measurements are taken. The formula has c = 1, the end of what a quadratic bears; our default is 1/2, since
with 1 rates run away from a loss whose curvature falls where a step went too far, such as that of saturated scores.
Behind batch normalisation c may be 1 and more; the experiment tests 1, and tunes it. Groups keep the ratios of their
rates: eigenvalues are then those of D^(1/2) H D^(1/2). Weight decay, far below l_n, is left out. The Hessian is taken
in the mode the model is in (the authors' utilities: evaluation), of quantizers by their straight-through rules. Not
repeated, of such utilities: a general eigensolver for symmetric matrices, and Lanczos without reorthogonalisation.

```python
import torch
import fastflat as ff

model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3))
opt = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)  # both numbers are replaced
loss_fn = torch.nn.functional.cross_entropy
learner = ff.methods.LanczosLearner(model, loss_fn, opt, every=2)
for _ in range(4):
    x, y = torch.randn(64, 8), torch.randint(3, (64,))
    learner.step(x, y)
    opt.zero_grad()
    loss_fn(model(x), y).backward()
    opt.step()
rate = ff.methods.sgd_rate(learner.lr, batch=256, base_batch=64, eigenvalue=2.0, noise=1.0)
```
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastflat import _checks, curvature
from fastflat.evaluate import _runs
from fastflat.methods import lab
from fastflat.methods._contract import Arm, Check, Claim, Experiment, Figure, Method, Settings
from fastflat.methods._hook import Hook
from fastflat.methods.lab.networks import ConvNet
from fastflat.methods.large_scale import scaled_rate
from fastflat.optim import SGD, Adam

__all__ = [
    "METHOD",
    "LanczosLearner",
    "adam_rate",
    "batch_eigenvalue",
    "heavy_ball",
    "hessian_noise",
    "noise_of_batch",
    "sgd_rate",
    "stable_rate",
]

_NAME = "methods.LanczosLearner"


# Random matrices -----------------------------------------------------------------------------------------------------


def batch_eigenvalue(eigenvalue: float, noise: float) -> float:
    """lambda', the largest eigenvalue of a batch's Hessian: ``lambda + s^2/lambda`` for ``lambda > s``, else ``2 s``.

    Args:
        eigenvalue: lambda, the largest one of the Hessian of all examples; at least 0.
        noise: ``s = sigma sqrt(P/b)``; see :func:`noise_of_batch` and :func:`hessian_noise`.

    Raises:
        ValueError: an argument is negative or not finite.
    """
    for argument, value in (("eigenvalue", eigenvalue), ("noise", noise)):
        _number("methods.batch_eigenvalue", argument, value, zero=True)
    return eigenvalue + noise * (noise / eigenvalue) if eigenvalue > noise else 2.0 * noise


def noise_of_batch(noise: float, batch: int, base_batch: int, examples: int | None = None) -> float:
    """s at a batch, from that at a base batch b0: ``s sqrt(b0/b)``, 0 for all examples.

    Args:
        noise: s at the base batch.
        batch, base_batch: B.
        examples: N; without it b = B.

    Raises:
        ValueError: batches that are not above 0 or exceed N, or all N as the base, where there is no noise.
    """
    name = "methods.noise_of_batch"
    _number(name, "noise", noise, zero=True)
    inverse = {}
    for argument, size in (("batch", batch), ("base_batch", base_batch)):
        _number(name, argument, size)
        if examples is not None and not size <= examples:
            _checks.fail(name, argument, f"be at most the examples ({examples})", size)
        inverse[argument] = 1 / size - (1 / examples if examples else 0)
    if not inverse["base_batch"] > 0:
        _checks.fail(name, "base_batch", f"be less than the examples ({examples}), which have no noise", base_batch)
    return noise * math.sqrt(inverse["batch"] / inverse["base_batch"])


@torch.no_grad()
def hessian_noise(op: curvature.Operator, batches: Iterable[tuple[Any, Any]], direction: Tensor | None = None) -> float:
    """s, measured: the root mean square over batches of ``|(H_B - H) v|``, v a unit vector; its mean square is s^2.

    Args:
        op: over all examples, as :class:`fastflat.curvature.Hessian`; one product.
        batches: of one size, out of these examples; a product each.
        direction: v up to its length, ``[n]``, such as an eigenvector, for the noise that it sees; by default random,
            for that of the bulk.

    Raises:
        ValueError: there are no batches, or the direction is not of the operator's size, or zero.
    """
    name = "methods.hessian_noise"
    if direction is None:
        generator = torch.Generator(op.device).manual_seed(0)
        direction = torch.randn(op.shape[0], dtype=op.dtype, device=op.device, generator=generator)
    length = torch.linalg.vector_norm(direction)
    if direction.shape != op.shape[:1]:
        _checks.fail(name, "direction", f"be [n={op.shape[0]}]", list(direction.shape))
    if not 0 < float(length) < math.inf:
        _checks.fail(name, "direction", "have a length over 0 and finite", float(length))
    v = (direction / length)[None]
    whole = op.matmat(v)
    squares = [(op.on([batch]).matmat(v) - whole).double().square().sum() for batch in batches]
    if not squares:
        _checks.fail(name, "batches", "hold at least one", "none")
    return float(torch.stack(squares).mean().sqrt())


# Rates ---------------------------------------------------------------------------------------------------------------


def stable_rate(eigenvalue: float, momentum: float = 0.0) -> float:
    """``2 (1 + mu)/lambda'``, below which SGD with momentum contracts where the curvature is at most lambda'.

    Raises:
        ValueError: an eigenvalue that is not above 0, a momentum outside [0, 1).
    """
    _number("methods.stable_rate", "eigenvalue", eigenvalue)
    if not 0 <= momentum < 1:
        _checks.fail("methods.stable_rate", "momentum", "lie in 0 to 1, below 1", momentum)
    return 2 * (1 + momentum) / eigenvalue


def sgd_rate(
    lr: float, batch: int, base_batch: int, eigenvalue: float, noise: float, examples: int | None = None
) -> float:
    """The rate of SGD for a batch, from that for a base batch: ``lr lambda'(base_batch)/lambda'(batch)``.

    Args:
        lr: for the base batch.
        batch, base_batch: B.
        eigenvalue: lambda, the largest one of the Hessian of all examples, above 0.
        noise: s at the base batch.
        examples: N; without it b = B.

    Raises:
        ValueError: an argument is not as above; see :func:`noise_of_batch`.
    """
    for argument, value in (("lr", lr), ("eigenvalue", eigenvalue)):
        _number("methods.sgd_rate", argument, value)
    there = noise_of_batch(noise, batch, base_batch, examples)
    return lr * batch_eigenvalue(eigenvalue, noise) / batch_eigenvalue(eigenvalue, there)


def adam_rate(lr: float, eps: float, batch: int, base_batch: int) -> tuple[float, float]:
    """(rate, damping) of Adam for a batch, from those for a base batch: ``sqrt(k) lr`` and ``eps/sqrt(k)``, k = batch /
    base_batch; the least damping is as rate over batch.

    Raises:
        ValueError: an argument is not above 0.
    """
    for argument, value in (("lr", lr), ("eps", eps), ("batch", batch), ("base_batch", base_batch)):
        _number("methods.adam_rate", argument, value)
    return scaled_rate(lr, batch, base_batch, "sqrt"), scaled_rate(eps, base_batch, batch, "sqrt")


def heavy_ball(largest: float, smallest: float) -> tuple[float, float]:
    """(rate, momentum) with which heavy ball contracts fastest where curvatures lie between these two: ``(2/(sqrt l_1 +
    sqrt l_n))^2`` and ``((sqrt l_1 - sqrt l_n)/(sqrt l_1 + sqrt l_n))^2``; a step contracts by the momentum's root.

    Raises:
        ValueError: the largest is not above 0, or the smallest not from 0 to the largest.

    Source: Polyak, USSR Computational Mathematics and Mathematical Physics 4(5), 1964.
    """
    _number("methods.heavy_ball", "largest", largest)
    if not 0 <= smallest <= largest:
        _checks.fail("methods.heavy_ball", "smallest", f"lie in 0 to the largest ({largest})", smallest)
    high, low = math.sqrt(largest), math.sqrt(smallest)
    return (2 / (high + low)) ** 2, ((high - low) / (high + low)) ** 2


def _number(name: str, argument: str, value: Any, zero: bool = False) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not (value >= 0 if zero else value > 0):
        _checks.fail(name, argument, f"be a finite number {'of at least' if zero else 'over'} 0", repr(value))


# The learner ---------------------------------------------------------------------------------------------------------


class _Scaled:
    """``D^(1/2) H D^(1/2)``, with the diagonal of D^(1/2) as a vector."""

    def __init__(self, op: curvature.Operator, root: Tensor) -> None:
        self.shape, self.dtype, self.device, self.blocks = op.shape, op.dtype, op.device, op.blocks
        self._op, self._root = op, root

    def matmat(self, V: Tensor) -> Tensor:
        return self._op.matmat(V * self._root) * self._root


def _bulk_noise(density: curvature.Density) -> float:
    """s of the first probe, from what of its spectrum is negative."""
    negative = density.nodes[0].clamp(max=0)
    return float((2 * density.weights[0] * negative.square()).sum().sqrt())


class LanczosLearner:
    """Sets rate and momentum of SGD while it trains, by the curvature that a few Lanczos steps find in a batch.

    Call :meth:`step` before each step of the optimizer, and after a scheduler that writes rates, which are replaced.
    The model's modes, buffers, gradients and random state stay as they are. A measurement waits for the device, the
    steps between do not; what it linearised, about twice the memory of a gradient's activations, is kept until the
    next one.

    Args:
        model: any module; curvature is that of the mode it is in.
        loss_fn: ``(output, target) -> scalar``, the mean over the rows of a batch.
        optimizer: SGD of torch or fastflat, or a sharpness-aware optimizer over it, without Nesterov and dampening.
        every: steps between measurements; in the first so many, in which curvature changes fastest and grows, also
            after 1/8, 1/4 and 1/2 of them.
        lanczos_steps: m, at least 2; each is a product with the Hessian, two passes' work.
        factor: c.
        memory: weight of former measurements in the means of l_1 and l_n, from 0 to below 1.
        max_momentum: mu_max, from 0 to below 1; the usual 0.9.
        schedule: factor of the rate by step, as of ``LambdaLR``; 1 by default.
        process_group: over whose ranks the Hessian is taken (``True``: the default one), so that all set the same.

    Attributes:
        lr, momentum: of the group of the largest rate, before the schedule; None before the first measurement.
        largest, smallest: l_1 and l_n, likewise.
        products: with the Hessian, so far.

    Raises:
        TypeError, ValueError: an argument is not as above, or the optimizer has parameters that the model has not.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        optimizer: torch.optim.Optimizer,
        *,
        every: int = 100,
        lanczos_steps: int = 8,
        factor: float = 0.5,
        memory: float = 0.5,
        max_momentum: float = 0.9,
        schedule: Callable[[int], float] | None = None,
        process_group: Any = None,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            _checks.fail(_NAME, "optimizer", "be a torch.optim.Optimizer", type(optimizer))
        for group in optimizer.param_groups:
            of_sgd = {"momentum", "dampening", "nesterov"} <= set(group) and "trust_coefficient" not in group
            if not of_sgd or group["nesterov"] or group["dampening"]:
                _checks.fail(_NAME, "optimizer", "be SGD without Nesterov and dampening", type(optimizer).__name__)
        for argument, value, least in (("every", every, 1), ("lanczos_steps", lanczos_steps, 2)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                _checks.fail(_NAME, argument, f"be an integer of at least {least}", repr(value))
        _number(_NAME, "factor", factor)
        for argument, value in (("memory", memory), ("max_momentum", max_momentum)):
            if not 0 <= value < 1:
                _checks.fail(_NAME, argument, "lie in 0 to 1, below 1", value)
        self._optimizer, self._schedule = optimizer, schedule
        self.every, self.lanczos_steps, self.factor, self.memory = every, lanczos_steps, factor, memory
        self._early = {every // 8, every // 4, every // 2}
        self._least = ((1 - math.sqrt(max_momentum)) / (1 + math.sqrt(max_momentum))) ** 2
        rates = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
        if not max(rates) > 0:
            _checks.fail(_NAME, "optimizer", "have a rate over 0", rates)
        self._ratios = [rate / max(rates) for rate in rates]
        params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        self._hessian = curvature.Hessian(model, loss_fn, [], params, process_group=process_group)
        self._root = self._scaling(dict(model.named_parameters()))
        self.lr = self.momentum = self.largest = self.smallest = None
        self.products = self._count = self._measured = 0

    def _scaling(self, named: dict[str, Tensor]) -> Tensor | None:
        """The diagonal of D^(1/2), ``[n]``; None where it is 1."""
        if set(self._ratios) == {1.0}:
            return None
        groups = zip(self._optimizer.param_groups, self._ratios, strict=True)
        ratio_of = {id(p): ratio for group, ratio in groups for p in group["params"]}
        root = torch.empty(self._hessian.shape[0], dtype=self._hessian.dtype, device=self._hessian.device)
        for name, where in self._hessian.blocks.items():
            root[where] = math.sqrt(ratio_of[id(named[name])])
        return root

    def step(self, inputs: Any, targets: Any) -> None:
        """Before each step of the optimizer: measures at this batch where it is time to, sets rate and momentum.

        Raises:
            FloatingPointError: a product with the Hessian is not finite; nothing is changed then.
        """
        if self._count % self.every == 0 or self._count in self._early:
            self._measure(inputs, targets)
        if self.lr is not None:
            rate = self.lr * (1.0 if self._schedule is None else self._schedule(self._count))
            for group, ratio in zip(self._optimizer.param_groups, self._ratios, strict=True):
                group["momentum"] = self.momentum
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate * ratio)
                else:
                    group["lr"] = rate * ratio
        self._count += 1

    def _measure(self, inputs: Any, targets: Any) -> None:
        op = self._hessian.on([(inputs, targets)])
        op = op if self._root is None else _Scaled(op, self._root)
        generator = torch.Generator(op.device).manual_seed(self._count)
        with torch.autocast(op.device.type, enabled=False):
            found = curvature.density(op, self.lanczos_steps, 1, generator=generator)
        self.products += found.products
        noise = _bulk_noise(found)
        low = 2 * noise if noise else float(found.nodes.min())
        high = max(float(found.nodes.max()), low)
        if not high > 0:  # flat: what was set stays
            return
        # Means whose weights add up to 1 from the first measurement on.
        self._measured += 1
        share = (1 - self.memory) / (1 - self.memory**self._measured)
        self.largest = (1 - share) * (self.largest or 0.0) + share * high
        self.smallest = (1 - share) * (self.smallest or 0.0) + share * low
        lr, self.momentum = heavy_ball(self.largest, max(self.smallest, self._least * self.largest))
        self.lr = self.factor * lr

    _STATE = ("lr", "momentum", "largest", "smallest", "products", "_count", "_measured")

    def state_dict(self) -> dict[str, Any]:
        """What continues it: plain values."""
        return {name.strip("_"): getattr(self, name) for name in self._STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The counterpart.

        Raises:
            ValueError: it is not of a learner.
        """
        names = sorted(name.strip("_") for name in self._STATE)
        if sorted(state) != names:
            _checks.fail(_NAME, "state", f"hold {', '.join(names)}", ", ".join(map(str, state)))
        for name in self._STATE:
            setattr(self, name, state[name.strip("_")])


class _OnTheFly(Hook):
    """The learner in an ordinary loop, whose scheduler goes on to give the factor of the rate."""

    def __init__(self, **options: Any) -> None:
        self._options, self._due, self._factor, self.seconds = options, False, 1.0, 0.0

    def start(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        self._optimizer = optimizer
        self.learner = LanczosLearner(model, _loss, optimizer, schedule=lambda step: self._factor, **self._options)

    def before(self, step: int) -> None:
        self._due = True
        group = self._optimizer.param_groups[0]
        if group.get("initial_lr"):  # a scheduler has written its factor times this
            self._factor = float(group["lr"]) / float(group["initial_lr"])

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if self._due:
            start = time.perf_counter()
            self.learner.step(x, y)
            self._due, self.seconds = False, self.seconds + time.perf_counter() - start
        return super().loss(model, x, y)

    def state_dict(self) -> dict[str, Any]:
        return self.learner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state)


def _loss(scores: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(scores.float(), y)


# Checks --------------------------------------------------------------------------------------------------------------

#: (lambda, P/b) at sigma 1, and what the formula gives; two spikes, the same nearer to the threshold, and none.
_SPIKES = {(3, 1): 3.33, (3, 2): 3.667, (1.5, 1): 2.17, (1.5, 2): 2.833, (0.8, 1): 2.0, (0.8, 2): 2.828}


class _Matrix:
    """A matrix as an operator."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.shape, self.dtype, self.device = matrix, tuple(matrix.shape), matrix.dtype, matrix.device
        self.blocks: dict[str, slice] = {}

    def matmat(self, V: Tensor) -> Tensor:
        return V @ self.matrix


def _bowl(curvatures: Tensor) -> tuple[nn.Module, Tensor, Tensor]:
    """A model, inputs and targets whose mean squared error is ``sum_i curvature_i w_i^2 / 2``; w is ones."""
    model = nn.Linear(len(curvatures), 1, bias=False, dtype=curvatures.dtype)
    nn.init.ones_(model.weight)
    return model, (len(curvatures) * curvatures / 2).sqrt().diag(), torch.zeros_like(curvatures)[:, None]


def _trained(opt: torch.optim.Optimizer, model: nn.Module, x: Tensor, y: Tensor, steps: int) -> float:
    """|w| after so many more steps."""
    for _ in range(steps):
        opt.zero_grad()
        F.mse_loss(model(x), y).backward()
        opt.step()
    return float(model.weight.detach().norm())


def _check() -> Iterator[Check]:
    g = torch.Generator().manual_seed(0)
    P = 1500
    E = torch.randn(P, P, generator=g)
    E = (E + E.T).div_(math.sqrt(2 * P))
    for (spike, ratio), want in _SPIKES.items():
        s = math.sqrt(ratio)
        given = batch_eigenvalue(float(spike), s)
        yield Check(f"lambda {spike}, P/b {ratio}: the formula", want, given, 5e-3, "spiked Wigner matrices, [V]")
        H_B = s * E
        H_B[0, 0] += spike
        seen = float(curvature.eigenvalues(_Matrix(H_B), 1, tol=0.02, generator=g).value[0])
        # Four standard deviations of a spike far out; those of the edge are smaller.
        yield Check(f"lambda {spike}, P/b {ratio}: P = 1500", given, seen, 4 * s * (2 / P) ** 0.5, "a random matrix")
    noise = _bulk_noise(curvature.density(_Matrix(H_B), 8, 1, generator=g))
    yield Check("s of that matrix by 8 Lanczos steps", s, noise, 0.05, "second moment of the semicircle")
    rates = [sgd_rate(0.1, batch, 64, 0.2, noise=4.0) for batch in (256, 6400)]
    yield Check("in the bulk: rate for 4 times the batch over the rate", 2.0, rates[0] / 0.1, 1e-12, "sqrt(k)")
    yield Check("in the bulk: rate for 100 times the batch over the rate", 10.0, rates[1] / 0.1, 1e-12, "sqrt(k)")
    most = sgd_rate(0.1, 10**9, 64, 1.0, noise=1.0 - 1e-9) / 0.1
    yield Check("at the threshold: rate for any batch over the rate", 2.0, most, 1e-6, "s^2/lambda <= lambda")
    lr, eps = adam_rate(1e-3, 1e-8, 1024, 64)
    yield Check("Adam, 16 times the batch: rate", 4e-3, lr, 1e-15, "sqrt(k)")
    yield Check("Adam, 16 times the batch: damping over rate / batch", 1e-8 * 64e3, eps / lr * 1024, 1e-12, "eta / B")

    values = torch.linspace(-1, 2, 40, dtype=torch.float64)
    # On a diagonal matrix every vector of signs has the moments of the whole spectrum.
    found = curvature.density(_Matrix(values.diag()), 6, 1, generator=g)
    off = [float((found.weights * found.nodes**j).sum() - (values**j).mean()) for j in range(1, 13)]
    yield Check("6 Lanczos steps: error of moments up to 11", 0.0, max(map(abs, off[:11])), 1e-11, "Gauss quadrature")
    yield Check("6 Lanczos steps: error of moment 12", 1e-3, abs(off[11]), 0, "Gauss quadrature", "at least")

    values = torch.tensor([9.0, 4.0, 2.5, 1.0, 0.25], dtype=torch.float64)
    model, x, y = bowl = _bowl(values)
    opt = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.5)
    LanczosLearner(model, F.mse_loss, opt, lanczos_steps=5, factor=1.0).step(x, y)
    for name, want in (("lr", (2 / 3.5) ** 2), ("momentum", (2.5 / 3.5) ** 2)):
        yield Check(f"curvatures 0.25 to 9: {name}", want, opt.param_groups[0][name], 1e-9, "heavy ball")
    ends = [_trained(opt, *bowl, 60) for _ in range(2)]
    # Equal roots: |w| falls as t mu^(t/2).
    got = (ends[1] / ends[0] / 2) ** (1 / 60)
    yield Check("curvatures 0.25 to 9: contraction of a step", 2.5 / 3.5, got, 5e-3, "sqrt(mu)")
    for share, relation in ((0.99, "at most"), (1.01, "at least")):
        model, *rest = _bowl(values)
        opt = torch.optim.SGD(model.parameters(), lr=share * stable_rate(9.0, 0.5), momentum=0.5)
        ends = [_trained(opt, model, *rest, 200) for _ in range(2)]
        name = f"{share} of the stable rate: growth of |w| over 200 steps"
        yield Check(name, 1.0, ends[1] / ends[0], 0, "2 (1 + mu)/lambda", relation)


# Experiment ----------------------------------------------------------------------------------------------------------

_PASSES, _EVERY, _LANCZOS = 800, 100, 8
#: Passes of a measurement: a product is 6 F where a pass is 3 F, and all share a linearisation of 2 F.
_MEASUREMENT = 2 / 3 + 2 * _LANCZOS
#: In 633 steps, three of them early.
_MEASUREMENTS = 10
_LEARNED = _PASSES / (_PASSES - _MEASUREMENTS * _MEASUREMENT)
#: Examples of which the Hessian is the full one, and of a batch's; batches.
_ALL, _PART, _BATCHES = 256, 32, 4


def _spectrum(model: nn.Module, train: tuple[Tensor, Tensor]) -> dict[str, float]:
    """The largest eigenvalue of all, that of batches, and what the formula says of it."""
    x, y = (t[:_ALL] for t in train)
    batches = list(zip(x.split(_PART), y.split(_PART), strict=True))[:_BATCHES]
    with _runs.evaluating(model):
        H = curvature.Hessian(model, F.cross_entropy, [(x, y)])
        top, vectors = H.eigenvalues(1, tol=0.05, vectors=True)
        largest = max(float(top.value[0]), 0.0)
        seen = [float(H.on([batch]).eigenvalues(1, tol=0.05).value[0]) for batch in batches]
        s, along = hessian_noise(H, batches), hessian_noise(H, batches, vectors[0])
    return {
        "full_eigenvalue": largest,
        "batch_eigenvalue": sum(seen) / len(seen),
        "formula_along_spike": batch_eigenvalue(largest, along),
        "formula_isotropic": batch_eigenvalue(largest, s),
    }


def _train(name: str, seed: int, settings: Settings) -> dict[str, float]:
    parts, choice = lab.images(settings.images, settings.test_images), settings.choice
    hook = Hook()
    if name.startswith("lanczos"):
        factor = choice["factor"] if name == "lanczos_tuned" else 1.0
        hook = _OnTheFly(every=_EVERY, lanczos_steps=_LANCZOS, factor=factor)

    def make(m: nn.Module) -> torch.optim.Optimizer:
        if name == "adam":
            return Adam(m.parameters(), lr=0.02 * choice["lr"])
        rate, momentum = (choice["lr"], max(0.0, 1 - choice["friction"])) if name == "sgd" else (0.1, 0.9)
        return SGD(m.parameters(), lr=rate, momentum=momentum, weight_decay=5e-4)

    net = functools.partial(ConvNet, 1, 28, parts.classes)
    done = lab.fit(net, make, parts.train, settings.steps, seed, batch=settings.batch, hook=hook)
    found = {**lab.measure(done, parts), **_spectrum(done.model, parts.train)}
    if isinstance(hook, _OnTheFly):
        # A median over steps leaves measurements out; their share is that of the full run.
        each = hook.seconds / (hook.learner.products / _LANCZOS)
        found["seconds_per_step"] += each * _MEASUREMENTS * _LEARNED / _PASSES
        found |= {"learned_rate": hook.learner.lr, "learned_momentum": hook.learner.momentum}
    return found


def _arm(name: str, passes: float = 1) -> Arm:
    return Arm(name, lambda seed, settings: _train(name, seed, settings), passes)


METHOD = Method(
    name="rmt",
    number=8,
    title="Learning Rates as a Function of Batch Size: A Random Matrix Theory Approach to Neural Network Training",
    authors="Granziol, Zohren, Roberts",
    year=2022,
    arxiv="2006.09092",
    claim=(
        "A few Lanczos steps now and then set rate and momentum while training, so that neither needs several"
        " trainings; tested as it stands, and with a tuned factor, against SGD whose rate and momentum, and Adam whose"
        " rate, are tuned, at equal passes, products with the Hessian counted as two."
    ),
    kernels=("curvature", "descent"),
    check=_check,
    recipe={"optimizer": "sgd"},
    hook=_OnTheFly,
    experiment=Experiment(
        summary=(
            "Fashion-MNIST, a convolutional network of four layers, all arms on a cosine. Learned: eight Lanczos steps"
            " every hundred steps, and three times more within the first hundred, with c = 1 and no choice from the"
            " grid (lanczos) or with a factor c from it (lanczos_tuned). After training: the largest eigenvalue of the"
            f" Hessian of {_ALL} training examples, that of {_PART} of them in the mean, and what the formula makes of"
            " it with the noise along the eigenvector and with that of the bulk."
        ),
        arms=(_arm("sgd"), _arm("adam"), _arm("lanczos", _LEARNED), _arm("lanczos_tuned", _LEARNED)),
        claims=tuple(
            Claim("test_accuracy", arm, baseline, margin=-0.01)
            for arm in ("lanczos", "lanczos_tuned")
            for baseline in ("sgd", "adam")
        ),
        full=Settings(passes=_PASSES, seeds=3, images=6000, test_images=2000),
        quick=Settings(passes=160, seeds=1, images=2000, test_images=400, tune=False),
        grid={"lr": (0.05, 0.1), "friction": (0.1, 0.3), "factor": (0.5, 1.0)},
        tried=(
            "What is learned needs no trainings of its own: tuning its factor ends at 1, the formula as it"
            " stands. It is within a point of tuned Adam, and 0.6 points behind SGD tuned over rate and momentum"
            " in ten trainings."
        ),
        figure=Figure(
            "dots",
            ("full_eigenvalue", "batch_eigenvalue", "formula_along_spike", "formula_isotropic"),
            ("all", "batch", "formula, noise along it", "formula, of the bulk"),
            "",
            "largest eigenvalue",
        ),
    ),
)

# SPDX-License-Identifier: Apache-2.0
"""A plain training loop with a method's hook."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from fastflat.methods._hook import Hook


@dataclasses.dataclass(frozen=True)
class Fit:
    """A finished training.

    Attributes:
        model, optimizer: as the last step left them.
        seconds_per_step: median over the steps.
        losses: of each step, before it.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    seconds_per_step: float
    losses: list[float]


def cosine(steps: int, rise: int = 0) -> Callable[[int], float]:
    """Factor of the learning rate: linear over ``rise`` steps, then a half cosine to zero."""

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(steps - rise, 1))))

    return factor


def constant(step: int) -> float:
    """A learning rate that stays."""
    return 1.0


def fit(
    model: nn.Module | Callable[[], nn.Module],
    optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    train: tuple[Tensor, Tensor],
    steps: int,
    seed: int,
    *,
    batch: int = 64,
    schedule: Callable[[int], float] | None = None,
    hook: Hook | None = None,
    augment: Callable[[Tensor], Tensor] | None = None,
) -> Fit:
    """Trains for so many steps, in a random state of its own: two arms with one seed see the same start and batches.

    Args:
        model: to train, or what makes it (called with the seed set).
        optimizer: makes it from the model; its ``step`` takes a closure, which may run several times.
        train: inputs and targets.
        steps: of the optimizer.
        seed: of start and batches.
        batch: examples in a batch; order anew in every epoch, a short last batch is dropped.
        schedule: factor of the learning rate by step; default :func:`cosine` after a rise over a twentieth of the
            steps, without which a network now and then dies in its first ones.
        hook: of the method.
        augment: changes a batch of inputs.

    Raises:
        ArithmeticError: the loss is not finite.
    """
    hook = hook or Hook()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model if isinstance(model, nn.Module) else model()
        hook.prepare(model)
        opt = optimizer(model)
        rates = torch.optim.lr_scheduler.LambdaLR(opt, schedule or cosine(steps, steps // 20))
        torch.manual_seed(seed)  # making a model or optimizer may draw; the batches are the same for all arms
        hook.start(model, opt, steps)
        model.train()
        order = torch.Generator().manual_seed(seed)
        seconds, losses = [], []
        for step, (x, y) in zip(range(steps), _batches(*train, batch, order), strict=False):
            x = x if augment is None else augment(x)
            start = time.perf_counter()
            hook.before(step)
            try:
                losses.append(_step(model, opt, hook, x, y))
            except ValueError:
                # An attack refuses a network that gives no numbers any more.
                if bool(model(x).isfinite().all()):
                    raise
                losses.append(math.nan)
            hook.after(step)
            seconds.append(time.perf_counter() - start)
            rates.step()
            if not math.isfinite(losses[-1]):
                raise ArithmeticError(f"methods: the loss is {losses[-1]} at step {step}; try a smaller rate")
        hook.finish()
    return Fit(model, opt, statistics.median(seconds) if seconds else math.nan, losses)


def _step(model: nn.Module, opt: torch.optim.Optimizer, hook: Hook, x: Tensor, y: Tensor) -> float:
    first: list[Tensor] = []

    def closure() -> Tensor:
        opt.zero_grad(set_to_none=True)
        loss, _ = hook.loss(model, x, y)
        loss.backward()
        first.append(loss.detach())
        return loss

    opt.step(closure)
    return float(first[0])


def _batches(x: Tensor, y: Tensor, size: int, g: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    size = min(size, len(x))
    while True:
        for at in torch.randperm(len(x), generator=g)[: len(x) // size * size].split(size):
            yield x[at], y[at]

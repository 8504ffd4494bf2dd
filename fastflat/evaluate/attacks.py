# SPDX-License-Identifier: Apache-2.0
"""Perturbations of the inputs that raise the loss most: fast gradient sign and projected gradients.

Both take the model in the mode it is in and leave its modes, buffers and gradients as they were; what it draws at
random is undone. Inputs are of any floating type; steps are taken in float32 (float64 for float64), and the result is
rounded to the inputs' type. Nothing waits for the device between the first forward pass and the last step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastflat import _checks
from fastflat._ops import compute_dtype
from fastflat.evaluate import _ball, _runs

#: ``loss(logits [B, C], y) -> [B]``, one number for each sample.
Loss = Callable[[Tensor, Any], Tensor]


def fgsm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float | Tensor,
    *,
    norm: str = "linf",
    targeted: bool = False,
    loss: Loss | None = None,
    lo: float | Tensor | None = 0.0,
    hi: float | Tensor | None = 1.0,
    active: Tensor | None = None,
) -> Tensor:
    """``clip(x + eps sign(g))`` with the gradient g of each sample's loss in x; for ``l2``, ``clip(x + eps g / |g|)``.

    Args, errors: as in :func:`pgd`.

    Source: Goodfellow, Shlens and Szegedy, ICLR 2015, section 4.
    """
    attack = Attack("evaluate.fgsm", model, x, y, eps, norm, targeted, loss, lo, hi, active)
    with _runs.undisturbed(model):
        return attack.result(attack.climb(attack.centre, attack.eps, 1, freeze=False))


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float | Tensor,
    step: float | Tensor | None = None,
    steps: int = 10,
    *,
    norm: str = "linf",
    restarts: int = 1,
    random_start: bool = True,
    targeted: bool = False,
    freeze: bool | Callable[[Tensor, Any], Tensor] = False,
    loss: Loss | None = None,
    lo: float | Tensor | None = 0.0,
    hi: float | Tensor | None = 1.0,
    active: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Projected gradient ascent: ``x <- P(x + step sign(g))``, for ``l2`` ``P(x + step g / |g|)``, from a random point.

    P is :func:`project`, into the ball of radius eps about each sample and the box [lo, hi].

    Args:
        model: returns logits ``[B, C]`` for x; batch norm in evaluation mode, for samples must not see each other.
        x: inputs ``[B, ...]``, floating, in [lo, hi].
        y: labels ``[B]``; the classes aimed at if ``targeted``.
        eps: radius in the units of x; for ``linf`` a tensor that broadcasts to x, too: ``8/255 / std``.
        step: length of a step; 2.5 eps / steps by default, at most eps.
        steps: how many.
        norm: ``"linf"`` or ``"l2"``.
        restarts: runs from random points of their own; of each sample the one is returned that fools the model, of
            those with the same outcome the one of highest loss.
        random_start: from a point drawn evenly from the ball instead of from x.
        targeted: descend the loss to y.
        freeze: leave a sample where it is as soon as it fools the model (is taken for another class than y; for y if
            ``targeted``), or as ``freeze(logits, y) -> bool [B]`` says; that is looked at before each step.
        loss: ``(logits, y) -> [B]``; cross-entropy by default.
        lo, hi: range of the data, numbers or tensors that broadcast to x; None for no bound. For normalised images see
            :func:`data_range`.
        active: bool ``[B]``: the other samples are returned as they are, in every bit.
        generator: of the random points; by default torch's, which moves on.

    Returns:
        The perturbed inputs, ``[B, ...]`` in the type of x, without a graph.

    Raises:
        TypeError, ValueError: an argument is not as above, a label is no class, a logit or a gradient is not finite.

    Source: Madry et al., ICLR 2018, section 2.1.
    """
    attack = Attack("evaluate.pgd", model, x, y, eps, norm, targeted, loss, lo, hi, active)
    for argument, value in (("steps", steps), ("restarts", restarts)):
        _runs.positive_integer(attack.name, argument, value)
    if step is None:
        step = attack.eps * min(1.0, 2.5 / steps)
    else:
        _ball.radius(attack.name, "step", step, norm, x)
    if restarts > 1 and not random_start:
        _checks.fail(attack.name, "restarts", "be 1 without random starts", restarts)
    found: tuple[Tensor, Tensor, Tensor] | None = None
    for _ in range(restarts):
        begin = attack.centre
        if random_start:
            begin = attack.inside(begin + _ball.start(begin, attack.eps, norm, generator))
        with _runs.undisturbed(model):
            moved = attack.climb(begin, step, steps, freeze=freeze)
            if restarts > 1:
                found = attack.better(found, moved)
    return attack.result(moved if found is None else found[0])


class Attack:
    """The arguments of an attack, checked, and its steps."""

    def __init__(
        self,
        name: str,
        model: Any,
        x: Any,
        y: Any,
        eps: Any,
        norm: str,
        targeted: bool,
        loss: Loss | None,
        lo: Any,
        hi: Any,
        active: Any,
    ) -> None:
        _runs.module(name, model)
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2:
            got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x)
            _checks.fail(name, "x", "be a floating tensor [B, ...]", got)
        if not x.numel():
            _checks.fail(name, "x", "hold at least one sample", list(x.shape))
        if loss is None and (not isinstance(y, Tensor) or y.is_floating_point() or y.shape != x.shape[:1]):
            got = f"{y.dtype} {list(y.shape)}" if isinstance(y, Tensor) else type(y)
            _checks.fail(name, "y", f"be integers [B={len(x)}]", got)
        if active is not None and (
            not isinstance(active, Tensor) or active.dtype != torch.bool or active.shape != x.shape[:1]
        ):
            got = f"{active.dtype} {list(active.shape)}" if isinstance(active, Tensor) else type(active)
            _checks.fail(name, "active", f"be a bool tensor [B={len(x)}]", got)
        _ball.radius(name, "eps", eps, norm, x)
        _ball.bounds(name, lo, hi, x)
        _ball.within_range(name, eps, norm, lo, hi, x)
        if torch.is_inference_mode_enabled():
            _checks.fail(name, "the call", "lie outside of torch.inference_mode()", "one inside")
        coupled = _coupling(model)
        if coupled is not None:
            _checks.fail(name, "model", "keep samples apart", f"{coupled} in train mode", "; call model.eval() first")
        self.name, self.model, self.x, self.y = name, model, x.detach(), y
        self.eps, self.norm, self.targeted, self.loss, self.lo, self.hi = eps, norm, targeted, loss, lo, hi
        self.active = None if active is None else active.to(x.device).view(_ball.per_sample(x))
        self.centre = self.x if x.dtype == torch.float64 else self.x.float()
        self._seen, self._finite = False, torch.ones((), dtype=torch.bool, device=x.device)

    def inside(self, x: Tensor) -> Tensor:
        return _ball.into_box(_ball.into_ball(x, self.centre, self.eps, self.norm), self.lo, self.hi)

    def climb(self, x: Tensor, step: float | Tensor, steps: int, *, freeze: bool | Callable) -> Tensor:
        """Steps from x on; frozen samples stay."""
        going = None
        for _ in range(steps):
            g, logits = self._gradient(x)
            moved = self.inside(x + step * _ball.ascent(-g if self.targeted else g, self.norm))
            if freeze:
                stop = self._fooled(logits) if freeze is True else self._stopped(freeze, logits)
                going = ~stop if going is None else going & ~stop
                moved = torch.where(going, moved, x)
            x = moved
        return x

    def better(self, found: tuple[Tensor, Tensor, Tensor] | None, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(inputs, whether they fool, how much) of each sample: the better of those found and x."""
        with torch.no_grad():
            losses, logits = self._losses(x.to(self.x.dtype))
            score = (-losses if self.targeted else losses).view(_ball.per_sample(x))
            fooled = self._fooled(logits)
        if found is None:
            return x, fooled, score
        best, was, most = found
        take = (fooled & ~was) | ((fooled == was) & (score > most))
        return torch.where(take, x, best), fooled | was, torch.where(take, score, most)

    def result(self, x: Tensor) -> Tensor:
        x = x.to(self.x.dtype)
        if not bool(self._finite):
            _checks.fail(self.name, "gradients", "be finite", "NaN or infinity", "; look at the model's outputs")
        return x if self.active is None else torch.where(self.active, x, self.x)

    def _gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = x.to(self.x.dtype).detach().requires_grad_()
            losses, logits = self._losses(leaf)
            if not losses.requires_grad:
                _checks.fail(self.name, "model", "be differentiable in its inputs", "outputs without a gradient")
            (g,) = torch.autograd.grad(losses.sum(), leaf)
        self._finite &= g.isfinite().all()
        return g.to(x.dtype), logits.detach()

    def _losses(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(x)
        return self._of(logits), logits

    def _of(self, logits: Tensor) -> Tensor:
        """The losses of what the model returned, which must be logits ``[B, C]``; the first are looked at."""
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(self.x):
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits)
            _checks.fail(self.name, "model", f"return logits [B={len(self.x)}, C]", got)
        if not self._seen:
            self._check(logits)
            self._seen = True
        if self.loss is None:
            z = logits.to(compute_dtype(logits.dtype))
            return F.cross_entropy(z, self.y.to(z.device).long(), reduction="none")
        losses = self.loss(logits, self.y)
        if not isinstance(losses, Tensor) or losses.shape != logits.shape[:1]:
            got = list(losses.shape) if isinstance(losses, Tensor) else type(losses)
            want = f"return one number for each sample, [B={len(logits)}]"
            _checks.fail(self.name, "loss", want, got, "; reduction='none'")
        return losses

    def _fooled(self, logits: Tensor) -> Tensor:
        if self.loss is not None and (not isinstance(self.y, Tensor) or self.y.shape != logits.shape[:1]):
            want = f"be labels [B={len(logits)}] where samples are frozen or runs compared"
            _checks.fail(self.name, "y", want, list(self.y.shape) if isinstance(self.y, Tensor) else type(self.y))
        same = logits.argmax(1) == self.y.to(logits.device)
        return (same if self.targeted else ~same).view(_ball.per_sample(self.x))

    def _stopped(self, freeze: Callable, logits: Tensor) -> Tensor:
        stop = freeze(logits, self.y)
        if not isinstance(stop, Tensor) or stop.dtype != torch.bool or stop.shape != logits.shape[:1]:
            got = f"{stop.dtype} {list(stop.shape)}" if isinstance(stop, Tensor) else type(stop)
            _checks.fail(self.name, "freeze", f"return a bool tensor [B={len(logits)}]", got)
        return stop.to(self.x.device).view(_ball.per_sample(self.x))

    def _check(self, logits: Tensor) -> None:
        """Values of the data and the first logits, in one look."""
        x = self.centre
        edge = 1e-4 + torch.finfo(self.x.dtype).eps * x.abs().amax()
        flags = [logits.detach().isnan().any(), ~x.isfinite().all()]
        below = x.new_zeros((), dtype=torch.bool)
        for value, sign in ((self.lo, -1), (self.hi, 1)):
            if value is not None:
                below = below | ((x - torch.as_tensor(value, dtype=x.dtype, device=x.device)) * sign > edge).any()
        flags.append(below)
        if self.loss is None:
            y = self.y.to(logits.device)
            flags.append(((y < 0) | (y >= logits.shape[1])).any())
        nan, infinite, outside, *unknown = torch.stack([f.to(x.device) for f in flags]).tolist()
        if infinite:
            _checks.fail(self.name, "x", "be finite", "NaN or infinity")
        if outside:
            got = f"{float(x.min()):.4g} to {float(x.max()):.4g}"
            hint = "; for normalised images pass lo, hi = data_range(mean, std), for others their range or None"
            _checks.fail(self.name, "x", "lie in [lo, hi]", got, hint)
        if nan:
            _checks.fail(self.name, "logits", "be numbers", "NaN")
        if any(unknown):
            got = f"{int(self.y.min())} to {int(self.y.max())}"
            _checks.fail(self.name, "y", f"lie in 0 to {logits.shape[1] - 1}, the classes of the logits", got)


def _coupling(model: nn.Module) -> str | None:
    """The name of a batch norm that uses the statistics of the batch."""
    for name, module in model.named_modules():
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if norm and (module.training or module.running_mean is None):
            return name or type(module).__name__
    return None

# SPDX-License-Identifier: Apache-2.0
"""Noise that changes during training: amplitudes of all quantizers of a model, moved once a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastflat import _checks
from fastflat.quant.prepare import quantizers

#: Share of the first value that is left after the share p of the horizon; "exponential" is e^-1 at the horizon.
CURVES: dict[str, Callable[[float], float]] = {
    "constant": lambda p: 1.0,
    "linear": lambda p: max(0.0, 1.0 - p),
    "cosine": lambda p: 0.5 * (1.0 + math.cos(math.pi * min(p, 1.0))),
    "exponential": lambda p: math.exp(-p),
}


class NoiseSchedule:
    """Moves ``nu`` and ``a`` of a model's noisy quantizers along a curve: ``value(t) = first * curve(t / horizon)``.

    The values are device scalars of the quantizers, written in place: no synchronisation, no new graph under
    ``torch.compile`` or a CUDA graph. They are in the model's ``state_dict``; the step is in this object's, as with a
    learning-rate scheduler.

    Args:
        model: a prepared model with quantizers whose spec has noise.
        horizon: steps of the curve; tau of ``exp(-t/tau)`` for ``"exponential"``.
        nu: amplitude at step 0.
        a: share of the residual at step 0 (``noise="temper"``).
        curve: ``"exponential"`` (Wang et al., 2022), ``"cosine"``, ``"linear"`` or ``"constant"``.

    Raises:
        ValueError: no quantizer has noise, or an argument does not fit.
    """

    def __init__(
        self, model: nn.Module, horizon: int, *, nu: float = 1.0, a: float = 0.0, curve: str = "exponential"
    ) -> None:
        op = "NoiseSchedule"
        if curve not in CURVES:
            _checks.fail(op, "curve", f"be one of {', '.join(CURVES)}", repr(curve))
        if isinstance(horizon, bool) or not isinstance(horizon, int) or horizon < 1:
            _checks.fail(op, "horizon", "be a positive number of steps", repr(horizon))
        for name, value in (("nu", nu), ("a", a)):
            if not math.isfinite(value):
                _checks.fail(op, name, "be finite", value)
        self._targets = [q for _, q in quantizers(model) if q.nu is not None]
        if not self._targets:
            _checks.fail(op, "model", "have a quantizer with noise", "none", "; use a spec with noise=...")
        self.horizon, self.nu, self.a, self.curve = horizon, nu, a, curve
        self.last_step = 0
        self._write()

    def step(self) -> None:
        """One training step on; call it after ``optimizer.step()``."""
        self.last_step += 1
        self._write()

    def values(self) -> tuple[float, float]:
        """nu and a at the present step."""
        left = CURVES[self.curve](self.last_step / self.horizon)
        return self.nu * left, self.a * left

    @torch.no_grad()
    def _write(self) -> None:
        nu, a = self.values()
        for q in self._targets:
            q.nu.fill_(nu)
            if q.a is not None:
                q.a.fill_(a)

    def state_dict(self) -> dict[str, Any]:
        """Plain values: the curve and where on it training is."""
        return {name: getattr(self, name) for name in ("horizon", "nu", "a", "curve", "last_step")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken.

        Raises:
            ValueError: an entry is missing or unknown. Nothing has changed then.
        """
        want = set(self.state_dict())
        if set(state) != want:
            _checks.fail("NoiseSchedule", "state", f"have the entries {sorted(want)}", sorted(state))
        for name, value in state.items():
            setattr(self, name, value)
        self._write()

# SPDX-License-Identifier: Apache-2.0
"""AdamW whose states have 8 bits an element."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch import Tensor

_BLOCK = 256
_HOST = torch.device("cpu")


@functools.cache
def _values(signed: bool, device: torch.device = _HOST) -> Tensor:
    """The 256 values of a code in [-1, 1] or [0, 1], ascending: a decimal exponent in unary, then a linear fraction."""
    bits = 7 if signed else 8
    positive = [
        10.0**-zeros * (0.1 + 0.9 * (i + 0.5) / 2 ** (bits - 1 - zeros))
        for zeros in range(bits)
        for i in range(2 ** (bits - 1 - zeros))
    ]
    if signed:
        values = [*positive, *(-v for v in positive), 0.0, 1.0]
    else:
        values = [*sorted(positive)[:-1], 0.0, 1.0]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@functools.cache
def _between(signed: bool, device: torch.device) -> Tensor:
    """Halfway from one value to the next."""
    values = _values(signed, device)
    return (values[1:] + values[:-1]) / 2


class Blocks:
    """A tensor in 8 bits: uint8 codes and the largest magnitude of each block of 256."""

    @staticmethod
    def encode(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
        """Codes uint8 ``[n]`` and fp32 ``[blocks]`` of fp32 x, each element to the nearest value of its block."""
        rows = torch.nn.functional.pad(x.flatten(), (0, -x.numel() % _BLOCK)).view(-1, _BLOCK)
        most = rows.abs().amax(1)
        ratio = rows / torch.where(most > 0, most, 1.0)[:, None]
        codes = torch.bucketize(ratio, _between(signed, x.device), out_int32=True).to(torch.uint8)
        return codes.flatten()[: x.numel()].clone(), most

    @staticmethod
    def decode(codes: Tensor, most: Tensor, signed: bool) -> Tensor:
        """fp32 ``[n]``."""
        return _values(signed, codes.device)[codes.long()] * most.repeat_interleave(_BLOCK)[: codes.numel()]


class AdamW8bit(torch.optim.Optimizer):
    """AdamW whose two moments are kept in 8 bits with a scale for each block of 256 elements: 2.03 bytes an element
    instead of 8; the options of ``torch.optim.AdamW``.

    Values of a block are its largest magnitude times one of 256 that span seven decades, as in dynamic quantization.
    The second moment is kept as its root, whose range is half as many decades: a small one does not become 0 beside a
    first moment that is not, which would make a step of the size m / eps. Parameters of fewer than ``least`` elements
    have states in fp32. Arithmetic is in fp32, the step of 16-bit parameters is rounded once.

    Args:
        params: of one device each; gradients dense.
        least: smallest parameter whose states are quantized.

    Source: Dettmers, Lewis, Shleifer and Zettlemoyer 2022, "8-bit Optimizers via Block-wise Quantization"
    (arXiv 2110.02861).
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        least: int = 4096,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay), ("least", least)):
            if not value >= 0:
                raise ValueError(f"optim.AdamW8bit: {name} must be at least 0, got {value!r}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"optim.AdamW8bit: betas must lie in [0, 1), got {betas!r}")
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "least": least}
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if any(p.grad.is_sparse for p, _ in found):  # before any of them moves
            raise RuntimeError("optim.AdamW8bit: gradients must be dense, got a sparse one")
        for p, group in found:
            self._update(p, group)
        return loss

    def _update(self, p: Tensor, group: dict[str, Any]) -> None:
        (b1, b2), state, g = group["betas"], self.state[p], p.grad.float()
        small = p.numel() < group["least"]
        t = state["step"] = state.get("step", 0) + 1
        m = self._moment(state, "exp_avg", g, True).lerp_(g, 1 - b1)
        v = self._moment(state, "root", g, False).square_().mul_(b2).addcmul_(g, g, value=1 - b2)
        root = v.sqrt_()
        w = p.float() * (1 - group["lr"] * group["weight_decay"])
        w.addcdiv_(m, (root / (1 - b2**t) ** 0.5).add_(group["eps"]), value=-group["lr"] / (1 - b1**t))
        p.copy_(w)
        for name, moment, signed in (("exp_avg", m, True), ("root", root, False)):
            if small:
                state[name] = moment
            else:
                state[name], state[name + "_most"] = Blocks.encode(moment, signed)

    @staticmethod
    def _moment(state: dict[str, Any], name: str, like: Tensor, signed: bool) -> Tensor:
        if name not in state:
            return torch.zeros_like(like)
        if state[name].dtype != torch.uint8:
            return state[name]
        return Blocks.decode(state[name], state[name + "_most"], signed).view(like.shape)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of any optimizer of torch; states keep their types, which it would cast to those of the parameters."""
        super().load_state_dict(state_dict)
        old = itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        new = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        for number, p in zip(old, new, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                self.state[p][name] = value.to(p.device, copy=True) if isinstance(value, Tensor) else value

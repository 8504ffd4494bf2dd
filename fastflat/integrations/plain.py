# SPDX-License-Identifier: Apache-2.0
"""Plain learned-step-size quantizers, described by the names of their attributes: LSQ and LSQ+ as projects write them.

::

    s' = s, its gradient times 1 / sqrt(numel qmax)
    y  = round(clamp((x - offset) / s', qmin, qmax)) s' + offset
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastflat._spec import QuantSpec
from fastflat.autograd._modes import transformed
from fastflat.functional import fake_quantize
from fastflat.integrations._adapter import Adapter, placed, spread
from fastflat.integrations._grid import axis_of, flat, grid, remembered
from fastflat.integrations._measured import Damped, Quantized

Ends = tuple[str, str] | Callable[[nn.Module], tuple[int, int]]


def _spec(qmin: int, qmax: int, axis: int | None, chain: bool, factor: bool) -> QuantSpec:
    form = {"through": "chain", "compute": "input"} if chain else {}
    gradient = "lsq" if factor else "none"
    return QuantSpec.lsq(axis=axis, grad_scale=gradient, **grid(qmin, qmax), **form)


class Plain(Adapter):
    """A quantizer with a learned step, by the names of its attributes.

    ::

        fastflat.integrations.register(Plain("Our LSQ", ["StepSize"], scale="step", grid=("low", "high")))

    Args:
        title: what reports say.
        kinds: classes, or names of classes.
        scale: the attribute that holds s: ``[]``, ``[1]``, or one value a channel in a shape that broadcasts.
        grid: the attributes that hold qmin and qmax, or a function of the module that gives both.
        chain: whether autograd derives it, through ``x / s`` and ``* s``; False for a Function of its own that passes
            the gradient as it is.
        factor: how the gradient of s gets its ``1 / sqrt(numel qmax)``: ``"value"``, in the sum ``(s - s f) + s f``,
            which rounds s; ``"gradient"``, which leaves s; None: not at all.
        offset: the attribute that is taken from x and added to the result (LSQ+).
        begun: an attribute that is 0 until the first training call has set the step from its data.

    The step must be positive: fastflat holds it at 2**-126 from below.
    """

    def __init__(
        self,
        title: str,
        kinds: list[type | str],
        *,
        scale: str,
        grid: Ends,
        chain: bool = True,
        factor: str | None = "value",
        offset: str | None = None,
        begun: str | None = None,
    ):
        if factor not in ("value", "gradient", None):
            raise ValueError(f"integrations.Plain: factor must be 'value', 'gradient' or None, got {factor!r}")
        self.title, self.kinds, self.scale, self.grid = title, tuple(kinds), scale, grid
        self.chain, self.factor, self.offset, self.begun = chain, factor, offset, begun
        self.summed = (scale,) if offset is None else (scale, offset)
        self._read: weakref.WeakKeyDictionary[nn.Module, dict] = weakref.WeakKeyDictionary()

    @property
    def name(self) -> str:
        return self.title

    def applies(self, module: nn.Module) -> bool:
        classes = tuple(kind for kind in self.kinds if isinstance(kind, type))
        named = type(module).__name__ in self.kinds or isinstance(module, classes)
        return named and isinstance(getattr(module, self.scale, None), Tensor)

    def reason(self, module: nn.Module) -> str | None:
        low, high = self.ends(module)
        return None if grid(low, high) else f"no spec has the grid [{low}, {high}]"

    def ends(self, module: nn.Module) -> tuple[int, int]:
        """qmin and qmax."""
        if callable(self.grid):
            return self.grid(module)
        return int(self.number(module, self.grid[0])), int(self.number(module, self.grid[1]))

    def number(self, module: nn.Module, name: str) -> float:
        """An attribute as a number; a tensor is read from its device when it was written."""
        value = getattr(module, name)
        if not isinstance(value, Tensor):
            return value
        known = self._read.setdefault(module, {})
        if name not in known or known[name][0] is not value or known[name][1] != value._version:
            known[name] = (value, value._version, value.item())
        return known[name][2]

    def quantize(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """y; None for what the module's own forward must do."""
        s = getattr(module, self.scale)
        if torch.compiler.is_compiling() or not isinstance(s, Tensor) or not x.numel() or x.dtype is not s.dtype:
            return None
        if self.begun is not None and module.training and not self.number(module, self.begun):
            return None
        axis = axis_of(s, x)
        if axis == "":
            return None
        low, high = self.ends(module)
        spec = remembered(_spec, low, high, axis, self.chain, self.factor == "gradient")
        if self.offset is None:
            return self._on_grid(x, s, axis, high, spec)
        offset = getattr(module, self.offset)
        return self._on_grid(x - offset, s, axis, high, spec) + offset

    def _on_grid(self, x: Tensor, s: Tensor, axis: int | None, high: int, spec: QuantSpec) -> Tensor:
        if self.factor == "value":
            f = 1.0 / (high * x.numel()) ** 0.5
            if x.dtype in (torch.float32, torch.float64) and not transformed():
                return Quantized.apply(x, s, None, spec, Damped(f))[0]
            part = s * f
            s = (s - part).detach() + part
        return fake_quantize(x, s.reshape(flat(axis)), spec=spec)

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        y = self.quantize(module, x)
        return self.original(module, x) if y is None else y

    def examples(self, module: nn.Module) -> Iterator[tuple]:
        dtype, device = placed(module)
        for x in self.probes(module, [(4, 6, 5, 5), (9, 7)]):
            yield (x.to(device, dtype),)

    def probes(self, module: nn.Module, shapes: list[tuple[int, ...]]) -> Iterator[Tensor]:
        """x over and beyond the grid, of shapes that the step takes."""
        s = getattr(module, self.scale).detach()
        if s.numel() > 1:
            shapes = [tuple(5 if n == 1 else n for n in s.shape)]
        for seed in range(2):
            yield from spread(shapes, s.float().abs().mean().clamp_min(1e-6), seed)


class PlainLayer(Plain):
    """A convolution or linear layer with such a quantizer for its weight inside; the arguments are the same."""

    def applies(self, module: nn.Module) -> bool:
        return isinstance(module, (nn.Conv2d, nn.Linear)) and super().applies(module)

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        weight = self.quantize(module, module.weight)
        if weight is None:
            return self.original(module, x)
        if isinstance(module, nn.Linear):
            return nn.functional.linear(x, weight, module.bias)
        return module._conv_forward(x, weight, module.bias)

    def examples(self, module: nn.Module) -> Iterator[tuple]:
        dtype, device = placed(module)
        shape: tuple[int, ...] = (3, module.weight.shape[1])
        if isinstance(module, nn.Conv2d):
            reach = (d * (k - 1) + 2 for k, d in zip(module.kernel_size, module.dilation, strict=True))
            shape = (2, module.in_channels, *reach)
        generator = torch.Generator().manual_seed(0)
        for _ in range(2):
            yield (torch.randn(shape, generator=generator).to(device, dtype),)


def _signed_by_buffer(adapter: list[Plain]) -> Callable[[nn.Module], tuple[int, int]]:
    """The grid of activations that find out in their first call whether they have a sign."""

    def ends(module: Any) -> tuple[int, int]:
        bits = int(module.nbits)
        return _signed(bits) if adapter[0].number(module, "signed") == 1 else (0, 2**bits - 1)

    return ends


def _signed(bits: int) -> tuple[int, int]:
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def popular() -> list[Plain]:
    """The quantizers of projects that many copy: lsq-net, LSQuantization, LSQplus."""
    found: list[Plain] = []
    found.append(Plain("LSQ", ["LsqQuan"], scale="s", grid=("thd_neg", "thd_pos")))
    for chain, factor in ((True, "value"), (False, "gradient")):
        found.append(
            PlainLayer(
                "LSQ weights", ["Conv2dLSQ", "LinearLSQ"], scale="alpha", grid=lambda m: _signed(int(m.nbits)),
                chain=chain, factor=factor, begun="init_state",
            )
        )  # fmt: skip
        of: list[Plain] = []
        of.append(
            Plain(
                "LSQ activations", ["ActLSQ"], scale="alpha", grid=_signed_by_buffer(of),
                chain=chain, factor=factor, begun="init_state",
            )
        )  # fmt: skip
        found += of
    for kinds, offset in ((["LSQPlusActivationQuantizer"], "beta"), (["LSQActivationQuantizer"], None)):
        for chain, factor in ((True, "value"), (False, "gradient")):
            found.append(
                Plain(
                    "LSQ+ activations" if offset else "LSQ activations", kinds, scale="s", grid=("Qn", "Qp"),
                    chain=chain, factor=factor, offset=offset, begun="init_state",
                )
            )  # fmt: skip
    return found

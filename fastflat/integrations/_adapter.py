# SPDX-License-Identifier: Apache-2.0
"""What says how one kind of module is computed by fastflat, and the list of those."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastflat import _checks


class Adapter:
    """How one kind of module is computed by fastflat.

    A subclass gives :meth:`applies` and :meth:`forward`, the rest where it needs it::

        class StepSize(fastflat.integrations.Adapter):
            "Our own LSQ quantizer."

            def applies(self, module):
                return isinstance(module, LearnedStep)

            def forward(self, module, x):
                spec = fastflat.QuantSpec.lsq(bits=module.bits, signed=module.signed, through="chain")
                return fastflat.fake_quantize(x, module.step, spec=spec)

        fastflat.integrations.register(StepSize())

    :func:`fastflat.accelerate` calls the module's own forward and this one on probe batches, in every mode of
    :meth:`modes`, and swaps only where results, gradients and state agree. (``through="chain"``: autograd's way back
    through ``x / s`` and ``* s`` rounds twice.) An adapter holds no state of a module.

    Attributes:
        summed: names of parameters whose gradient is a sum over elements, taken in another order than the module's
            own: they agree to rounding; ``None`` means all of them. The gradient of the input agrees in every bit
            unless ``"input"`` is named, too: where the scale is a function of the input.
    """

    summed: tuple[str, ...] | None = None

    def __deepcopy__(self, memo: dict) -> Adapter:
        return self

    @property
    def name(self) -> str:
        """What reports say: the first line of the docstring."""
        return (type(self).__doc__ or type(self).__name__).strip().splitlines()[0].rstrip(".")

    def applies(self, module: nn.Module) -> bool:
        """Whether the module is of this kind."""
        raise NotImplementedError

    def reason(self, module: nn.Module) -> str | None:
        """Why this module of the kind must be left alone, in a few words; None if it can be swapped."""
        return None

    def forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What the module returns, computed by fastflat; its state moves as the module's own forward moves it.

        For arguments that fastflat does not take, return ``self.original(module, *args)``.
        """
        raise NotImplementedError

    def original(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward."""
        base = getattr(type(module), "_fastflat_base", type(module))
        return base.forward(module, *args, **kwargs)

    def sums(self, module: nn.Module) -> tuple[str, ...] | None:
        """:attr:`summed` for this module in the state that it is in."""
        return self.summed

    def examples(self, module: nn.Module) -> Iterable[tuple]:
        """Arguments of probe calls, one after another; the first tensor of each is the one whose gradient counts.

        By default x of shapes that a scale per tensor takes, over and beyond the grid, with ties and zeros.
        """
        dtype, device = placed(module)
        yield from ((x.to(device, dtype),) for x in spread(((64, 7), (2, 3, 5, 5)), steps(module)))

    def modes(self, module: nn.Module) -> dict[str, Callable[[nn.Module], Any]]:
        """What is done to a copy of the module before its probe calls, by name; each on copies of their own.

        By default training and evaluation mode. A module that others switch on and off has modes for that, too.
        """
        return {"training": lambda twin: twin.train(), "evaluation": lambda twin: twin.eval()}


def placed(module: nn.Module) -> tuple[torch.dtype, torch.device]:
    """Type and device of a module's first floating tensor; fp32 on the CPU if it has none."""
    for t in (*module.parameters(), *module.buffers()):
        if t.is_floating_point():
            return t.dtype, t.device
    return torch.float32, torch.device("cpu")


def steps(module: nn.Module) -> Tensor:
    """A guess of a module's step: its smallest positive parameter or buffer that is not larger than 1, else 0.05."""
    values = [t.detach().float().flatten().cpu() for t in (*module.parameters(), *module.buffers()) if t.numel()]
    small = [v[(v > 0) & (v <= 1)] for v in values if v.is_floating_point()]
    joined = torch.cat(small) if small else torch.empty(0)
    return joined.min() if joined.numel() else torch.tensor(0.05)


def spread(shapes: Iterable[tuple[int, ...]], step: Tensor, seed: int = 0) -> Iterator[Tensor]:
    """Tensors of these shapes: normal values of some 20 steps, ties, codes as they are, zeros of both signs, and values
    far beyond any grid."""
    generator = torch.Generator().manual_seed(seed)
    step = step.detach().float().cpu()
    for shape in shapes:
        u = torch.randn(shape, generator=generator) * 20
        kind = torch.randint(12, shape, generator=generator)
        u = torch.where(kind == 0, u.round() + 0.5, u)
        u = torch.where(kind == 1, u.round(), u)
        u = torch.where(kind == 2, torch.zeros_like(u), u)
        u = torch.where(kind == 3, -torch.zeros_like(u), u)
        u = torch.where(kind == 4, u * 100, u)
        yield u * step


_REGISTERED: list[Adapter] = []


def register(adapter: Adapter) -> None:
    """Have :func:`fastflat.accelerate` use an adapter, before those that are there.

    Raises:
        TypeError: it is not an :class:`Adapter`.
    """
    if not isinstance(adapter, Adapter):
        got = adapter if isinstance(adapter, type) else type(adapter)
        _checks.fail("integrations.register", "adapter", "be an instance of Adapter", got)
    if adapter not in _REGISTERED:
        _REGISTERED.insert(0, adapter)


def unregister(adapter: Adapter) -> None:
    """Forget an adapter that :func:`register` was given; modules that it has swapped stay as they are."""
    if adapter in _REGISTERED:
        _REGISTERED.remove(adapter)


def registered() -> tuple[Adapter, ...]:
    """The adapters in the order in which they are asked."""
    return tuple(_REGISTERED)

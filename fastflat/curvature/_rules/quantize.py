# SPDX-License-Identifier: Apache-2.0
"""Quantizers. The in-range mask m and the residual are frozen, so y is linear in (x, s, z) and its factors are primal::

    y    Ry  = m Rx + e Rs + d Rz                 e = dy/ds, d = dy/dz
    bwd  Rgx = m Rg,  Rgs = sum Rg e,  Rgz = sum Rg d

m, e and d come from the quantizer's own jvp of ones, once for all tangents. With a zero-point that is trained there is
one second derivative more, d2y/ds dz = -f^2 (1 - m), f the gradient factor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastflat.curvature import _tangents
from fastflat.curvature._rules._table import Call, added, rule

ops = torch.ops.fastflat
aten = torch.ops.aten


class _Grid:
    """One quantizer of the fake_quantize family at one point: what its jvp makes of ones."""

    def __init__(self, c: Call, first: int, extra: int, push: Any, factor: float, trained: bool) -> None:
        # first: position of x among the arguments; extra: how many draws lie between zero_point and the grid
        self._c, self._push, self._factor, self.trained = c, push, factor, trained
        self._places = range(first, first + 3 + extra)
        after = first + 3 + extra + (1 if c.op is ops.general_quantize_bwd.default else 0)
        self._grid = [c.primal(after + i) for i in range(6)]

    @property
    def axis(self) -> int:
        return self._grid[2]

    @property
    def group(self) -> int:
        return self._grid[3]

    @property
    def has_zero_point(self) -> bool:
        return self._c.step.args[self._places[2]] is not None

    def point(self) -> list[Any]:
        """x, the scale, the zero-point, and what was drawn."""
        return [self._c.primal(i) for i in self._places]

    def along(self, which: int) -> Tensor:
        """dy by x (0), by the scale (1), by the zero-point (2)."""
        return self._c.shared(self.key(which), lambda: self._along(which))

    def _along(self, which: int) -> Tensor:
        point = self.point()
        ones: list[Tensor | None] = [None, None, None]
        ones[which] = torch.ones_like(point[which])
        return self._push(*ones, *point, *self._grid, self._factor, None).to(point[0].dtype)

    def key(self, which: int) -> Any:
        """Of a derivative that the quantizer and its backward share."""
        return "along", which, *map(self._c.origin, self._places), *self._grid, self._factor

    def scaled(self) -> Any:
        """The tangents of the first argument times dy by x."""
        return self._c.scaled(0, self.key(0), lambda: self._along(0))

    @property
    def channels(self) -> dict[str, Any]:
        """What elements share a scale, as the kernels are told."""
        return {"axis": None if self.axis < 0 or self.group else self.axis, "group": self.group}

    def summed(self, t: Tensor, which: int, shape: torch.Size) -> Tensor:
        """K tensors of x's shape times dy by ``which``, summed over the elements of each scale."""
        dots, _ = _tangents.sums(t, self.along(which), False, **self.channels)
        return dots.reshape(t.shape[0], *shape).to(t.dtype)


def _forward(c: Call, grid: _Grid):
    s, z = (c.tangent(i) if grid.trained else None for i in (1, 2))
    moved = grid.scaled() if c.moves(0) else None
    if s is None and z is None:
        return moved
    x, mask = (None, None) if moved is None else moved.parts()
    terms = [(grid.along(i), t) for i, t in ((1, s), (2, z)) if t is not None]
    (f0, r0), (f1, r1) = (*terms, (None, None))[:2]
    return _tangents.combine(c.out_shape, t0=x, p0=mask, f0=f0, r0=r0, f1=f1, r1=r1, **grid.channels)


def _backward(c: Call, grid: _Grid, scale: int):
    s, z = c.tangent(scale), c.tangent(scale + 1)
    gx = gs = gz = None
    if c.moves(0):
        gx = grid.scaled() if 0 in c.wanted else None
        if grid.trained and 1 in c.wanted:
            gs = grid.summed(c.tangent(0), 1, c.shape(scale))
        if grid.trained and grid.has_zero_point and 2 in c.wanted:
            gz = grid.summed(c.tangent(0), 2, c.shape(scale))
    if grid.trained and grid.has_zero_point and (s is not None or z is not None):
        cross = c.once("cross", lambda: _cross(c, grid, scale))
        gs = added(gs, None if z is None else z * cross)
        gz = added(gz, None if s is None else s * cross)
    return gx, gs, gz


def _cross(c: Call, grid: _Grid, scale: int) -> Tensor:
    """``-f^2 sum g (1 - m)`` over the elements of each scale."""
    held = c.primal(scale).clamp(min=grid._grid[4])
    by_zero = grid.summed(c.primal(0)[None], 2, c.shape(scale))[0]  # -f s sum g (1 - m)
    return by_zero * (grid._factor / held)


def _of_forward(c: Call, backward: Any) -> tuple[float, bool]:
    """Gradient factor of a quantizer and whether its scale is trained: the backward of the same call knows."""
    for step in c.program.steps:
        if step.op is backward and step.args[1:3] == c.step.args[:2]:
            names = [a.name for a in backward._schema.arguments]
            return step.args[names.index("factor")], step.args[names.index("need_scale")]
    return 1.0, False


@rule(ops.fake_quantize.default)
def fake_quantize(c: Call):
    return _forward(c, _Grid(c, 0, 0, ops.fake_quantize_jvp, *_of_forward(c, ops.fake_quantize_bwd.default)))


@rule(ops.fake_quantize_bwd.default, unmoved=(1,))
def fake_quantize_backward(c: Call):
    return _backward(c, _Grid(c, 1, 0, ops.fake_quantize_jvp, *c.step.args[-2:]), 2)


@rule(ops.fake_quantize_absmax.default)
def fake_quantize_absmax(c: Call):
    grid = [c.primal(i) for i in range(1, 7)]
    x = c.primal(0)
    return c.scaled(
        0, (c.place(), "m"), lambda: ops.fake_quantize_bwd(torch.ones_like(x), x, c.out[1], None, *grid, 1.0, False)[0]
    ), None


@rule(ops.general_quantize.default)
def general_quantize(c: Call):
    return _forward(c, _Grid(c, 0, 3, ops.general_quantize_jvp, *_of_forward(c, ops.general_quantize_bwd.default)))


@rule(ops.general_quantize_bwd.default, unmoved=(1,))
def general_quantize_backward(c: Call):
    # The EWGS factor depends on the sign of g and is held constant, as everything of second order does.
    return *_backward(c, _Grid(c, 1, 3, ops.general_quantize_jvp, *c.step.args[-3:-1]), 2), None

# SPDX-License-Identifier: Apache-2.0
"""The descent family in plain PyTorch, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastflat._ops.descent import FLAGS, HYPER, ROW, RULES
from fastflat.backends.reference import _elementary
from fastflat.backends.reference._lists import Writer, computed, kept, rounded

_LARGEST = torch.finfo(torch.float64).max


def _whole_power(base: Tensor, exponent: Tensor) -> Tensor:
    """base^exponent for whole exponents, by squaring."""
    result = torch.ones_like(base)
    for _ in range(63):
        result = torch.where((exponent & 1) == 1, result * base, result)
        exponent = exponent >> 1
        base = torch.where(exponent > 0, base * base, base)
    return result


def descent_rows_(
    hyper: Tensor,
    group: Tensor,
    steps: Tensor,
    mix: Tensor,
    of_gradients: Tensor | None,
    of_weights: Tensor | None,
    rule: int,
) -> Tensor:
    h = dict(zip(HYPER, hyper[group].unbind(1), strict=True))
    c1, c2, skipped = mix.unbind()
    skip = skipped != 0
    steps.add_((~skip).to(steps.dtype))
    sgd = rule in (RULES["sgd"], RULES["lars"])
    one = torch.ones_like(h["lr"])
    sign = torch.where(h["ascend"] != 0, -one, one)
    decoupled = h["decoupled"] != 0
    count = steps.to(torch.int64)
    bias1, bias2 = 1.0 - _whole_power(h["beta1"], count), 1.0 - _whole_power(h["beta2"], count)
    r = {
        "c1": sign * c1,
        "c2": sign * c2,
        "rate": h["lr"],
        "beta1": h["beta1"],
        "gain1": 1.0 - (h["beta2"] if sgd else h["beta1"]),
        "beta2": h["beta2"],
        "gain2": 1.0 - h["beta2"],
        "root": one if sgd or rule == RULES["padam"] else _elementary.sqrt(bias2),
        "unbias": one if sgd else 1.0 / bias1,
        "eps": h["eps"],
        "decay": torch.where(decoupled, torch.zeros_like(one), h["decay"]),
        "shrink": torch.where(decoupled, 1.0 - h["lr"] * h["decay"], one),
        "power": 2.0 * h["partial"],
        "gain": one,
        "average": h["average"],
    }
    if rule == RULES["adam"]:
        r["rate"] = h["lr"] / bias1
    if rule == RULES["padam"]:
        r["rate"] = h["lr"] * _elementary.sqrt(bias2) / bias1
    if rule == RULES["lars"]:
        r["gain"], r["rate"] = h["lr"] * _lars_ratio(h, r, c1, c2, of_gradients, of_weights), one
    if rule == RULES["lamb"]:
        r["gain"] = torch.where(h["trust"] == 0, torch.zeros_like(one), one)
    r["flags"] = (
        skip.to(one.dtype) * FLAGS["skip"]
        + (steps <= 1).to(one.dtype) * FLAGS["first"]
        + (h["nesterov"] != 0).to(one.dtype) * FLAGS["nesterov"]
    )
    return torch.stack([r[name] for name in ROW], 1)


def _lars_ratio(h: dict, r: dict, c1: Tensor, c2: Tensor, of_gradients: Tensor, of_weights: Tensor) -> Tensor:
    gg, gf, ff = of_gradients.unbind(1)
    w = _elementary.sqrt(of_weights[:, 0])
    u = _elementary.sqrt((c2 * c2) * gg + (2.0 * (c1 * c2)) * gf + (c1 * c1) * ff)
    ratio = h["trust"] * w / (u + r["decay"] * w + r["eps"])
    return torch.where((w > 0) & (u > 0) & (h["trust"] > 0), ratio, torch.ones_like(ratio))


class _Update:
    """What all updates share: the numbers of a row in the compute type of w, and u."""

    def __init__(self, rows: Tensor, t: int, w: Tensor):
        self.numbers = dict(zip(ROW, rounded(rows[t], w).unbind(), strict=True))
        flags = rows[t, ROW.index("flags")].to(torch.int64)
        self.skip, self.first, self.nesterov = ((flags & bit) != 0 for bit in FLAGS.values())

    def __getattr__(self, name: str) -> Tensor:
        return self.numbers[name]

    def mix(self, g: Tensor, f: Tensor | None, dtype: torch.dtype) -> Tensor:
        second = self.c2 * g.to(dtype)
        return second if f is None else second + self.c1 * f.to(dtype)

    def decayed(self, u: Tensor, w: Tensor) -> Tensor:
        return torch.where(self.decay != 0, u + self.decay * w, u)

    def step(self, w: Tensor, d: Tensor) -> Tensor:
        return self.shrink * w - self.rate * d

    def keep(self, old: Tensor, new: Tensor) -> None:
        """The state `old` takes its new value, unless the row is skipped."""
        old.copy_(torch.where(self.skip, old, new))

    def write(self, writer: Writer, source: Tensor, new: Tensor, w: Tensor, out: Tensor | None, a: Tensor | None):
        if a is not None:
            value = a + self.average * (new - a)
            a.copy_(torch.where(self.skip | (self.average == 0), a, value))
        before = source.clone()
        for to in (w, out):
            if to is not None:
                writer.write(new, to)
                to.copy_(torch.where(self.skip, before.to(to.dtype), to))
        writer.next(w.numel())


def _sources(ws: list[Tensor], backup: Tensor | None, at: list[int]) -> Iterator[tuple[int, Tensor]]:
    """The weights before the ascent, numbered."""
    for t, w in enumerate(ws):
        yield t, w if backup is None else kept(backup, at[t], w)


def _at(tensors: list[Tensor], t: int) -> Tensor | None:
    return tensors[t] if tensors else None


def descent_sgd_(
    ws: list[Tensor],
    outs: list[Tensor],
    backup: Tensor | None,
    at: list[int],
    gs: list[Tensor],
    firsts: list[Tensor],
    momenta: list[Tensor],
    averages: list[Tensor],
    rows: Tensor,
    state: Tensor | None = None,
) -> None:
    writer = Writer(state)
    for t, source in _sources(ws, backup, at):
        w = computed(source)
        row = _Update(rows, t, w)
        u = row.gain * row.decayed(row.mix(gs[t], _at(firsts, t), w.dtype), w)
        d = u
        if momenta:
            m = torch.where(row.first, u, row.beta1 * momenta[t] + row.gain1 * u)
            d = torch.where(row.nesterov, u + row.beta1 * m, m)
            row.keep(momenta[t], m)
        row.write(writer, source, row.step(w, d), ws[t], _at(outs, t), _at(averages, t))


def _moments(row: _Update, u: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return row.beta1 * m + row.gain1 * u, row.beta2 * v + row.gain2 * (u * u)


def descent_adam_(
    ws: list[Tensor],
    outs: list[Tensor],
    backup: Tensor | None,
    at: list[int],
    gs: list[Tensor],
    firsts: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    largest: list[Tensor],
    averages: list[Tensor],
    rows: Tensor,
    padam: bool,
    state: Tensor | None = None,
) -> None:
    writer = Writer(state)
    for t, source in _sources(ws, backup, at):
        w = computed(source)
        row = _Update(rows, t, w)
        u = row.decayed(row.mix(gs[t], _at(firsts, t), w.dtype), w)
        m, v = _moments(row, u, means[t], squares[t])
        x = v
        if largest:
            x = torch.where(largest[t] > v, largest[t], v)
            row.keep(largest[t], x)
        row.keep(means[t], m)
        row.keep(squares[t], v)
        root = _elementary.sqrt(x)
        if padam:
            d = m / _elementary.exp(row.power * _elementary.log(root + row.eps))
        else:
            d = m / (root / row.root + row.eps)
        row.write(writer, source, row.step(w, d), ws[t], _at(outs, t), _at(averages, t))


def _lamb(row: _Update, w: Tensor, m: Tensor, v: Tensor) -> Tensor:
    return row.decayed((m * row.unbias) / (_elementary.sqrt(v) / row.root + row.eps), w)


def descent_lamb_moments_(
    ws: list[Tensor],
    backup: Tensor | None,
    at: list[int],
    gs: list[Tensor],
    firsts: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    rows: Tensor,
) -> Tensor:
    sums = rows.new_zeros((len(gs), 3))
    for t, source in _sources(ws, backup, at):
        w = computed(source)
        row = _Update(rows, t, w)
        m, v = _moments(row, row.mix(gs[t], _at(firsts, t), w.dtype), means[t], squares[t])
        row.keep(means[t], m)
        row.keep(squares[t], v)
        q = _lamb(row, w, means[t], squares[t]).double()
        sums[t, 0], sums[t, 2] = (q * q).sum(), (w.double() * w.double()).sum()
    return sums


def descent_lamb_(
    ws: list[Tensor],
    outs: list[Tensor],
    backup: Tensor | None,
    at: list[int],
    means: list[Tensor],
    squares: list[Tensor],
    averages: list[Tensor],
    rows: Tensor,
    sums: Tensor,
    state: Tensor | None = None,
) -> None:
    ratio = _elementary.sqrt(sums[:, 2]) / _elementary.sqrt(sums[:, 0])
    ratio = torch.where((ratio > 0) & (ratio <= _LARGEST), ratio, torch.ones_like(ratio))
    gain, rate = rows[:, ROW.index("gain")], rows[:, ROW.index("rate")]
    rows = rows.clone()
    rows[:, ROW.index("rate")] = torch.where(gain != 0, rate * ratio, rate)
    writer = Writer(state)
    for t, source in _sources(ws, backup, at):
        w = computed(source)
        row = _Update(rows, t, w)
        new = row.step(w, _lamb(row, w, means[t], squares[t]))
        row.write(writer, source, new, ws[t], _at(outs, t), _at(averages, t))

# SPDX-License-Identifier: Apache-2.0
"""Rows of the descent family: the steps of the optimizers over a list of tensors, restoring perturbed weights."""

from __future__ import annotations

from fastflat._ops._row import Op, size_of

#: Columns of a row of numbers a tensor, and of those of a parameter group; csrc/math/descent.h has the same tables.
ROW = (
    "c1", "c2", "rate", "beta1", "gain1", "beta2", "gain2", "root",
    "unbias", "eps", "decay", "shrink", "power", "gain", "average", "flags",
)  # fmt: skip
HYPER = (
    "lr", "beta1", "beta2", "eps", "decay", "decoupled",
    "nesterov", "partial", "trust", "average", "ascend", "unused",
)  # fmt: skip
FLAGS = {"skip": 1, "first": 2, "nesterov": 4}
RULES = {"sgd": 0, "adam": 1, "padam": 2, "lars": 3, "lamb": 4}


def _fake_rows(hyper, group, steps, mix, of_gradients, of_weights, rule):
    return hyper.new_empty((group.numel(), len(ROW)))


def _fake_in_place(*args):
    return None


def _fake_moments(ws, backup, at, gs, firsts, means, squares, rows):
    return rows.new_empty((len(gs), 3))


def _traffic(ws, outs, *read_and_written, gs=()):
    return size_of(*ws, *ws, *outs, *gs) + 2 * size_of(*(t for ts in read_and_written for t in ts))


_WEIGHTS = "Tensor(a!)[] ws, Tensor(b!)[] outs, Tensor? backup, int[] at"
_GRADIENTS = "Tensor[] gs, Tensor[] firsts"

_COMMON = """The weights before the ascent come from the ``backup`` and its ``at`` of sharpness_ascent_, or are ws
        themselves (``at`` is empty); ``ws`` receive the new ones and ``outs``, if any, their copies in 16 bits for fp32
        w. ``u = c2 g + c1 f`` with ``firsts`` f, else ``u = c2 g``; then ``u + decay w`` where decay is not 0. A row
        with the flag ``skip`` restores w, copies it to out, and changes nothing else. ``averages``, if any, become ``a
        + average (w' - a)``; those of a row with average 0 stay. States and averages are in the compute type; ``rows``
        is fp64 ``[T, 16]``, rounded to the compute type; with ``state`` bfloat16 results are rounded stochastically as
        by sharpness_ascent_."""

ROWS = (
    Op(
        "descent_rows_",
        "descent",
        "(Tensor hyper, Tensor group, Tensor(a!) steps, Tensor mix, Tensor? of_gradients, Tensor? of_weights, int rule)"
        " -> Tensor",
        _fake_rows,
        lambda hyper, group, steps, mix, of_gradients, of_weights, rule: (
            size_of(hyper, group, of_gradients, of_weights) + 2 * size_of(steps) + 8 * len(ROW) * group.numel()
        ),
        """The rows of the other ops, fp64 ``[T, 16]`` with the columns :data:`ROW`: tensor t takes the numbers
        ``hyper[group[t]]`` (fp64 ``[G, 12]``, columns :data:`HYPER`), ``mix`` = ``[c1, c2, skip]`` and its count of
        steps, fp64 ``[T]``, which goes up by one first unless ``mix[2]`` is not 0. ``rule`` numbers :data:`RULES`; lars
        also reads the sums ``{g g, g f, f f}`` and ``{w w, ...}`` of each tensor, both ``[T, 3]``. Powers of the betas
        are taken by squaring: the same bits everywhere.""",
    ),
    Op(
        "descent_sgd_",
        "descent",
        f"({_WEIGHTS}, {_GRADIENTS}, Tensor(c!)[] momenta, Tensor(d!)[] averages, Tensor rows, Tensor? state=None)"
        " -> ()",
        _fake_in_place,
        lambda ws, outs, backup, at, gs, firsts, momenta, averages, rows, state=None: _traffic(
            ws, outs, momenta, averages, gs=(*gs, *firsts)
        ),
        f"""``u' = gain u; m' = beta1 m + gain1 u'`` (u' itself with the flag ``first``); ``d = m'``, or
        ``u' + beta1 m'`` with ``nesterov``, or u' without ``momenta``; ``w' = shrink w - rate d``. SGD, and LARS with
        its ratio in ``gain``. {_COMMON}""",
    ),
    Op(
        "descent_adam_",
        "descent",
        f"({_WEIGHTS}, {_GRADIENTS}, Tensor(c!)[] means, Tensor(d!)[] squares, Tensor(e!)[] largest,"
        " Tensor(f!)[] averages, Tensor rows, bool padam, Tensor? state=None) -> ()",
        _fake_in_place,
        lambda ws, outs, backup, at, gs, firsts, means, squares, largest, averages, rows, padam, state=None: _traffic(
            ws, outs, means, squares, largest, averages, gs=(*gs, *firsts)
        ),
        f"""``m' = beta1 m + gain1 u; v' = beta2 v + gain2 (u u)``; with ``largest``
        ``x' = x > v' ? x : v'``, else ``x' = v'``; ``w' = shrink w - rate m'/(sqrt(x')/root + eps)``, or with ``padam``
        ``w' = shrink w - rate m'/exp(power log(sqrt(x') + eps))``. {_COMMON}""",
    ),
    Op(
        "descent_lamb_moments_",
        "descent",
        f"(Tensor[] ws, Tensor? backup, int[] at, {_GRADIENTS}, Tensor(a!)[] means, Tensor(b!)[] squares, Tensor rows)"
        " -> Tensor",
        _fake_moments,
        lambda ws, backup, at, gs, firsts, means, squares, rows: (
            size_of(*ws, *gs, *firsts) + 2 * size_of(*means, *squares)
        ),
        """First half of LAMB: the moments m' and v' of descent_adam_ from u without weight decay, and the sums
        ``{q q, 0, w w}`` of each tensor, fp64 ``[T, 3]``, of ``q = (m' unbias)/(sqrt(v')/root + eps) + decay w``. A
        row with ``skip`` changes nothing and has the sums of m and v as they are.""",
    ),
    Op(
        "descent_lamb_",
        "descent",
        f"({_WEIGHTS}, Tensor[] means, Tensor[] squares, Tensor(c!)[] averages, Tensor rows, Tensor sums,"
        " Tensor? state=None) -> ()",
        _fake_in_place,
        lambda ws, outs, backup, at, means, squares, averages, rows, sums, state=None: _traffic(
            ws, outs, averages, gs=(*means, *squares)
        ),
        f"""Second half: ``w' = shrink w - r q`` with the q of descent_lamb_moments_ and
        ``r = rate sqrt(w w)/sqrt(q q)`` from its sums; the ratio is 1 where a norm is 0 or not finite, or the row's
        gain is 0. {_COMMON}""",
    ),
)

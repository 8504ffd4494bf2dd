# SPDX-License-Identifier: Apache-2.0
"""Mixed precision: the bit-width of each layer, from its curvature and what rounding does to its weights.

Rounding moves the weights of a layer by ``dW_b``; to second order, with rounding errors that know nothing of the
Hessian's eigenvectors, the loss then rises by half of ``Omega_b = (tr H / n) |dW_b|^2``. The widths that are least in
sum, for a budget of size, of operations or of measured time, are an integer programme that HiGHS solves exactly.

Source: HAWQ-V2 (Dong et al. 2020, arXiv 1911.03852, equations 7 to 9), HAWQ-V3 (Yao et al. 2021, arXiv 2011.10680,
section 3.4).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fastflat import _checks
from fastflat._ops import compute_dtype
from fastflat._spec import QuantSpec
from fastflat.functional import fake_quantize, fake_quantize_dynamic
from fastflat.quant._initial import scale_from

_OP = "fastflat.methods"
Table = Mapping[str, Mapping[int, float]]


@dataclasses.dataclass(frozen=True)
class Allocation:
    """Answer of :func:`allocate_bits`.

    Attributes:
        bits: of each layer; ``fastflat.prepare(model, bits=...)`` takes it.
        score: sum of the chosen scores.
        cost: sum of the chosen costs, at most ``budget``.
        budget: as it was given.
        gap: how far the score may be above the least, relative; 0 where the solver proved it least.
    """

    bits: dict[str, int]
    score: float
    cost: float
    budget: float
    gap: float


@torch.no_grad()
def rounded(w: Tensor, bits: int, spec: QuantSpec | None = None, scale: str = "mse") -> Tensor:
    """``Q_b(W)``: a weight on its grid of so many bits.

    Args:
        w: any shape.
        bits: 1 to 16.
        spec: how it is rounded, the width aside. Default: symmetric, one scale for each output channel (axis 0), as for
            post-training quantization.
        scale: how scales are taken from the weight: ``"mse"``, of least squared error, or ``"absmax"``, the largest
            magnitude on the outermost level. With 2 or 3 bits the difference decides.
    """
    spec = (spec or QuantSpec(bits=8, axis=0, mask="none")).replace(bits=bits)
    spec = spec.replace(axis=None) if w.dim() == 0 else spec
    w = w.detach()
    if scale == "absmax":
        return fake_quantize_dynamic(w, spec=spec)[0]
    if scale != "mse":
        _checks.fail("methods.rounded", "scale", "be 'mse' or 'absmax'", repr(scale))
    found, zero_point = scale_from(w, spec, "mse", "a weight")
    wide = compute_dtype(w.dtype)
    return fake_quantize(w, found.to(wide), zero_point if zero_point is None else zero_point.to(wide), spec=spec)


def rounding_errors(
    weights: Mapping[str, Tensor],
    bits: Sequence[int] = (2, 3, 4, 5, 6, 8),
    spec: QuantSpec | None = None,
    scale: str = "mse",
) -> dict[str, dict[int, float]]:
    """``|Q_b(W) - W|^2`` of each weight for each width.

    Args:
        weights: name -> tensor of any shape.
        bits: widths from 1 to 16.
        spec, scale: as for :func:`rounded`.

    Returns:
        name -> width -> squared error, in fp64.
    """
    return {
        name: {b: float((rounded(w, b, spec, scale).double() - w.detach().double()).square().sum()) for b in bits}
        for name, w in weights.items()
    }


def sensitivities(traces: Mapping[str, float], sizes: Mapping[str, int], errors: Table) -> dict[str, dict[int, float]]:
    """``Omega_b = max(tr H, 0) / n * |dW_b|^2`` of each layer.

    A block of a Hessian may have a negative trace far from a minimum, or by the error of its estimate; it counts as 0,
    for no rounding lowers a loss on purpose.

    Args:
        traces: of the Hessian's (or GGN's) block of each layer.
        sizes: parameters of each layer.
        errors: squared rounding errors, as :func:`rounding_errors` gives them.
    """
    for name in errors:
        if name not in traces or name not in sizes:
            raise ValueError(f"{_OP}.sensitivities: traces and sizes must have every layer of errors, got no {name!r}")
        if not math.isfinite(traces[name]):
            raise ValueError(f"{_OP}.sensitivities: traces must be finite, got {traces[name]} for {name!r}")
    return {
        name: {b: max(float(traces[name]), 0.0) / sizes[name] * error for b, error in of_layer.items()}
        for name, of_layer in errors.items()
    }


def allocate_bits(
    scores: Table, costs: Table, budget: float, *, same: Iterable[Sequence[str]] = (), seconds: float = 60.0
) -> Allocation:
    """The widths of least total score whose total cost keeps within a budget.

    ::

        min sum_l scores[l][b_l]    subject to    sum_l costs[l][b_l] <= budget

    Args:
        scores: layer -> width -> what that choice costs in loss, such as :func:`sensitivities`.
        costs: layer -> width -> bits, bit operations, seconds: any measure; the same layers and widths.
        budget: in the unit of ``costs``.
        same: groups of layers that must have one width, such as those whose results are added.
        seconds: how long the solver may look; its best answer by then comes with its ``gap``.

    Returns:
        The widths, with their score and cost. Among equal scores any may be chosen.

    Raises:
        ValueError: tables that do not match, values that are no finite numbers, or a budget below the cheapest choice.
    """
    _check_tables(scores, costs)
    if not scores:
        return Allocation({}, 0.0, 0.0, float(budget), 0.0)
    least = sum(min(of_layer.values()) for of_layer in costs.values())
    if not budget >= least:
        raise ValueError(f"{_OP}.allocate_bits: budget must be at least the cheapest choice, {least:g}, got {budget:g}")
    # What no other choice could pay for is left out: then no cost is above the budget, however they are scaled.
    spare = {name: max(budget - least, 0.0) + min(of_layer.values()) for name, of_layer in costs.items()}
    choices = [(name, b) for name, of_layer in scores.items() for b in of_layer if costs[name][b] <= spare[name]]
    chosen, gap = _solve(choices, scores, costs, float(budget), _groups(same, scores), seconds)
    bits = dict(chosen)
    score = math.fsum(scores[name][b] for name, b in chosen)
    return Allocation(bits, score, math.fsum(costs[name][b] for name, b in chosen), float(budget), gap)


def _check_tables(scores: Table, costs: Table) -> None:
    for name, of_layer in scores.items():
        if name not in costs or set(costs[name]) != set(of_layer):
            got = sorted(costs[name]) if name in costs else "none"
            raise ValueError(
                f"{_OP}.allocate_bits: costs must have the widths {sorted(of_layer)} for {name!r}, got {got}"
            )
        if not of_layer:
            raise ValueError(f"{_OP}.allocate_bits: scores must have a width for {name!r}, got none")
        for table, of in (("scores", of_layer), ("costs", costs[name])):
            for b, value in of.items():
                if not math.isfinite(value) or value < 0:
                    raise ValueError(
                        f"{_OP}.allocate_bits: {table} must be finite and at least 0, got {value} for {name!r} at {b}"
                    )
    if set(costs) != set(scores):
        extra = sorted(set(costs) - set(scores))
        raise ValueError(f"{_OP}.allocate_bits: costs must have the layers of scores, got {', '.join(extra)} beside")


def _groups(same: Iterable[Sequence[str]], scores: Table) -> list[Sequence[str]]:
    groups = [list(group) for group in same]
    for group in groups:
        for name in group:
            if name not in scores:
                raise ValueError(f"{_OP}.allocate_bits: same must name layers of scores, got {name!r}")
            if set(scores[name]) != set(scores[group[0]]):
                raise ValueError(
                    f"{_OP}.allocate_bits: layers of one group must have the same widths, got"
                    f" {sorted(scores[group[0]])} for {group[0]!r} and {sorted(scores[name])} for {name!r}"
                )
    return groups


def _solve(choices, scores, costs, budget, groups, seconds) -> tuple[list[tuple[str, int]], float]:
    """The choices taken, by HiGHS, and the relative gap to the proven bound."""
    try:
        import numpy as np
        from scipy import optimize, sparse
    except ImportError:
        raise ImportError(f"{_OP}.allocate_bits needs scipy; pip install 'scipy>=1.11'") from None
    at = {choice: i for i, choice in enumerate(choices)}
    rows, columns, values, low, high = [], [], [], [], []

    def constrain(terms: Iterable[tuple[int, float]], lower: float, upper: float) -> None:
        for column, value in terms:
            rows.append(len(low))
            columns.append(column)
            values.append(value)
        low.append(lower)
        high.append(upper)

    for name, of_layer in scores.items():
        constrain([(at[name, b], 1.0) for b in of_layer if (name, b) in at], 1.0, 1.0)
    # HiGHS allows constraints an absolute slack of 1e-6: the budget is 1 there.
    unit = budget if budget > 0 else 1.0
    constrain([(i, costs[name][b] / unit) for (name, b), i in at.items()], -np.inf, budget / unit)
    for group in groups:
        for name in group[1:]:
            for b in scores[name]:
                terms = [(at[layer, b], sign) for layer, sign in ((group[0], 1.0), (name, -1.0)) if (layer, b) in at]
                constrain(terms, 0.0, 0.0)
    # Differences to the best width of a layer are what matters; the largest becomes 1.
    best = {name: min(of_layer.values()) for name, of_layer in scores.items()}
    objective = np.array([scores[name][b] - best[name] for name, b in choices])
    objective /= objective.max() or 1.0
    matrix = sparse.csr_matrix((values, (rows, columns)), shape=(len(low), len(choices)))
    answer = optimize.milp(
        objective,
        integrality=np.ones(len(choices)),
        bounds=optimize.Bounds(0, 1),
        constraints=optimize.LinearConstraint(matrix, low, high),
        options={"time_limit": seconds, "mip_rel_gap": 0.0},
    )
    if answer.x is None:
        raise ValueError(f"{_OP}.allocate_bits: no choice keeps within the budget {budget:g}: {answer.message}")
    chosen = [choice for choice, x in zip(choices, answer.x, strict=True) if x > 0.5]
    return chosen, max(float(answer.mip_gap or 0.0), 0.0)

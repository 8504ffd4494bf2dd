# SPDX-License-Identifier: Apache-2.0
"""Arithmetic that a case does, from the formulas of the op table: additions, multiplications, divisions, comparisons,
selections and roundings of floating-point numbers count one each, and so does exp, log, sqrt, sigmoid or the normal
distribution. Integer work (random bits, casts) and what is formed once a scale, a row or a tensor does not count."""

from __future__ import annotations

from typing import Any

#: Forward, and backward with the values that it forms again, an element: u, clamp, round, times s; mask and residual.
_QUANTIZE, _QUANTIZE_BACK = 5, 11
#: A maximum of magnitudes.
_LARGEST = 2
_GENERAL = {"uniform": 8, "normal": 12, "temper": 13, "bypass": 7, "stochastic": 10, "e4m3": 8, "e2m1": 8}
#: Mask, (d - m u), its product with gy and its sum.
_GENERAL_BACK = 6
_CANDIDATES = 4
_BASES = {"sgd": 4, "adam": 13, "adamw": 14, "padam": 17, "lars": 10, "lamb": 25}
#: Norm and ascent.
_FIRST_PASS = 4
#: Of a tangent, and of the primal once for all tangents.
_TANGENTS = {"gelu": (3, 11), "scale": (3, 0), "scale_grad": (3, 0), "norm": (1, 0), "stats": (3, 0), "apply": (4, 0)}
_ROW_TANGENTS = {"norm": (11, 0), "norm_bwd": (20, 6), "softmax": (4, 0), "cross_entropy": (4, 2)}
#: Forward: log p with its maximum and sum, and the terms of the loss; backward.
_LOGITS = {"kl": (9, 10), "js": (13, 15), "ce": (9, 9), "stats": (6, 0)}
#: Of a step of a scan, half of it for each of the two tensors.
_SCAN = 3
#: Of a copy: a normal draw, its product and sum; with a mask a draw and a choice more. Of a step.
_INPUTS = {"noise": 3 * 12, "noise-masked": 3 * 15, "pgd-linf": 11, "pgd-l2": 14}
#: Sum, magnitude and its sum, code, residual; with levels division, draw and choice; of the largest a sum, a comparison
#: each time that they are counted, and one more.
_COMPRESSORS = {"sign": 7, "qsgd": 12, "terngrad": 12, "topk": 4}
#: Sums, moments, largest; backward.
_WEIGHTS = {"reduce": (10, 11), "saturate": (24, 29)}


def of(case: Any) -> int:
    """Operations of a call.

    Raises:
        KeyError: nothing is declared for the family.
    """
    return round(_OF[case.family](case) * case.elements)


def _quantize(case: Any) -> tuple[float, float]:
    if case.spec is not None and not case.spec.trains_scale:
        return _QUANTIZE + _LARGEST, 0
    return _QUANTIZE, _QUANTIZE_BACK


def _general(case: Any) -> tuple[float, float]:
    if case.spec.group is not None:  # u, clamp, the grid, times s; the mask alone
        return _GENERAL["e4m3"] + _LARGEST, 4
    forward = _GENERAL[case.granularity]
    return forward, forward + _GENERAL_BACK


def _passes(count):
    """Of the two passes those that the case has."""

    def operations(case: Any) -> float:
        forward, backward = count(case)
        return forward + (backward if case.passes == "both" else 0)

    return operations


def _vectors(case: Any) -> float:
    terms = 2 * case.rows
    return {"vectors_dot": terms, "vectors_subtract_": terms + 2, "vectors_rademacher": 1, "vectors_quadratic": 2}[
        case.op
    ]


def _tangents(case: Any) -> float:
    each, once = _TANGENTS[case.work]
    return each + once / case.shape[0]


def _row_tangents(case: Any) -> float:
    each, once = _ROW_TANGENTS[case.granularity.partition("-")[0]]
    return each + once / case.shape[0]


def _logits(case: Any) -> float:
    if case.work == "scan":
        return _SCAN * case.steps
    return _passes(lambda case: _LOGITS[case.work])(case)


_OF = {
    "fake_quantize": _passes(_quantize),
    "fake_quantize_list": _passes(_quantize),
    "general_quantize": _passes(_general),
    "mixquant": _passes(lambda case: (_CANDIDATES * (_QUANTIZE + 2), _CANDIDATES * 15 + 1)),
    "bitplane": _passes(lambda case: (7, 15)),
    "binarize": _passes(lambda case: (4, 8)),
    "liq": _passes(lambda case: (17, 20)),
    "identity": lambda case: 0,
    "sharpness": lambda case: _FIRST_PASS + _BASES[case.base],
    "descent": lambda case: _BASES[case.base],
    "compressors": lambda case: _COMPRESSORS[case.granularity],
    "inputs": lambda case: _INPUTS[case.granularity],
    "weight_norms": _passes(lambda case: _WEIGHTS[case.granularity]),
    "logits": _logits,
    "vectors": _vectors,
    "tangents": _tangents,
    "row_tangents": _row_tangents,
}

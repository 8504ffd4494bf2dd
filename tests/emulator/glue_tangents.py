# SPDX-License-Identifier: Apache-2.0
"""The glue of the tangents family against the reference: the part of :mod:`glue_cases` with tangents."""

import functools

from fastflat.backends import reference
from tests.ops import tangent_cases as cases

SHAPES = ((0, 3, 2), (1, 1, 1), (37, 64, 1), (2, 5, 4), (5, 7, 49), (1, 3, 600))


def compare(call):
    combine, sums = (functools.partial(call, name) for name in ("tangents_combine", "tangents_sums"))
    for dtype in cases.DTYPES:
        for i, shape in enumerate(SHAPES):
            for terms in ("t0 p0:c t1 p1:e f0 f1 shift mask", "f0 shift", "t1 p1:c"):
                arguments = cases.combination(terms, i, shape, dtype)
                cases.check_combine(combine, reference.tangents_combine, arguments)
            arguments = cases.activation(i + 1, "t0 t1" if i < 5 else "t0", i, shape, dtype)
            cases.check_combine(combine, reference.tangents_combine, arguments)
            for terms in cases.SUMS:
                cases.check_sums(sums, reference.tangents_sums, cases.summation(terms, i, shape, dtype))


def refuse(refused):
    for name, arguments, text in cases.REFUSED:
        refused(text, name, *arguments())

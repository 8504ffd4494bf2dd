# SPDX-License-Identifier: Apache-2.0
"""The glue of the vectors family against the reference: the part of :mod:`glue_cases` with rows of vectors."""

import functools

from fastflat.backends import reference
from tests.ops import vector_cases as cases

LENGTHS = (0, 1, 5, 1024, 5001)


def compare(call):
    by_name = {name: functools.partial(call, name) for name in dir(reference) if name.startswith("vectors_")}
    for storage in cases.STORAGES:
        for counts in cases.COUNTS:
            for n in LENGTHS:
                cases.check_dot(by_name["vectors_dot"], reference.vectors_dot, storage, counts, n)
                cases.check_subtract(by_name["vectors_subtract_"], reference.vectors_subtract_, storage, counts, n)
        quadratic = (by_name["vectors_quadratic"], reference.vectors_quadratic, storage)
        for k, n in ((1, 1), (3, 5001), (0, 8), (2, 0)):
            cases.check_quadratic(*quadratic, k, n, cases.starts(n) if n else [0, 0])
        cases.check_quadratic(*quadratic, 2, 40, [7])
    for dtype in cases.DTYPES:
        for k, n in ((0, 3), (1, 1), (3, 5001)):
            cases.check_signs(by_name["vectors_rademacher"], reference.vectors_rademacher, dtype, cases.STATES[1], k, n)


def refuse(refused):
    for name, arguments, text in cases.REFUSED:
        refused(text, name, *arguments())

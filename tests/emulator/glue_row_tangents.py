# SPDX-License-Identifier: Apache-2.0
"""The glue of the row_tangents family against the reference: the part of :mod:`glue_cases` with tangents of rows."""

import functools

from fastflat.backends import reference
from tests.ops import row_tangents_cases as cases


def compare(call):
    for name in cases.OPS:
        for dtype in cases.DTYPES:
            for shape in ((0, 2, 3), (2, 3, 0), (3, 5, 7), (2, 3, 257)):
                cases.check(name, functools.partial(call, name), getattr(reference, name), shape, dtype, every=False)


def refuse(refused):
    for name, arguments, text in cases.REFUSED:
        refused(text, name, *arguments())

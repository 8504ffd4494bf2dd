# SPDX-License-Identifier: Apache-2.0
"""The glue of the weight_norms family against the reference: the part of :mod:`glue_cases` with weights."""

import functools

from tests.ops import weight_norms_cases as cases

NAME = "weight_norms_saturate"


def compare(call):
    for dtype in cases.DTYPES:
        for shape in cases.SHAPES:
            cases.check(NAME, functools.partial(call, NAME), shape, dtype)


def refuse(refused):
    for name, arguments, text in cases.REFUSED:
        if name == NAME:
            refused(text, name, *arguments())

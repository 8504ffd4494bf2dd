# SPDX-License-Identifier: Apache-2.0
"""The glue of the logits family against the reference: the part of :mod:`glue_cases` with rows of logits."""

import functools

from tests.ops import logits_cases as cases


def compare(call):
    for name in cases.OPS[:-1]:
        for dtype in cases.DTYPES:
            for shape in ((2, 0, 3), (3, 5, 7), (1, 3, 257)):
                cases.check(name, functools.partial(call, name), shape, dtype)


def refuse(refused):
    for name, arguments, text in cases.REFUSED:
        if name != "logits_scan":
            refused(text, name, *arguments())

# SPDX-License-Identifier: Apache-2.0
"""The glue of the inputs family against the reference: the part of :mod:`glue_cases` with batches of inputs."""

import functools

from tests.ops import inputs_cases as cases


def compare(call):
    for dtype in cases.DTYPES:
        for shape in cases.SHAPES:
            if shape[0]:
                cases.check("inputs_noise", functools.partial(call, "inputs_noise"), shape, dtype)


def refuse(refused):
    for name, arguments, text in cases.REFUSED:
        refused(text, name, *arguments())

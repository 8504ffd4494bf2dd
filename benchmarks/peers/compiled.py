# SPDX-License-Identifier: Apache-2.0
"""``torch.compile`` of the eager form: one compiled object per case, since a recompile for dynamic shapes is slower."""

from __future__ import annotations

import torch

from . import eager


def lsq(data):
    return _compiled(eager.formula(data), data)


def binarize(data):
    return _compiled(eager.binarize(data), data)


def liq(data):
    return _compiled(eager.liq(data), data)


def _compiled(formula, data):
    if data.x.device.type == "cpu":
        import torch._inductor.config as inductor

        # The number of threads is a constant of the generated code, and has to be part of the cache's key.
        inductor.cpp.threads = torch.get_num_threads()
    torch._dynamo.reset()
    return torch.compile(formula, dynamic=False, fullgraph=True)

# SPDX-License-Identifier: Apache-2.0
"""LSQ as Python code writes it: a chain of PyTorch operations."""

from __future__ import annotations

import dataclasses

from fastflat.quant import eager

from ..cases.mixquant import BITS, mixture


def formula(data):
    """The chain as a function of (x, scale), ready to run or to compile. Groups are rows of a view."""
    spec, factor, dtype = data.case.spec, data.factor, data.x.dtype
    qmin, qmax, group = spec.qmin, spec.qmax, spec.group
    if group is None:
        return lambda x, scale: eager.lsq(x, scale, qmin, qmax, spec.axis, factor).to(dtype)

    def in_groups(x, scale):
        y = eager.lsq(x.view(-1, group), scale.view(-1), qmin, qmax, 0, factor)
        return y.view(x.shape).to(dtype)

    return in_groups


def lsq(data):
    return formula(data)


def mixquant(data):
    """A chain a candidate, added up."""
    spec, scales, weight = data.case.spec, *mixture(data)
    specs = [spec.replace(bits=b) for b in BITS]
    chains = [formula(dataclasses.replace(data, case=dataclasses.replace(data.case, spec=q))) for q in specs]
    return lambda x, scale: sum(w * f(x, scale * s) for w, f, s in zip(weight, chains, scales, strict=True)).to(x.dtype)

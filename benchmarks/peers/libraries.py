# SPDX-License-Identifier: Apache-2.0
"""Other libraries' quantizers, where they are installed (``make peers``): 4 bits per channel, as their users make them.

With a learned scale it is the case's, and gets its gradient. With a scale from the data torchao takes it as a constant,
as fastflat does; Brevitas keeps it in the graph, so that dL/dx has another term where the maximum is. Their scales are
max|w| / 7.5 and / 7; Brevitas leaves out the lowest code.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torchao warns of CUDA extensions that a CPU build of torch lacks."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _module(name: str):
    try:
        with _quiet():
            return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"{name.split('.')[0]} is not installed: make peers") from None


def _per_channel(data) -> bool:
    """Whether the scale is learned; refuses other cases than one scale per channel."""
    if data.case.spec.axis != 0 or data.case.spec.format != "int":
        raise ValueError(f"no form of {data.case.granularity}")
    return data.scale is not None


def torchao(data):
    """``IntxFakeQuantizer``; with a learned scale the function that it runs then."""
    learned = _per_channel(data)
    qat = _module("torchao.quantization.qat")
    if not learned:
        quantizer = qat.IntxFakeQuantizer(qat.IntxFakeQuantizeConfig(torch.int4, "per_channel", is_symmetric=True))
        return lambda x, scale: quantizer(x)
    quantize = _module("torchao.quantization.qat.utils")._fake_quantize_per_channel_group
    rows, columns = data.x.shape
    zero = torch.zeros(rows, 1, dtype=torch.int32, device=data.x.device)
    return lambda x, scale: quantize(x, scale.view(-1, 1), zero, data.case.spec.qmin, data.case.spec.qmax, columns)


def brevitas(data):
    """The quantizer of ``Int8WeightPerChannelFloat`` at 4 bits; with a learned scale its integer part."""
    os.environ.setdefault("BREVITAS_JIT", "0")  # its default
    learned = _per_channel(data)
    layers, quantizers = _module("brevitas.nn"), _module("brevitas.quant")
    rows, columns = data.x.shape
    made_by = quantizers.Int8WeightPerChannelFloat
    layer = layers.QuantLinear(columns, rows, bias=False, weight_quant=made_by, weight_bit_width=4)
    quantizer = layer.to(data.x.device).weight_quant.tensor_quant
    if not learned:
        return lambda x, scale: quantizer(x)[0]
    zero, bits, dtype = torch.zeros((), device=data.x.device), torch.tensor(4.0), data.x.dtype
    return lambda x, scale: quantizer.int_quant(scale.view(-1, 1), zero, bits, x).to(dtype)

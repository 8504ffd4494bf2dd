# SPDX-License-Identifier: Apache-2.0
"""The functions of peer_formulas.py by the installed packages; a missing one skips the test, with its reason."""

from __future__ import annotations

import logging
import os

import pytest
import torch
from torch import Tensor

Results = tuple[Tensor, ...]


def package(name: str):
    """A module of a peer. ``make peers`` installs the versions that were studied."""
    os.environ.setdefault("BREVITAS_JIT", "0")  # its Python code, not the scripted one
    logging.disable(logging.WARNING)  # torchao speaks of CUDA extensions that a CPU build of torch lacks
    try:
        return pytest.importorskip(name, reason=f"{name.split('.')[0]} is not installed: make peers")
    finally:
        logging.disable(logging.NOTSET)


def _with_gradients(function, leaves: list[Tensor], g: Tensor) -> Results:
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in leaves]
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y, [t for t in leaves if t.requires_grad], g)


def torchao(x: Tensor, s: Tensor, z: Tensor, g: Tensor, qmin: int, qmax: int) -> Results:
    primitives = package("torchao.quantization.quant_primitives")
    block = (1, x.shape[1]) if s.dim() else tuple(x.shape)

    def quantize(x, s, z):
        return primitives._fake_quantize_affine(x, block, s, z, torch.int32, qmin, qmax)

    return _with_gradients(quantize, [x, s, z], g)


def brevitas(x: Tensor, s: Tensor, z: Tensor, g: Tensor, qmin: int, qmax: int, straight: bool) -> Results:
    wrappers = package("brevitas.core.function_wrapper")
    clamp = wrappers.TensorClampSte() if straight else wrappers.TensorClamp()
    signed, codes = qmin < 0, qmax - qmin + 1
    narrow = codes % 2 == 1
    quantizer = package("brevitas.core.quant").IntQuant(narrow, signed, wrappers.Identity(), tensor_clamp_impl=clamp)
    bits = torch.tensor(float((codes + narrow).bit_length() - 1))
    return _with_gradients(lambda x, s: quantizer(s, z, bits, x), [x, s], g)


def modelopt(x: Tensor, amax: Tensor, g: Tensor, qmin: int, qmax: int, straight: bool = False) -> Results:
    module = package("modelopt.torch.quantization.tensor_quant")
    unsigned, narrow = qmin == 0, qmin == -qmax
    bits = (qmax + 1).bit_length() - int(unsigned)

    def quantize(x):
        return module.fake_tensor_quant(x, amax, None, bits, unsigned, narrow, None, straight)

    return _with_gradients(quantize, [x], g)


def modelopt_block(x: Tensor, amax: Tensor, g: Tensor, qmin: int, qmax: int) -> Results:
    attributes = package("modelopt.torch.quantization.config").QuantizerAttributeConfig
    module = package("modelopt.torch.quantization.nn.modules.tensor_quantizer")
    quantizer = module.TensorQuantizer(attributes(num_bits=4, block_sizes={-1: x.shape[1], "type": "static"}))
    quantizer.amax = amax
    quantizer = module.StaticBlockScaleQuantizer.from_tensor_quantizer(quantizer)
    quantizer.enable_lsq(quantize_scales=False, learnable_amax=["pre", "post"], tied_amax=True)
    assert (quantizer._quant_max_bound, quantizer._narrow_range) == (qmax, qmin == -qmax)
    x = x.clone().requires_grad_()
    y = quantizer(x)
    dx, da = torch.autograd.grad(y, [x, quantizer._amax_post], g)
    return y.detach(), dx, da.reshape(amax.shape)


def mx(x: Tensor, format: str, rule: str) -> Results:
    package("torchao")
    from torchao.prototype.mx_formats import config, constants, mx_tensor

    kind = {
        "e4m3": torch.float8_e4m3fn,
        "e5m2": torch.float8_e5m2,
        "e3m2": constants.DTYPE_FP6_E3M2,
        "e2m3": constants.DTYPE_FP6_E2M3,
        "e2m1": torch.float4_e2m1fn_x2,
    }[format]
    scale, codes = mx_tensor.to_mx(x, kind, 32, config.ScaleCalculationMode[rule.upper()])
    return mx_tensor.to_dtype(codes, scale, kind, 32, x.dtype), scale.float()


def nvfp4(x: Tensor) -> Results:
    package("torchao")
    from torchao.prototype.mx_formats import kernels, nvfp4_tensor

    outer = nvfp4_tensor.per_tensor_amax_to_scale(x.abs().max())
    held, codes = nvfp4_tensor.nvfp4_quantize(x, 16, outer)
    values = kernels.f4_unpacked_to_f32(kernels.unpack_uint4(codes)).reshape(*held.shape, 16)
    scale = outer * held.float()
    return (values * scale.unsqueeze(-1)).to(x.dtype).reshape(x.shape), scale

# SPDX-License-Identifier: Apache-2.0
"""Triton's weight-normalising quantizer under the interpreter; run by test_triton_interpreter.py."""

import pytest
import torch

from fastflat.backends import reference
from fastflat.triton_kernels import liq as kernels

from .comparison import assert_same_bits, random_data

LAYOUTS = [((), -1), ((1030,), -1), ((5, 3, 7), 1), ((3, 1100), 0), ((0, 4), 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bits", [1, 2, 8])
def test_liq_ops(dtype, bits):
    for seed, (shape, axis) in enumerate(LAYOUTS):
        plain = random_data(shape, dtype, seed, special=False)
        mean, std = kernels.liq_moments(plain, axis)
        for got, want in zip((mean, std), reference.liq_moments(plain, axis)):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
        w, gy = random_data(shape, dtype, seed), random_data(shape, dtype, seed + 50, special=False)
        point = (w, mean, std, torch.tensor(1.3, dtype=mean.dtype), 2**bits - 1, axis, 1e-8)
        assert_same_bits(kernels.liq(*point), reference.liq(*point))
        tclip = torch.tensor(-0.7, dtype=mean.dtype)
        for tangents in ((gy, tclip), (gy, None), (None, tclip)):
            assert_same_bits(kernels.liq_jvp(*tangents, *point), reference.liq_jvp(*tangents, *point))
        (gw, gclip), (wanted_w, wanted_clip) = (f.liq_bwd(gy, *point) for f in (kernels, reference))
        assert_same_bits(gw, wanted_w)
        torch.testing.assert_close(gclip, wanted_clip, rtol=1e-5, atol=1e-4, equal_nan=True)

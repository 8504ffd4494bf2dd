# SPDX-License-Identifier: Apache-2.0
"""Triton's binarization under the interpreter, against the reference; run by test_triton_interpreter.py."""

import pytest
import torch

from fastflat.backends import reference
from fastflat.triton_kernels import binarize as kernels

from .comparison import assert_same_bits, random_data

LAYOUTS = [((), -1, 0), ((1030,), -1, 0), ((5, 3, 7), 1, 0), ((3, 1100), 0, 0), ((6, 32), -1, 8), ((0, 4), 1, 0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("weighed", [False, True])
def test_binarize_ops(dtype, weighed):
    for seed, (shape, axis, group) in enumerate(LAYOUTS):
        x, gy = (random_data(shape, dtype, seed + k, special=False) for k in (0, 50))
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        h = torch.rand(shape, dtype=compute) if weighed else None
        y, alpha = kernels.binarize(x, h, axis, group)
        want = reference.binarize(x, h, axis, group)[1]
        close = {"rtol": 1e-5 if compute == torch.float32 else 1e-12, "atol": 1e-6}
        torch.testing.assert_close(alpha, want, **close)
        assert_same_bits(kernels.binarize(x, h, axis, group)[0], y)
        # Given alpha the rest is a map: the reference at the kernel's alpha.
        rule = (0.8, False, axis, group)
        assert_same_bits(
            kernels.binarize_bwd(gy, None, x, h, alpha, *rule), reference.binarize_bwd(gy, None, x, h, alpha, *rule)
        )
        for through, ga in ((True, None), (True, alpha + 1), (False, alpha + 1)):
            rule = (0.8, through, axis, group)
            low = {"rtol": 2e-2, "atol": 1e-2} if x.element_size() == 2 else close
            torch.testing.assert_close(
                kernels.binarize_bwd(gy, ga, x, h, alpha, *rule),
                reference.binarize_bwd(gy, ga, x, h, alpha, *rule), **low,
            )  # fmt: skip
            got, wanted = (f.binarize_jvp(gy, x, h, alpha, *rule) for f in (kernels, reference))
            torch.testing.assert_close(got[1], wanted[1], **close)
            torch.testing.assert_close(got[0], wanted[0], **low)

# SPDX-License-Identifier: Apache-2.0
"""The row_tangents kernels on more than 2^31 elements, as in :mod:`test_large`: the last row of each tangent must be
what it is by itself."""

import torch

from fastflat.backends import reference
from tests.ops import row_tangents_cases as cases

from .test_large import EDGE, sparse

BF16, STREAM = 1, 0x57
K, R, D = 3, (1 << 20) + 3, 1024


def test_last_rows(emulated):
    emulated.module.set_edge_blocks(EDGE)
    data = cases.Problem((K, 1, D), torch.bfloat16)
    t, g, out = (sparse((K, R, D), torch.bfloat16) for _ in range(3))
    p, grad = (sparse((R, D), torch.bfloat16) for _ in range(2))
    for tensor, values in ((t, data.t), (g, data.g), (p, data.p), (grad, data.grad)):
        tensor[..., -1, :] = values[..., 0, :]
    calls = {
        "row_tangents_softmax": ((t, None, p, None), (data.t, data.p, None, False)),
        "row_tangents_softmax_bwd": ((t, g, p, grad), (data.g, data.t, data.p, data.grad)),
    }
    for name, ((x, of_g, normal, of_grad), small) in calls.items():
        tensors = [x, of_g, None, None, normal, of_grad, None, None, None, None, out, None, None]
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        assert emulated.module.row_tangents(name, BF16, K, R, D, False, addresses, STREAM) == 0
        want = getattr(reference, name)(*small)
        cases.assert_close(out[:, -1:].contiguous(), want, cases.terms(name, small)[0], torch.bfloat16)

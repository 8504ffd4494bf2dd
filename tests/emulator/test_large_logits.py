# SPDX-License-Identifier: Apache-2.0
"""The kernels of the logits and inputs families on more than 2^31 elements, as in :mod:`test_large`: the last rows must
be what they are by themselves."""

import torch

from fastflat.backends import reference
from tests.ops import logits_cases as cases

from .test_large import EDGE, sparse

BF16, STREAM = 1, 0x57
K, R, C = 2, (1 << 20) + 3, 1024


def test_last_rows_of_logits(emulated):
    emulated.module.set_edge_blocks(EDGE)
    small = cases.Problem((K, 1, C), torch.bfloat16)
    z0, out0 = (sparse((R, C), torch.bfloat16) for _ in range(2))
    z, out = (sparse((K, R, C), torch.bfloat16) for _ in range(2))
    z0[-1:], z[:, -1:] = small.z0, small.z
    divergence, norm = torch.zeros(K, R), torch.zeros(K + 1, R, 2)
    g = torch.full((R,), float(small.g[0]))
    tensors = {"z0": z0, "z": z, "g": g, "norm": norm, "divergence": divergence, "out0": out0, "out": out}
    addresses = [tensors[n].data_ptr() if n in tensors else 0 for n in ORDER]
    wanted = reference.logits_divergence(small.z0, small.z, False)
    for name in ("logits_divergence", "logits_divergence_bwd"):
        assert emulated.module.logits(name, BF16, K, R, C, False, 1.0, -100, addresses, STREAM) == 0
    cases.assert_close("kl", divergence[:, -1:].contiguous(), wanted[0], torch.bfloat16)
    found = divergence[:, -1:].contiguous(), norm[:, -1:].contiguous()
    gz0, gz = reference.logits_divergence_bwd(small.g, small.z0, small.z, *found, False)
    assert torch.equal(out0[-1:], gz0)
    assert torch.equal(out[:, -1:], gz)


ORDER = ("z0", "z", "y", "mult", "add", "margin", "weight", "g", "norm", "divergence", "out0", "out", "of_row")


def test_last_copy_of_a_batch(emulated):
    emulated.module.set_edge_blocks(EDGE)
    n, k = (1 << 30) + 7, 3
    x, noisy = sparse((1, n), torch.bfloat16), sparse((k, 1, n), torch.bfloat16)
    x[0, -9:] = torch.arange(9)
    state, sigma = torch.tensor([3, 4]), torch.zeros(k, 1)
    addresses = [t.data_ptr() for t in (x, state, noisy, sigma)]
    assert emulated.module.inputs_noise(BF16, k, 1, n, 1, 0.5, 1.0, *addresses, STREAM) == 0
    per_copy, first = (n + 7) // 8 * 8, (n - 9) // 8 * 8
    for copy in range(k):
        draw = reference.inputs._noise.normal(state, n - first, copy * per_copy + first)[-9:]
        want = (x[0, -9:].float() + (sigma[copy] * 3.4641016) * draw).bfloat16()
        assert torch.equal(noisy[copy, 0, -9:], want)

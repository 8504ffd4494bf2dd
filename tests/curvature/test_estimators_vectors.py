# SPDX-License-Identifier: Apache-2.0
"""The vector primitives against float64."""

import pytest
import torch

from fastflat.curvature import _vectors

from .estimators_fakes import generator


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 4097])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_random_signs(n, dtype):
    V = _vectors.rademacher(50, n, generator(), dtype=dtype)
    assert V.shape == (50, n)
    assert V.dtype == dtype
    assert V.is_contiguous()
    assert torch.equal(V.abs(), torch.ones_like(V))
    if n == 4097:
        assert abs(float(V.mean())) < 4 / (50 * n) ** 0.5
        off = (V @ V.T / n).fill_diagonal_(0)
        assert float(off.abs().max()) < 5 / n**0.5
        assert float((V.T @ V / 50).fill_diagonal_(0).mean().abs()) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("J", "K", "n"), [(1, 1, 1), (3, 2, 5), (40, 8, 70001), (0, 2, 9), (4, 0, 9), (5, 3, 0)])
def test_primitives(J, K, n, dtype):
    Q, W = torch.randn(J, n, dtype=dtype), torch.randn(K, n, dtype=dtype)
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-11}[dtype] * max(n, 1) ** 0.5
    c = _vectors.dots(Q, W)
    assert c.dtype == torch.float64
    assert torch.allclose(c, Q.double() @ W.double().T, atol=tolerance)
    C = torch.randn(J, K, dtype=torch.float64)
    wanted = W.double() - C.T @ Q.double()
    changed = W.clone()
    squares = _vectors.subtract_(changed, Q, C)
    assert torch.allclose(changed.double(), wanted, atol=1e-5)
    assert torch.allclose(squares, changed.double().square().sum(1), rtol=1e-6)
    S = torch.randn(J, min(J, 2), dtype=torch.float64)
    turned = Q.clone()
    _vectors.rotate_(turned, S)
    assert torch.allclose(turned[: S.shape[1]].double(), S.T @ Q.double(), atol=1e-4)
    assert torch.equal(turned[S.shape[1] :], Q[S.shape[1] :])
    slices = [slice(0, n // 3), slice(n // 3, n), slice(0, 0), slice(None)]
    forms = _vectors.quadratic_forms(W, wanted.to(dtype), slices)
    exact = torch.stack([(W.double() * wanted)[:, s].sum(1) for s in slices], 1)
    assert forms.dtype == torch.float64
    assert torch.allclose(forms, exact, atol=10 * tolerance)
    assert torch.equal(forms, _vectors.quadratic_forms(W, wanted.to(dtype), slices))

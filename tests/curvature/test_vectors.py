# SPDX-License-Identifier: Apache-2.0
"""The vector primitives of the estimators over the raw ops."""

import pytest
import torch

from fastflat.backends import backend, unavailable
from fastflat.curvature import _vectors


@pytest.fixture(params=["cpu", "reference"], autouse=True)
def on_backend(request):
    if unavailable(request.param, "cpu"):
        pytest.skip(unavailable(request.param, "cpu"))
    with backend(request.param):
        yield


def draw(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dots_and_subtraction(dtype):
    Q, W = draw(3, 1001, dtype=dtype), draw(2, 1001, dtype=dtype)
    C = _vectors.dots(Q, W)
    torch.testing.assert_close(C, Q.double() @ W.double().T)
    left = W.clone()
    squares = _vectors.subtract_(left, Q, C.mT.contiguous().mT * 0.01)
    torch.testing.assert_close(left.double(), W.double() - 0.01 * C.T @ Q.double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(squares, left.double().square().sum(1))


def test_signs_follow_the_generator():
    first, again = (_vectors.rademacher(2, 300, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert set(first.unique().tolist()) == {-1.0, 1.0}
    assert _vectors.rademacher(1, 5, dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize(
    "slices", [[slice(0, 4), slice(4, 9), slice(9, 50)], [slice(2, 4), slice(4, 4), slice(7, 50)], [slice(3, 7)], []]
)
def test_quadratic_forms(slices):
    V, HV = draw(2, 50), draw(2, 50)
    found = _vectors.quadratic_forms(V, HV, slices)
    wanted = [(V[:, s].double() * HV[:, s].double()).sum(1) for s in slices]
    torch.testing.assert_close(found, torch.stack(wanted, 1) if wanted else torch.zeros(2, 0, dtype=torch.float64))

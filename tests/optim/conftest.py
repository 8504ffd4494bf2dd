# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from fastflat.backends import backend, unavailable


@pytest.fixture(params=["cpu", "reference"])
def on_backend(request):
    """The test on the compiled CPU backend and on the reference."""
    reason = unavailable(request.param, "cpu")
    if reason:
        pytest.skip(reason)
    with backend(request.param):
        yield request.param

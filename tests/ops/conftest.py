# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from fastflat.backends import backend, unavailable


@pytest.fixture
def compiled():
    """The compiled CPU backend; the test is skipped, with the reason, where it was not built."""
    reason = unavailable("cpu", "cpu")
    if reason:
        pytest.skip(reason)
    with backend("cpu"):
        yield


@pytest.fixture(params=["cpu", "reference"])
def on_backend(request):
    """The test on the compiled CPU backend and on the reference."""
    if request.param == "cpu":
        request.getfixturevalue("compiled")
        yield
    else:
        with backend("reference"):
            yield

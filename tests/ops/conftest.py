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

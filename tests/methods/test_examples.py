# SPDX-License-Identifier: Apache-2.0
"""The example in each method's docstring runs."""

import re

import pytest
import torch

from fastflat import methods
from fastflat.methods import _registry


@pytest.mark.parametrize("name", methods.names())
def test_example_runs(name):
    (code,) = re.findall(r"```python\n(.*?)```", _registry.module(name).__doc__, re.DOTALL)
    assert "fastflat" in code
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(compile(code, f"{name}.py", "exec"), {})

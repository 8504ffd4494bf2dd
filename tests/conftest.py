# SPDX-License-Identifier: Apache-2.0
"""Markers: what needs a GPU, Triton or much time is skipped with that reason, and the GPU tests are counted aloud.

Every module is imported and every test runs from one random state, whatever ran before it."""

import importlib.util

import pytest
import torch

_NO_GPU = "needs a GPU"


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes or many gigabytes, too")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    torch.manual_seed(0)
    return (yield)


@pytest.fixture(autouse=True)
def _one_random_state():
    torch.manual_seed(0)


def pytest_collection_modifyitems(config, items):
    absent = {
        "gpu": None if torch.cuda.is_available() else _NO_GPU,
        "triton": None if importlib.util.find_spec("triton") else "needs triton: pip install 'fastflat[triton]'",
        "slow": None if config.getoption("--slow") else "slow: pytest --slow runs it",
    }
    for item in items:
        for marker, reason in absent.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
                break


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter):
    result = yield  # pytest's own summary comes first
    reasons = (report.longrepr[2] for report in terminalreporter.stats.get("skipped", ()) if report.longrepr)
    count = sum(_NO_GPU in reason for reason in reasons)
    terminalreporter.write_line(f"need a GPU: {count} tests did not run")
    return result

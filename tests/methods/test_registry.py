# SPDX-License-Identifier: Apache-2.0
"""Every method's file is whole, and its checks pass."""

import re

import pytest

from fastflat import _ops, methods
from fastflat.cli._config import Config
from fastflat.methods import _registry

NAMES = methods.names()
FAMILIES = {op.family for op in _ops.OPS.values()} | {"curvature"}


def test_numbers_and_public_names_are_unique():
    numbers = [m.number for m in methods.methods()]
    assert len(set(numbers)) == len(numbers)
    assert numbers == sorted(numbers)
    public = [n for exported in _registry._public().values() for n in exported if n != "METHOD"]
    assert len(set(public)) == len(public)
    assert set(public) <= set(dir(methods))


@pytest.mark.parametrize("name", NAMES)
def test_file_is_whole(name):
    module, m = _registry.module(name), methods.get(name)
    assert m.name == name
    assert "METHOD" in module.__all__
    assert len(module.__all__) > 1
    assert all(getattr(methods, public) is getattr(module, public) for public in module.__all__ if public != "METHOD")
    assert re.fullmatch(r"\d{4}\.\d{4,5}", m.arxiv)
    assert f"arXiv {m.arxiv}" in module.__doc__.replace("\n", " ")
    assert m.title
    assert m.authors
    assert 1980 < m.year < 2100
    assert m.claim.endswith(".")
    assert m.experiment.summary.endswith(".")
    assert m.kernels
    assert set(m.kernels) <= FAMILIES
    Config(**m.recipe)
    assert m.hook is None or isinstance(m.hook(), methods.Hook)


@pytest.mark.parametrize("name", NAMES)
def test_experiment_is_whole(name):
    e = methods.get(name).experiment
    assert e.claims
    assert e.full.seeds >= 3
    assert e.full.passes > e.quick.passes
    assert all(values for values in e.grid.values())
    assert not e.figure.labels or len(e.figure.labels) == len(e.figure.metrics)
    assert all(arm.passes > 0 and int(e.quick.passes / arm.passes) > 0 for arm in e.arms)


@pytest.mark.parametrize("name", NAMES)
def test_checks_pass(name):
    checks = list(methods.get(name).check())
    assert len(checks) >= 3
    assert len({c.name for c in checks}) == len(checks)
    assert not [c for c in checks if not c.passed]


@pytest.mark.parametrize(
    ("relation", "got", "passed"),
    [
        ("equal", 1.1, True),
        ("equal", 1.3, False),
        ("equal", float("nan"), False),
        ("at most", 0.0, True),
        ("at most", 1.3, False),
        ("at most", float("nan"), False),
        ("at least", 5.0, True),
        ("at least", 0.7, False),
    ],
)
def test_a_check_can_fail(relation, got, passed):
    assert methods.Check("x", 1.0, got, 0.2, "", relation).passed is passed


def test_unknown_names():
    with pytest.raises(ValueError, match="NAME must be that of a method, got 'samm'; did you mean sam"):
        methods.get("samm")
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        methods.Nothing  # noqa: B018


def test_refused_values():
    with pytest.raises(ValueError, match="relation must be one of"):
        methods.Check("x", 0, 0, 0, "", "near")
    with pytest.raises(ValueError, match="direction must be one of"):
        methods.Claim("m", "a", "b", "bigger")
    with pytest.raises(ValueError, match="kind must be one of"):
        methods.Figure("pie", ())
    e = methods.get("sam").experiment
    with pytest.raises(ValueError, match="a claim must name arms of"):
        methods.Experiment("", e.arms, (methods.Claim("m", "nobody", "sgd"),), e.full, e.quick, e.figure)

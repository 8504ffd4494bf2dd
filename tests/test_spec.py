# SPDX-License-Identifier: Apache-2.0
"""QuantSpec: a value that refuses to contradict itself."""

from __future__ import annotations

import copy
import pickle

import pytest

import fastflat as ff


def test_value_semantics():
    spec = ff.QuantSpec.lsq(4, axis=0)
    assert spec == ff.QuantSpec.lsq(4, axis=0)
    assert hash(spec) == hash(ff.QuantSpec.lsq(4, axis=0))
    assert spec != spec.replace(bits=3)
    for twin in (ff.QuantSpec.from_dict(spec.to_dict()), copy.deepcopy(spec), pickle.loads(pickle.dumps(spec))):
        assert twin == spec
    with pytest.raises(AttributeError):
        spec.bits = 3
    assert all(isinstance(v, (str, int, float, bool, type(None))) for v in spec.to_dict().values())


@pytest.mark.parametrize(
    ("bits", "signed", "narrow", "grid"),
    [
        (1, True, False, (-1, 0)),
        (1, False, False, (0, 1)),
        (4, True, False, (-8, 7)),
        (4, True, True, (-7, 7)),
        (4, False, False, (0, 15)),
        (4, False, True, (0, 14)),
        (16, True, False, (-32768, 32767)),
        (16, False, False, (0, 65535)),
    ],
)
def test_grids(bits, signed, narrow, grid):
    spec = ff.QuantSpec(bits, signed=signed, narrow=narrow)
    assert (spec.qmin, spec.qmax) == grid


@pytest.mark.parametrize(
    ("format", "bits", "ends"),
    [("ternary", 2, (-1, 1)), ("binary", 1, (-1, 1)), ("e4m3", 8, (-448.0, 448.0)), ("e2m3", 6, (-7.5, 7.5))],
)
def test_formats(format, bits, ends):
    spec = ff.QuantSpec(format=format)
    assert (spec.bits, spec.qmin, spec.qmax) == (bits, *ends)
    assert ff.QuantSpec.from_dict(spec.to_dict()) == spec
    assert spec.replace(axis=0).format == format


def test_gradient_factor():
    assert ff.QuantSpec.lsq(4).grad_factor(100, 1) == pytest.approx((100 * 7) ** -0.5)
    assert ff.QuantSpec.lsq(4, axis=0).grad_factor(100, 10) == pytest.approx((100 * 7) ** -0.5)
    assert ff.QuantSpec.lsq(4, axis=0, grad_scale="lsq_channel").grad_factor(100, 10) == pytest.approx(70**-0.5)
    assert ff.QuantSpec.lsq(4, grad_scale=0.25).grad_factor(100, 1) == 0.25
    assert ff.QuantSpec(4).grad_factor(100, 1) == 1.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 0}, "bits must be an integer from 1 to 16, got 0"),
        ({"bits": 17}, "bits must be an integer from 1 to 16, got 17"),
        ({"bits": 4.0}, "bits must be an integer from 1 to 16, got 4.0"),
        ({"bits": True}, "bits must be an integer from 1 to 16, got True"),
        ({"signed": 1}, "signed must be True or False, got 1"),
        ({"bits": 1, "narrow": True}, "narrow must be False with bits=1"),
        ({"axis": 0, "group": 8}, "group must be None when axis is given"),
        ({"axis": 1.5}, "axis must be None or an integer"),
        ({"group": 0}, "group must be None or a positive integer, got 0"),
        ({"rounding": "up"}, "rounding must be one of 'even', 'away', 'stochastic', got 'up'"),
        ({"zero": "inside"}, "zero must be 'outside' when symmetric=True"),
        ({"grad_scale": "lsq"}, "grad_scale must be 'none' with estimator='ste'"),
        ({"estimator": "lsq", "grad_scale": "big"}, "grad_scale must be 'none', 'lsq', 'lsq_channel' or a number"),
        ({"estimator": "lsq", "grad_scale": float("inf")}, "grad_scale must be finite"),
        ({"eps": 0.0}, "eps must be a number of at least"),
        ({"noise": "white"}, "noise must be one of 'none', 'uniform', 'normal', 'temper', 'bypass', got 'white'"),
        ({"noise": "temper", "rounding": "stochastic"}, "rounding must be 'even' or 'away' with noise='temper'"),
        ({"format": "e3m3"}, "format must be one of 'int', 'binary', 'ternary', 'e4m3'"),
        ({"format": "e2m1", "bits": 5}, "bits must be 4 with format='e2m1', got 5; leave it out"),
        ({"format": "binary", "signed": False}, "signed must be True with format='binary'"),
        ({"format": "e4m3", "symmetric": False}, "symmetric must be True with format='e4m3'"),
        ({"compute": "input", "noise": "normal"}, "compute must be 'fp32' with noise or stochastic rounding"),
        ({"compute": "input", "format": "e4m3"}, "compute must be 'fp32' with format='e4m3'"),
        ({"arithmetic": "inverse", "estimator": "lsq"}, "estimator must be 'ste' with arithmetic='inverse'"),
        ({"mask": "absmax"}, "mask must be 'before', 'after' or 'none'"),
        ({"through": "chain", "noise": "uniform"}, "through must be 'exact' with chance"),
        ({"scale_rule": "even"}, "scale_rule must be another with format='int'"),
    ],
)
def test_contradictions_are_one_line(fields, message):
    with pytest.raises(ValueError) as error:
        ff.QuantSpec(**fields)
    assert message in str(error.value)
    assert str(error.value).startswith("QuantSpec: ")
    assert "\n" not in str(error.value)


def test_unknown_fields():
    with pytest.raises(TypeError, match=r"QuantSpec\.replace: no field bitz"):
        ff.QuantSpec().replace(bitz=3)
    with pytest.raises(ValueError, match=r"QuantSpec\.from_dict: unknown field bitz"):
        ff.QuantSpec.from_dict({"bitz": 3})

# SPDX-License-Identifier: Apache-2.0
"""The public functions: one clear line for bad input; values checked on demand; loud fallbacks."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import warnings

import pytest
import torch

import fastflat as ff

SPEC = ff.QuantSpec.lsq(4)
CHANNELS = ff.QuantSpec.lsq(4, axis=0)


def call(x=None, scale=None, zero_point=None, spec=SPEC, **more):
    x = torch.randn(64, 6) if x is None else x
    scale = torch.tensor(0.1) if scale is None else scale
    return ff.fake_quantize(x, scale, zero_point, spec=spec, **more)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": [1.0]}, "x must be a tensor, got list"),
        ({"x": torch.arange(3)}, "x must be float32, bfloat16, float16 or float64, got torch.int64"),
        ({"x": torch.randn(3).cfloat()}, "x must be float32, bfloat16, float16 or float64, got torch.complex64"),
        ({"x": torch.randn(3, 3).to_sparse()}, "x must be a dense tensor, got torch.sparse_coo"),
        ({"scale": 0.1}, "scale must be a tensor, got float; write torch.tensor(0.1)"),
        ({"scale": torch.ones(3)}, "scale must have shape [] (one for the tensor), got [3]"),
        ({"scale": torch.ones(32), "spec": CHANNELS}, "scale must have shape [C=64], got [32]"),
        ({"scale": torch.tensor(1.0, device="meta")}, "scale must be on the device of x (cpu), got meta"),
        ({"scale": torch.tensor(1.0).double()}, "scale must be torch.float32, got torch.float64"),
        ({"scale": torch.tensor(1)}, "scale must be torch.float32, got torch.int64"),
        ({"x": torch.randn(4).half(), "scale": torch.tensor(1.0).bfloat16()}, "torch.float32 or torch.float16, got"),
        ({"spec": None}, "spec must be a QuantSpec, got NoneType"),
        (
            {"spec": SPEC.replace(axis=2), "scale": torch.ones(6)},
            "spec.axis must lie in [-2, 1] for x of shape",
        ),
        ({"spec": SPEC.replace(group=4)}, "spec.group must divide the last axis of x (6), got 4"),
        ({"spec": SPEC.replace(group=3)}, "scale must have shape [64, 2] (groups of 3), got []"),
        ({"x": torch.tensor(1.0), "spec": SPEC.replace(group=1)}, "x must have at least one axis"),
        ({"zero_point": torch.tensor(0.0)}, "zero_point must be None with spec.symmetric=True"),
        ({"zero_point": torch.ones(2), "spec": SPEC.replace(symmetric=False)}, "zero_point must have shape []"),
        ({"zero_point": 3, "spec": SPEC.replace(symmetric=False)}, "zero_point must be a tensor, got int"),
        (
            {"dtype": torch.int8},
            "dtype must be one of torch.float32, torch.bfloat16, torch.float16",
        ),
        (
            {"x": torch.randn(3).half(), "dtype": torch.float32},
            "dtype must be one of torch.float16 for",
        ),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    with pytest.raises((ValueError, TypeError)) as error:
        call(**arguments)
    assert message in str(error.value)
    assert str(error.value).startswith("fastflat::fake_quantize: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (ff.QuantSpec.lsq(4), "spec.estimator must be 'ste'"),
        (ff.QuantSpec(4, symmetric=False), "spec.symmetric must be True"),
    ],
)
def test_dynamic_refuses(spec, message):
    with pytest.raises(ValueError, match=message):
        ff.fake_quantize_dynamic(torch.randn(4), spec=spec)


def test_same_spec_for_many_shapes():
    """The cache of checked calls neither confuses shapes nor grows without end."""
    spec = ff.QuantSpec.lsq(4, axis=0)
    for n in range(1, 600):
        assert ff.fake_quantize(torch.randn(n, 2), torch.ones(n), spec=spec).shape == (n, 2)
    assert len(spec._plans) <= 256
    with pytest.raises(ValueError, match="scale must have shape"):
        ff.fake_quantize(torch.randn(5, 2), torch.ones(4), spec=spec)


def test_backend_switch_is_seen_by_cached_calls():
    spec, x, s = ff.QuantSpec.lsq(4), torch.randn(100), torch.tensor(0.2)
    default = ff.fake_quantize(x, s, spec=spec)
    with ff.backend("reference"):
        assert torch.equal(ff.fake_quantize(x, s, spec=spec), default)
        assert ff.choose("fake_quantize", "cpu")[0] == "reference"
        with pytest.raises(RuntimeError), ff.backend("cuda"):
            ff.fake_quantize(x, s, spec=spec)
    with pytest.raises(ValueError, match=r"fastflat\.backend: name must be one of"), ff.backend("gpu"):
        pass
    assert set(ff.backends()) == {"reference", "cpu", "cuda", "triton"}


def run(program: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


_CALL = """
import torch, fastflat as ff
spec = ff.QuantSpec.lsq(4)
for _ in range(2):
    print(ff.fake_quantize(torch.tensor([0.26]), torch.tensor({scale}), spec=spec).item())
"""


def test_a_missing_library_is_loud_once():
    result = run(_CALL.format(scale=0.1), FASTFLAT_DISABLE_LIBRARIES="cpu,cuda")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["0.30000001192092896"] * 2
    assert result.stderr.count("FallbackWarning: fastflat: cpu tensors are computed by the slow reference") == 1


def test_strict_makes_the_fallback_an_error():
    result = run(_CALL.format(scale=0.1), FASTFLAT_DISABLE_LIBRARIES="cpu,cuda", FASTFLAT_STRICT="1")
    assert result.returncode == 1
    assert "FASTFLAT_STRICT=1 forbids it" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("scale", ["0.0", "-1.0", "float('nan')", "float('inf')"])
def test_values_are_checked_on_demand(scale):
    result = run(_CALL.format(scale=scale), FASTFLAT_CHECK="1")
    assert result.returncode == 1
    assert "fastflat::fake_quantize: scale must be finite and positive, got" in result.stderr.splitlines()[-1]
    assert run(_CALL.format(scale=scale), FASTFLAT_CHECK="0").returncode == 0


@pytest.fixture
def cuda_library_without_steps(monkeypatch):
    """As where a CUDA library is loaded that has kernels of every op but one."""
    module = importlib.import_module("fastflat.backends")
    monkeypatch.setattr(module._ops, "has_kernel", lambda op, device: op != "inputs_pgd_step")
    monkeypatch.setattr(module, "_choose", lambda device, forced: (device, "first choice"))
    monkeypatch.setattr(module, "_announced", set())
    monkeypatch.delenv("FASTFLAT_STRICT", raising=False)
    return module


@pytest.mark.parametrize("installed", [True, False], ids=["triton", "without_triton"])
def test_an_op_without_a_kernel_goes_to_triton_or_says_so(cuda_library_without_steps, monkeypatch, installed):
    backends = cuda_library_without_steps
    monkeypatch.setattr(backends.triton, "unavailable", lambda device: None if installed else "not installed")
    other = "triton" if installed else "reference"
    assert backends.choose("inputs_pgd_step", "cuda") == (other, "the cuda library has no kernel of it")
    assert backends.choose("fake_quantize", "cuda")[0] == "cuda"
    kernels = backends._kernels.__wrapped__("cuda", None)
    if installed:
        assert "triton" in kernels.inputs_pgd_step.__module__
        return
    monkeypatch.setattr(backends.reference, "inputs_pgd_step", lambda *args: args)
    with pytest.warns(ff.FallbackWarning, match="no kernel of inputs_pgd_step: it is computed by the slow reference"):
        assert kernels.inputs_pgd_step(1, 2) == (1, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernels.inputs_pgd_step(1, 2)  # announced once
    monkeypatch.setenv("FASTFLAT_STRICT", "1")
    with pytest.raises(RuntimeError, match="FASTFLAT_STRICT=1 forbids it"):
        kernels.inputs_pgd_step(1, 2)
    with pytest.raises(RuntimeError, match="no kernel of inputs_pgd_step; leave the choice"):
        backends._kernels.__wrapped__("cuda", "cuda").inputs_pgd_step(1, 2)

# SPDX-License-Identifier: Apache-2.0
"""No timing of wrong results."""

import pytest
import torch

import fastflat
from fastflat.backends import kernels as kernels_of

CPU = torch.device("cpu")


def test_the_kernels_in_force_pass(benchmarks):
    assert benchmarks.gate.mistakes(CPU, [torch.float32, torch.bfloat16]) == []


@pytest.mark.parametrize("wrong", ["y", "dx", "dscale"])
def test_a_wrong_kernel_is_seen(benchmarks, monkeypatch, wrong):
    """Wrong by the last bit in one element, or in a sum by more than another order explains."""
    right = benchmarks.gate._passes
    calls = []

    def passes(*arguments):
        y, gx, *gs = (t.clone() for t in right(*arguments))
        calls.append(1)
        if len(calls) % 2 == 0:  # every second call is the one of the kernels in force
            target = {"y": y, "dx": gx}.get(wrong)
            if target is not None:
                target.view(-1)[-1] = torch.nextafter(target.view(-1)[-1], torch.tensor(9.0))
            elif gs:
                gs[0].view(-1)[-1] += 1.0 + gs[0].view(-1)[-1].abs()
        return y, gx, *gs

    monkeypatch.setattr(benchmarks.gate, "_passes", passes)
    found = benchmarks.gate.mistakes(CPU, [torch.float32])
    assert found
    assert all(text.startswith(f"{wrong} of fake_quantize") for text in found)


def test_the_reference_is_asked_apart_from_the_kernels(benchmarks, monkeypatch):
    """A gate that compared a backend with itself would never close."""
    used = []
    right = fastflat.fake_quantize

    def spying(x, *args, **kwargs):
        used.append(fastflat.choose("fake_quantize", "cpu")[0])
        return right(x, *args, **kwargs)

    monkeypatch.setattr(fastflat, "fake_quantize", spying)
    benchmarks.gate.mistakes(CPU, [torch.float32])
    assert set(used[0::2]) == {"reference"}
    assert set(used[1::2]) == {fastflat.choose("fake_quantize", "cpu")[0]}


@pytest.mark.parametrize(
    "op", ["general_quantize", "general_quantize_bwd", "general_quantize_dynamic", "mixquant", "bitplane"]
)
def test_every_family_is_watched(benchmarks, monkeypatch, op):
    """A kernel of another family that is wrong by a bit in one element."""
    kernels = kernels_of("cpu")
    if kernels.backend == "reference":
        pytest.skip("the kernels in force are the reference's")
    right = getattr(kernels, op)

    def wrong(*arguments):
        result = right(*arguments)
        first = result[0] if isinstance(result, tuple) else result
        first.view(-1)[-1] = torch.nextafter(first.view(-1)[-1], torch.tensor(9.0, dtype=first.dtype))
        return result

    monkeypatch.setitem(kernels.__dict__, op, wrong)
    found = benchmarks.gate.mistakes(CPU, [torch.float32])
    assert found
    assert all(text.startswith("dx of" if op.endswith("bwd") else "y of") for text in found)


@pytest.mark.parametrize(("body", "red"), [("assert True", False), ("assert False", True)])
def test_red_tests_are_told(benchmarks, tmp_path, body, red):
    folder = tmp_path / "tests" / "ops"
    folder.mkdir(parents=True)
    file = folder / "test_fake_quantize.py"
    file.write_text(f"def test_it():\n    {body}\n")
    told = benchmarks.gate.tests_are_red(file)
    assert (told is not None) is red
    if red:
        assert "1 failed" in told


def test_steps_of_optimizers_pass(benchmarks):
    assert benchmarks.gate.step_mistakes(CPU, [torch.float32, torch.bfloat16]) == []


@pytest.mark.parametrize(("op", "seen"), [("descent_sgd_", {"sgd", "lars"}), ("descent_lamb_", {"lamb"})])
def test_wrong_steps_are_named(benchmarks, monkeypatch, op, seen):
    """A step that is wrong in one element."""
    kernels = kernels_of("cpu")
    if kernels.backend == "reference":
        pytest.skip("the kernels in force are the reference's")
    right = getattr(kernels, op)

    def wrong(ws, *rest):
        right(ws, *rest)
        ws[0].detach().view(-1)[0].add_(1.0)

    monkeypatch.setitem(kernels.__dict__, op, wrong)
    found = benchmarks.gate.step_mistakes(CPU, [torch.float32])
    assert {text.split(" over ")[1].split(",")[0] for text in found} == seen

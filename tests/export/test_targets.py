# SPDX-License-Identifier: Apache-2.0
"""Every target: out and back, on the demo's network and CREPE-tiny; and what none takes."""

import copy

import pytest
import torch

import fastflat as ff
from fastflat import export
from fastflat.methods.lab.networks import ConvNet
from fastflat.quant import export_codes

from .conftest import BITS, convnet, needing

ENDINGS = needing(*export.TARGETS.values())
GRAPHS = (".onnx", ".pt2")


def other(model):
    """The model with other weights and scales."""
    changed = copy.deepcopy(model)
    for p in changed.parameters():
        p.data.mul_(1.1)
    return changed


def there_and_back(model, path, x):
    files = export.save(model, path, x[:3] if path.suffix in GRAPHS else None)
    assert path in files
    return export.load(path, None if path.suffix in GRAPHS else other(model))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("ending", ENDINGS)
def test_the_demo_network(ending, bits, tmp_path):
    model, x = convnet(bits=BITS[bits])
    before = copy.deepcopy(model.state_dict())
    loaded = there_and_back(model, tmp_path / f"demo{ending}", x)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    found = export.compare(model, loaded, x)
    assert found.codes_equal
    assert set(loaded.codes) == set(export_codes(model))
    again = ff.prepare(ConvNet(1, 28, 10), weights=ff.QuantSpec(), activations=ff.QuantSpec(), bits=loaded.bits)
    assert {r.name: (r.weight_bits, r.activation_bits) for r in ff.quant.summary(again)} == {
        r.name: (r.weight_bits, r.activation_bits) for r in ff.quant.summary(model)
    }
    if ending == ".onnx":
        # Sums in another order: a code may differ where they lie at a border, and few do.
        assert found.code_steps <= 1
        assert found.code_share < 1e-4
        assert found.output < (1e-5 if found.code_steps == 0 else 0.02)
    else:
        assert found.output == 0


@pytest.mark.parametrize("ending", ENDINGS)
def test_crepe_tiny(ending, crepe, tmp_path):
    model, x = crepe
    loaded = there_and_back(model, tmp_path / f"crepe{ending}", x)
    found = export.compare(model, loaded, x)
    assert found.codes_equal
    if ending == ".onnx":
        assert found.code_steps <= 1
        assert found.code_share < 1e-4
        assert found.output < (1e-4 if found.code_steps == 0 else 0.1)
        assert torch.equal(model(x).argmax(1), loaded(x).argmax(1))
    else:
        assert found.output == 0


def test_a_session_of_ones_own(tmp_path):
    ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'fastflat[export]'")
    model, x = convnet(bits=BITS["w8a8"])
    export.save(model, tmp_path / "demo.onnx", x)
    session = ort.InferenceSession(tmp_path / "demo.onnx", providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert given.shape == ["batch", 1, 28, 28]
    (y,) = session.run(None, {given.name: x.numpy()})
    torch.testing.assert_close(torch.tensor(y), model(x), rtol=0, atol=2e-3)

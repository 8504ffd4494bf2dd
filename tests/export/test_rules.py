# SPDX-License-Identifier: Apache-2.0
"""Grids and layers, one by one: the codes in a graph are those of the spec, ties and ends included."""

import pytest
import torch
from torch import nn

import fastflat as ff
from fastflat import export
from fastflat.quant import QuantConv1d, QuantLinear

onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install 'fastflat[export]'")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'fastflat[export]'")

#: Activations: the spec, and the ONNX type of its codes with opsets 21 and 25.
ACTIVATIONS = {
    "tensor": (ff.QuantSpec(bits=4), ("INT4", "INT4")),
    "unsigned": (ff.QuantSpec(bits=4, signed=False), ("UINT4", "UINT4")),
    "2 bits": (ff.QuantSpec(bits=2, signed=False), ("UINT4", "UINT2")),
    "1 bit": (ff.QuantSpec(bits=1), ("INT4", "INT2")),
    "narrow": (ff.QuantSpec(bits=4, narrow=True), ("INT4", "INT4")),
    "5 bits": (ff.QuantSpec(bits=5, axis=1), ("INT8", "INT8")),
    "channels": (ff.QuantSpec(bits=8, signed=False, axis=1), ("UINT8", "UINT8")),
    "channels from the end": (ff.QuantSpec(bits=3, axis=-2), ("INT4", "INT4")),
    "affine": (ff.QuantSpec(bits=4, signed=False, symmetric=False), ("UINT4", "UINT4")),
    "affine, narrow grid": (ff.QuantSpec(bits=3, signed=False, symmetric=False, axis=1), ("UINT4", "UINT4")),
    "signed affine": (ff.QuantSpec(bits=8, symmetric=False), ("UINT8", "UINT8")),
    "torch": (ff.QuantSpec.torch(bits=8, signed=False), ("UINT8", "UINT8")),
    "12 bits": (ff.QuantSpec(bits=12), ("INT16", "INT16")),
    "16 bits": (ff.QuantSpec(bits=16, signed=False), ("UINT16", "UINT16")),
    "rectified": (ff.QuantSpec(bits=4, rectified=True), ("INT4", "INT4")),
    "rectified, affine": (ff.QuantSpec(bits=3, rectified=True, signed=False, symmetric=False), ("UINT4", "UINT4")),
    "learned": (ff.QuantSpec.lsq(bits=4, scale_is="log2"), ("INT4", "INT4")),
    "noise": (ff.QuantSpec.lsq(bits=4, noise="uniform"), ("INT4", "INT4")),
}
WEIGHTS = {
    "tensor": (ff.QuantSpec(bits=4), "INT4"),
    "channels": (ff.QuantSpec(bits=8, axis=0), "INT8"),
    "inputs": (ff.QuantSpec(bits=3, axis=1, narrow=True), "INT4"),
    "groups": (ff.QuantSpec(bits=4, group=4), "INT4"),
    "affine groups": (ff.QuantSpec(bits=4, group=4, signed=False, symmetric=False), "UINT4"),
    "away": (ff.QuantSpec(bits=6, axis=0, rounding="away"), "INT8"),
    "16 bits": (ff.QuantSpec(bits=16, axis=0), "INT16"),
}


def kinds_in(path):
    """Names of the types of codes: of the initializers by name, of quantized values by the name of their scale."""
    graph = onnx.load(path).graph
    name = onnx.TensorProto.DataType.Name
    found = {v.name: name(v.data_type) for v in graph.initializer}
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            typed = [a.i for a in node.attribute if a.name == "output_dtype"]
            found[node.input[1]] = name(typed[0]) if typed else found[node.input[2]]
    return found


def ties(spec, shape=(2, 3, 64)):
    """(data, scale): multiples of half a step, over both ends of the grid, where the step is a power of two."""
    steps = torch.randint(2 * (spec.qmin - 4), 2 * (spec.qmax + 5), shape, generator=torch.Generator().manual_seed(0))
    channels = 1 if spec.axis is None else 3
    scale = 2.0 ** -torch.arange(2, 2 + channels).float()
    return steps / 2 * (scale.view(-1, 1) if spec.axis is not None else scale), scale


class Each(nn.Module):
    """Layers side by side, each on its input."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, *inputs):
        return [layer(x) for layer, x in zip(self.layers, inputs)]


@pytest.mark.parametrize("opset", [21, 25])
def test_activations(opset, tmp_path):
    chosen = {name: each for name, each in ACTIVATIONS.items() if opset == 21 or each[1][0] != each[1][1]}
    inputs, layers = [], []
    for spec, _ in chosen.values():
        x, scale = ties(spec)
        layer = QuantConv1d.from_float(nn.Conv1d(3, 4, 1), None, spec)
        scale = scale if spec.axis is not None else scale[0]
        zero_point = None if spec.symmetric else torch.full_like(scale, (spec.qmin + spec.qmax) // 2 + 1)
        layer.input_quantizer.set_scale(scale.log2() if spec.scale_is == "log2" else scale, zero_point)
        inputs.append(x)
        layers.append(layer)
    model, path = Each(layers).eval(), tmp_path / "a.onnx"
    export.save(model, path, inputs, opset=opset)
    values, kinds = export.load(path).values(*inputs), kinds_in(path)
    clipped = {node.output[0].rpartition(".")[0] for node in onnx.load(path).graph.node if node.op_type == "Min"}
    for i, (name, (spec, wanted)) in enumerate(chosen.items()):
        place, kind = f"layers.{i}.input_quantizer", wanted[opset == 25]
        assert torch.equal(values[place], layers[i].input_quantizer(inputs[i])), name
        assert kinds[f"{place}.scale"] == kind, name
        assert (place in clipped) == (spec.bits < int(kind.rpartition("T")[2]) or spec.narrow), name
    if opset == 21:
        export.save(model, tmp_path / "a.pt2", inputs)
        assert all(map(torch.equal, export.load(tmp_path / "a.pt2")(*inputs), model(*inputs)))


def test_weights(tmp_path):
    torch.manual_seed(0)
    model = Each(QuantLinear.from_float(nn.Linear(12, 7), spec) for spec, _ in WEIGHTS.values())
    inputs = [torch.randn(5, 12) for _ in WEIGHTS]
    for ending in (".onnx", ".pt2"):
        path = tmp_path / f"w{ending}"
        export.save(model, path, inputs)
        found = export.compare(model, export.load(path), *inputs)
        assert found.codes_equal
        assert found.output < (1e-5 if ending == ".onnx" else 1e-30)
    kinds = kinds_in(tmp_path / "w.onnx")
    assert [kinds[f"layers.{i}.weight"] for i in range(len(WEIGHTS))] == [kind for _, kind in WEIGHTS.values()]


class Words(nn.Module):
    """Everything else that is quantized: a table, transposed and 1-d convolutions, attention."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose1d(8, 8, 2, stride=2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, 3)

    def forward(self, indices):
        x = self.up(self.conv(self.table(indices).transpose(1, 2))).transpose(1, 2)
        return self.fc(self.attention(x, x, x, need_weights=False)[0])


def test_other_layers(tmp_path):
    torch.manual_seed(0)
    weights, activations = ff.QuantSpec(bits=4, axis=0), ff.QuantSpec(bits=8)
    model = ff.prepare(Words(), weights=weights, activations=activations, fuse_weights=True)
    indices = torch.randint(0, 9, (4, 6))
    ff.calibrate(model, [indices]).eval()
    for ending in (".onnx", ".pt2"):
        export.save(model, tmp_path / f"words{ending}", indices)
        loaded = export.load(tmp_path / f"words{ending}")
        found = export.compare(model, loaded, torch.randint(0, 9, (7, 6)))
        assert found.codes_equal
        assert found.output < (1e-5 if ending == ".onnx" else 1e-30)
        assert len(loaded.codes) == 6


def test_recurrent_layers_run_as_a_program(tmp_path):
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(5, 6, num_layers=2, bidirectional=True)

        def forward(self, x):
            return self.lstm(x)[0]

    torch.manual_seed(0)
    model = ff.prepare(Tagger(), weights=ff.QuantSpec(bits=4, axis=0)).eval()
    x = torch.randn(7, 3, 5)
    export.save(model, tmp_path / "lstm.pt2", x, dynamic_batch=False)
    loaded = export.load(tmp_path / "lstm.pt2")
    assert export.compare(model, loaded, x) == export.Comparison(True, 0.0)


def test_shared_layers_and_a_bare_quantizer(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 6)
            self.b = self.a
            self.out = ff.quant.Quantizer(ff.QuantSpec(bits=8))

        def forward(self, x):
            return self.out(self.b(torch.relu(self.a(x))))

    torch.manual_seed(0)
    model = ff.prepare(Twice(), weights=ff.QuantSpec(bits=4), activations=ff.QuantSpec(bits=8))
    x = torch.randn(5, 6)
    ff.calibrate(model, [x]).eval()
    for ending in (".onnx", ".pt2"):
        export.save(model, tmp_path / f"twice{ending}", x)
        loaded = export.load(tmp_path / f"twice{ending}")
        step = float(model.out.scale)
        assert float((loaded(x) - model(x)).abs().max()) < 1.01 * step
        assert len(loaded.codes) == 1

# SPDX-License-Identifier: Apache-2.0
"""An exported ONNX file, run by onnxruntime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastflat import _checks
from fastflat.export._loaded import Loaded, codes_of


def load(path: Path) -> Loaded:
    """A session of a file, and its codes."""
    import onnx

    try:
        proto = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf raises many kinds for a broken file
        _checks.fail("export.load", str(path), "be a whole ONNX file", _checks.first_line(error))
    note = next((p.value for p in proto.metadata_props if p.key == "fastflat"), None)
    if note is None:
        _checks.fail("export.load", str(path), "be written by fastflat.export", "a file without its description")
    about, held = json.loads(note), {value.name: value for value in proto.graph.initializer}

    def tensor(name: str) -> Tensor:
        if name not in held:
            _checks.fail("export.load", str(path), f"hold {name}", "no such tensor")
        return _tensor(held[name])

    def parts(name: str) -> tuple[Tensor, Tensor, Tensor | None]:
        zero_point = f"{name}.zero_point"
        return tensor(name), tensor(f"{name}.scale"), tensor(zero_point) if zero_point in held else None

    codes = codes_of(about, parts)
    run = _Session(path, proto)

    def values(*inputs: Tensor) -> dict[str, Tensor]:
        scales = {f"{name}.scale": name for name in about["activations"]}
        nodes = [node for node in proto.graph.node if node.op_type == "DequantizeLinear" and node.input[1] in scales]
        names = {node.output[0]: scales[node.input[1]] for node in nodes}
        shown = onnx.ModelProto()
        shown.CopyFrom(proto)
        there = {output.name for output in shown.graph.output}
        shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in there)
        session = _Session(path, shown)
        return {names[key]: value for key, value in session.all(*inputs).items() if key in names}

    return Loaded(path, about, codes, run, values=values)


class _Session:
    """A call of an ONNX model on the CPU."""

    def __init__(self, path: Path, proto: Any) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # The graph as it is written: rewriting to integer kernels moves results by more than sums in another order do.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.enable_mem_reuse = False  # before 1.31, 4-bit values are overwritten otherwise
        try:
            self._session = onnxruntime.InferenceSession(
                proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime has classes of its own
            _checks.fail("export.load", str(path), "be run by onnxruntime", _checks.first_line(error))
        self._outputs = len(proto.graph.output)

    def all(self, *inputs: Tensor) -> dict[str, Tensor]:
        """All outputs by name."""
        names = [given.name for given in self._session.get_inputs()]
        if len(inputs) != len(names):
            _checks.fail("export.load", "inputs", f"be {len(names)} tensors", len(inputs))
        fed = {name: x.detach().cpu().numpy() for name, x in zip(names, inputs, strict=True)}
        given = [output.name for output in self._session.get_outputs()]
        # Copies: the session may own the memory.
        return {name: torch.tensor(value) for name, value in zip(given, self._session.run(None, fed), strict=True)}

    def __call__(self, *inputs: Tensor) -> Any:
        found = tuple(self.all(*inputs).values())
        return found[0] if len(found) == 1 else found


def _tensor(value: Any) -> Tensor:
    """An initializer as fp32 or as int32, which hold all types of codes."""
    import onnx

    array = onnx.numpy_helper.to_array(value)
    kind = "float32" if value.data_type == onnx.TensorProto.FLOAT else "int32"
    return torch.from_numpy(array.astype(kind))

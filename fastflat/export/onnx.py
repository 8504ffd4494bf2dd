# SPDX-License-Identifier: Apache-2.0
"""ONNX: QuantizeLinear and DequantizeLinear on the smallest integers that hold a grid."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastflat import _checks
from fastflat._spec import QuantSpec
from fastflat.export import _graph
from fastflat.export._form import Form, Grid, check_float32, replaced
from fastflat.quant import LayerCodes

#: The first opset with 4-bit types, 16-bit codes and blocks, and the first with 2-bit types.
OPSET, OPSET_OF_2_BITS = 21, 25

#: Largest file of one part.
_LIMIT = 2**31 - 1
_DOMAIN = "fastflat"


class _Marked(nn.Module):
    """Stands for a quantizer while the graph is traced: an operator that says which."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        attributes = {"at": self.at}
        return torch.onnx.ops.symbolic(
            f"{_DOMAIN}::Place", (x,), attributes, dtype=torch.float32, shape=x.shape, version=1
        )


def encode(form: Form, inputs: Sequence[Tensor], dynamic_batch: bool, opset: int) -> bytes:
    """The file's content."""
    import onnx
    import onnx_ir as ir

    check_float32(form.model)
    for name, layer in form.model.named_modules():
        if isinstance(layer, nn.RNNBase):
            hint = "; skip it in prepare, or export to torch (.pt2)"
            _checks.fail(f"export({name})", "layer", "be no recurrent one in ONNX", type(layer).__name__, hint)
    about, places = form.about(), []

    def mark(name: str, what: LayerCodes | Grid) -> nn.Module:
        places.append((name, what))
        return _Marked(len(places) - 1)

    program = _graph.trace(replaced(form, mark, mark), inputs, dynamic_batch)
    try:
        with _graph.quietly():
            made = torch.onnx.export(program, dynamo=True, opset_version=opset, verbose=False).model
    except Exception as error:  # the exporter raises many kinds
        _checks.fail("export", "model", "be translated by torch.onnx", _checks.first_line(error.__cause__ or error))
    constants: dict[str, Any] = {}
    for count, node in enumerate(list(made.graph)):
        if node.domain == _DOMAIN:
            name, what = places[node.attributes["at"].as_int()]
            write = _weight if isinstance(what, LayerCodes) else _activation
            nodes = write(ir, name, what, node, constants, opset)
            for each in nodes:  # a quantizer that is called twice has nodes of both calls
                each.name = each.outputs[0].name = f"{each.name}_{count}"
            ir.convenience.replace_nodes_and_values(made.graph, node, [node], nodes, node.outputs, nodes[-1].outputs)
    used = {id(v) for node in made.graph for v in node.inputs if v is not None}
    for name, value in list(made.graph.initializers.items()):
        if id(value) not in used:
            del made.graph.initializers[name]
    for value in constants.values():
        made.graph.register_initializer(value)
    if dynamic_batch:
        _name_batch(ir, made.graph)
    for node in made.graph:  # the exporter's notes hold source lines and paths of this machine
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*made.graph.inputs, *made.graph.initializers.values()):
        value.metadata_props.clear()
    made.graph.metadata_props.clear()
    made.metadata_props.clear()
    made.opset_imports.pop(_DOMAIN, None)
    made.ir_version = max(made.ir_version, onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)]))
    made.metadata_props["fastflat"] = json.dumps(about)
    proto = ir.to_proto(made)
    if proto.ByteSize() > _LIMIT:
        _checks.fail("export", "model", "take less than 2 GB in ONNX", f"{proto.ByteSize()} bytes")
    onnx.checker.check_model(proto)
    return proto.SerializeToString()


def _name_batch(ir, graph) -> None:
    """Call the first axis of the inputs "batch" wherever it occurs."""
    firsts = {value.shape[0].value for value in graph.inputs if value.shape and not isinstance(value.shape[0], int)}
    for value in (*graph.inputs, *graph.outputs, *(output for node in graph for output in node.outputs)):
        for axis, size in enumerate(value.shape or ()):
            if not isinstance(size, int) and size.value in firsts:
                value.shape[axis] = ir.SymbolicDim("batch")


def kind(spec: QuantSpec, opset: int) -> str:
    """Name of the smallest ONNX type that holds a grid: INT4, UINT8, ..."""
    widths = (2, 4, 8, 16) if opset >= OPSET_OF_2_BITS else (4, 8, 16)
    return f"{'' if spec.signed else 'U'}INT{next(w for w in widths if w >= spec.bits)}"


def _ends(name: str) -> tuple[int, int]:
    bits = int(name.rpartition("T")[2])
    return (0, 2**bits - 1) if name[0] == "U" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _constant(ir, constants: dict[str, Any], name: str, value: Tensor, type_name: str = "FLOAT"):
    """An initializer of a tensor of numbers that its type holds."""
    if name not in constants:
        dtype = getattr(ir.DataType, type_name)
        held = ir.tensor(value.detach().to(torch.float32 if type_name == "FLOAT" else torch.int32).numpy())
        if dtype != held.dtype:
            held = ir.Tensor(held.numpy().astype(dtype.numpy()), dtype=dtype)
        held.name = name
        constants[name] = ir.Value(name=name, shape=held.shape, type=ir.TensorType(dtype), const_value=held)
    return constants[name]


def _parameters(ir, constants, name: str, scale: Tensor, zero_point: Tensor | None, type_name: str) -> list:
    """Scale and zero-point."""
    made = [_constant(ir, constants, f"{name}.scale", scale)]
    if zero_point is not None:
        made.append(_constant(ir, constants, f"{name}.zero_point", zero_point, type_name))
    return made


def _attributes(spec: QuantSpec) -> dict[str, int]:
    if spec.group is not None:
        return {"axis": -1, "block_size": spec.group}
    return {} if spec.axis is None else {"axis": spec.axis}


def _weight(ir, name: str, codes: LayerCodes, node, constants, opset: int) -> list:
    spec = QuantSpec.from_dict(codes.spec)
    z = codes.zero_point
    if z is not None:
        held = z.round().clamp(spec.qmin, spec.qmax)
        if spec.zero in ("float", "outside_float") and not torch.equal(held, z):
            _checks.fail(f"export({name})", "zero_point", "be integers of the grid in ONNX", f"spec.zero={spec.zero!r}")
        z = held
    type_name = kind(spec, opset)
    data = _constant(ir, constants, name, codes.codes, type_name)
    z = torch.zeros_like(codes.scale) if z is None else z
    rest = _parameters(ir, constants, name, codes.scale.clamp(min=spec.eps), z, type_name)
    return [_node(ir, "DequantizeLinear", [data, *rest], f"{name}_dequantized", _attributes(spec), node.outputs[0])]


def _activation(ir, name: str, grid: Grid, node, constants, opset: int) -> list:
    spec, x, y = grid.spec, node.inputs[0], node.outputs[0]
    type_name, z, nodes = kind(spec, opset), grid.zero_point, []
    if spec.rectified:
        nodes.append(_node(ir, "Relu", [x], f"{name}.rectified", {}, y))
        x = nodes[-1].outputs[0]
    wider = (spec.qmin, spec.qmax) != _ends(type_name)
    # onnxruntime 1.32 makes signed 8-bit codes unsigned, and where a zero-point gives the type it leaves that of nodes
    # which its own rewriting has copied: signed codes go without one, those that need one go unsigned.
    if z is not None and spec.signed:
        type_name, z = f"U{type_name}", z + 2 ** (spec.bits - 1)
    parameters = _parameters(ir, constants, name, grid.scale, z, type_name)
    if wider:
        # The type is wider than the grid: a clip before it, whose ends round to the ends of the grid.
        zero = 0 if grid.zero_point is None else grid.zero_point
        ends = [(end - zero) * grid.scale for end in (spec.qmin, spec.qmax)]
        if spec.axis is not None:
            after = -spec.axis - 1 if spec.axis < 0 else len(x.shape) - spec.axis - 1
            ends = [end.reshape(-1, *[1] * after) for end in ends]
        for op, which, end in zip(("Max", "Min"), ("low", "high"), ends, strict=True):
            bound = _constant(ir, constants, f"{name}.{which}", end)
            nodes.append(_node(ir, op, [x, bound], f"{name}.{op.lower()}", {}, y))
            x = nodes[-1].outputs[0]
    attributes = _attributes(spec)
    typed = {**attributes, "output_dtype": int(getattr(ir.DataType, type_name))} if z is None else attributes
    q = _node(ir, "QuantizeLinear", [x, *parameters], f"{name}.codes", typed, y, type_name)
    back = _node(ir, "DequantizeLinear", [q.outputs[0], *parameters], f"{name}.values", attributes, y)
    return [*nodes, q, back]


def _node(ir, op: str, inputs: list, name: str, attributes: dict[str, int], like, type_name: str = "FLOAT"):
    output = ir.Value(name=name, shape=like.shape, type=ir.TensorType(getattr(ir.DataType, type_name)))
    made = [ir.AttrInt64(key, value) for key, value in attributes.items()]
    return ir.Node("", op, inputs, made, outputs=[output], name=name)

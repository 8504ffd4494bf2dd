# SPDX-License-Identifier: Apache-2.0
"""Out of the door: prepared models as files of integer codes for other programs, and back.

``save(model, path, inputs)`` writes, ``load(path)`` reads; the ending of the path says what:

======================  ==============================================================================================
``.onnx``               ONNX with QuantizeLinear and DequantizeLinear on the smallest integers that hold each grid
``.pt2``                torch.export: PyTorch's own operators on integer codes; runs without fastflat
``.pt``                 a state_dict whose weights are torchao's integer tensors
``.safetensors``        codes, scales and the rest of the model's tensors, beside ``.bits.json``
======================  ==============================================================================================
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from fastflat import _checks, _files
from fastflat.export import _graph
from fastflat.export._compare import Comparison, compare
from fastflat.export._form import gather
from fastflat.export._loaded import Loaded
from fastflat.export.torchao import to_torchao

__all__ = ["TARGETS", "Comparison", "Loaded", "compare", "load", "save", "to_torchao"]

#: Targets by name: the ending of their files.
TARGETS = {"onnx": ".onnx", "torch": ".pt2", "torchao": ".pt", "safetensors": ".safetensors"}

#: What each target needs to write and to read.
_NEEDS = {
    "onnx": (("onnx", "onnx_ir", "onnxscript"), ("onnx", "onnxruntime")),
    "torch": ((), ()),
    "torchao": (("torchao",), ("torchao",)),
    "safetensors": (("safetensors",), ("safetensors",)),
}


def save(
    model: nn.Module,
    path: str | Path,
    inputs: Tensor | Sequence[Tensor] | None = None,
    *,
    dynamic_batch: bool = True,
    opset: int = 21,
) -> list[Path]:
    """Write a prepared model, in evaluation mode, to a file that other programs read.

    Weights go out as integer codes: ``codes`` of :func:`fastflat.quant.export_codes`, whose dequantized values equal
    the model's quantized weights in every bit. What a target cannot express is refused before anything is written:
    number formats other than ``"int"``, quantizers without a scale or switched off, zero-points between integers,
    rounding of activations other than to even, operators of fastflat outside quantizers. The model is left as it is.

    * ONNX: activations are QuantizeLinear and DequantizeLinear, weights integer tensors behind DequantizeLinear, per
      tensor, channel or block. Types: INT4 and UINT4 for up to 4 bits, 8 and 16 beyond; with ``opset=25``, INT2 and
      UINT2 for up to 2. A grid narrower than its type gets Max and Min before it, whose ends round to the grid's.
      ``arithmetic="reciprocal"`` and ``zero="inside"`` differ from ONNX's rule at ties, by one code.
    * torch.export: the rule of each spec in PyTorch's operators, so with the same bits of results.
    * torchao: linear layers and 2-d convolutions of up to 8 bits, see :func:`to_torchao`.
    * safetensors: every tensor of the model; ``.bits.json`` is what ``prepare(bits=...)`` takes.

    Inputs are taken as finite: for NaN and infinities the targets have rules of their own.

    Args:
        model: prepared and calibrated; float32 for ONNX and torch.export.
        path: the ending says the target, see :data:`TARGETS`. Its folder exists; a file there is replaced.
        inputs: for ONNX and torch.export, an example input or a tuple of them: shapes and types alone are used.
        dynamic_batch: the first axis of all inputs may have any length.
        opset: of ONNX, 21 or later.

    Returns:
        The files written.

    Raises:
        ImportError: a package that the target needs is missing.
        TypeError, ValueError: the model, its layers or an argument do not fit the target. Nothing is written.
    """
    target, path = _target("export", path), Path(path)
    if path.is_dir() or not path.resolve().parent.is_dir():
        _checks.fail("export", "path", "name a file in an existing folder", path)
    _need(target, 0)
    graph = target in ("onnx", "torch")
    if graph:
        if inputs is None:
            _checks.fail("export", "inputs", f"be an example input of the model for {TARGETS[target]}", None)
        inputs = _graph.examples(inputs)
    form = gather(model)
    if target == "onnx":
        from fastflat.export import onnx

        _opset(opset)
        contents = {"": onnx.encode(form, inputs, dynamic_batch, opset)}
    elif target == "torch":
        from fastflat.export import exported

        contents = {"": exported.encode(form, inputs, dynamic_batch)}
    elif target == "torchao":
        from fastflat.export import torchao

        contents = {"": torchao.encode(form)}
    else:
        from fastflat.export import files

        contents = files.encode(form)
    written = {path.with_suffix(suffix) if suffix else path: content for suffix, content in contents.items()}
    _files.write_all(written)
    return list(written)


def load(path: str | Path, model: nn.Module | None = None) -> Loaded:
    """Read a file of :func:`save`. Nothing is unpickled, and no code in a file is run.

    ONNX runs by onnxruntime, torch.export by PyTorch. Files of tensors run once they are put into a model: `model`,
    prepared as the exported one was (its weights may be any), is changed in place; on an error it is as it was. With
    ``.pt`` its weights become torchao's tensors.

    Returns:
        The model, called as the exported one was, and its codes.

    Raises:
        ImportError: a package that the target needs is missing.
        FileNotFoundError, ValueError: the file is not there, is broken or another's, or does not fit the model.
    """
    target, path = _target("export.load", path), Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"fastflat::export.load: path must be a file, got {str(path)!r}")
    _need(target, 1)
    if model is not None and target in ("onnx", "torch"):
        _checks.fail("export.load", "model", f"be None for {TARGETS[target]}, which has its own", type(model).__name__)
    if target == "onnx":
        from fastflat.export import _onnx_load

        return _onnx_load.load(path)
    if target == "torch":
        from fastflat.export import exported

        return exported.load(path)
    if target == "torchao":
        from fastflat.export import torchao

        return torchao.load(path, model)
    from fastflat.export import files

    return files.load(path, model)


def _target(op: str, path: str | Path) -> str:
    suffix = Path(path).suffix
    found = next((name for name, ending in TARGETS.items() if ending == suffix), None)
    if found is None:
        endings = ", ".join(f"{ending} ({name})" for name, ending in TARGETS.items())
        _checks.fail(op, "path", f"end in one of {endings}", repr(str(path)))
    return found


def _need(target: str, side: int) -> None:
    for package in _NEEDS[target][side]:
        if importlib.util.find_spec(package) is None:
            extra = "torchao" if target == "torchao" else "'fastflat[export]'"
            raise ImportError(f"fastflat::export: {TARGETS[target]} needs {package}; pip install {extra}")


def _opset(opset: int) -> None:
    from onnx.defs import onnx_opset_version

    if isinstance(opset, bool) or not isinstance(opset, int) or not 21 <= opset <= onnx_opset_version():
        want = f"be an integer from 21 (4-bit types) to {onnx_opset_version()}, the newest of the onnx installed"
        _checks.fail("export", "opset", want, repr(opset))

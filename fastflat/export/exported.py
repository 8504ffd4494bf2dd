# SPDX-License-Identifier: Apache-2.0
"""torch.export: a program of PyTorch's own operators on integer codes, which runs where fastflat is not installed."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastflat import _checks
from fastflat.export import _graph
from fastflat.export._form import Form, check_float32, replaced
from fastflat.export._loaded import Loaded, codes_of

_NOTE = "fastflat.json"
#: What an expression of a shape may consist of: PyTorch evaluates these strings when it loads a program.
_WORD = r"Symbol|Integer|Add|Mul|Pow|FloorDiv|CeilDiv|Mod|PythonMod|Max|Min|True|False|positive|integer|[suz]\d+|\d+"
_EXPRESSION = re.compile(rf"(?:'[suz]\d+'|\b(?:{_WORD})\b|[ +\-*/(),=])*")
#: Parts of a program's archive that hold pickles or compiled code.
_REFUSED = re.compile(r"/(?:aotinductor|executorch)/|/(?:custom_obj|opaque_obj)_|/(?:weights|constants)/[^/]*\.pt$")


def encode(form: Form, inputs: Sequence[Tensor], dynamic_batch: bool) -> bytes:
    """The file's content."""
    check_float32(form.model)
    about = form.about()
    model = replaced(form, lambda _, codes: _graph.WeightCodes(codes), lambda _, grid: _graph.ActivationGrid(grid))
    program = _graph.trace(model, inputs, dynamic_batch)
    file = io.BytesIO()
    with _graph.quietly():
        torch.export.save(program, file, extra_files={_NOTE: json.dumps(about)})
    return file.getvalue()


def load(path: Path) -> Loaded:
    """The program of a file and its codes."""
    _check(path)
    extra = {_NOTE: ""}
    try:
        with _graph.quietly():
            program = torch.export.load(path, extra_files=extra)
            module = program.module()
    except Exception as error:  # torch raises many kinds for a broken file
        _checks.fail("export.load", str(path), "be a whole program of torch.export", _checks.first_line(error))
    about = json.loads(extra[_NOTE])
    state = program.state_dict
    codes = codes_of(about, lambda name: (state[name], *_parameters(state, name)))

    @torch.no_grad()
    def run(*inputs: Tensor) -> Any:
        return module(*inputs)

    return Loaded(path, about, codes, run)


def _parameters(state: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor | None]:
    return state[f"{name}_quantizer.scale"], state.get(f"{name}_quantizer.zero_point")


def _check(path: Path) -> None:
    """Refuse what is not one of our files, or holds a pickle or code; nothing of it is run before."""

    def refuse(got: str) -> None:
        _checks.fail("export.load", str(path), "be a program of tensors and operators by fastflat.export", got)

    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile:
        refuse("no archive")
    with archive:
        names = archive.namelist()
        if not any(name.endswith(f"/extra/{_NOTE}") for name in names):
            refuse("an archive without its description")
        for name in names:
            if _REFUSED.search(name):
                refuse(name)
            if name.endswith("_config.json"):
                if any(part.get("use_pickle") for part in json.loads(archive.read(name))["config"].values()):
                    refuse(f"a pickle in {name}")
            elif "/sample_inputs/" in name:
                try:
                    torch.load(io.BytesIO(archive.read(name)), weights_only=True)
                except Exception:  # of many kinds
                    refuse(f"a pickle in {name}")
            elif "/models/" in name:
                for text in _expressions(json.loads(archive.read(name))):
                    if not _EXPRESSION.fullmatch(text):
                        refuse(f"the expression {text[:40]!r}")


def _expressions(value: Any) -> list[str]:
    """All strings that stand for expressions of shapes, wherever."""
    found, open_ = [], [value]
    while open_:
        at = open_.pop()
        if isinstance(at, dict):
            found += [at[key] for key in ("expr_str", "as_expr") if isinstance(at.get(key), str)]
            open_ += at.values()
        elif isinstance(at, list):
            open_ += at
    return found

# SPDX-License-Identifier: Apache-2.0
"""The methods, found by the names of their files."""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
from pathlib import Path
from types import ModuleType

from fastflat.methods._contract import Method

_FOLDER = Path(__file__).parent


@functools.cache
def _public() -> dict[str, tuple[str, ...]]:
    """``__all__`` of every file that defines ``METHOD``, read without importing it."""
    found = {}
    for path in sorted(_FOLDER.glob("[!_]*.py")):
        values = {
            target.id: node.value
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        if "METHOD" in values:
            found[path.stem] = tuple(ast.literal_eval(values["__all__"])) if "__all__" in values else ()
    return found


def names() -> tuple[str, ...]:
    """Names of the methods, in alphabetical order."""
    return tuple(_public())


def module(name: str) -> ModuleType:
    """The module of a method.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in _public():
        near = difflib.get_close_matches(name.lower().replace("-", "_"), _public(), 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(_public())}"
        raise ValueError(f"methods: NAME must be that of a method, got {name!r}; {hint}")
    return importlib.import_module(f"fastflat.methods.{name}")


def get(name: str) -> Method:
    """A method by name.

    Raises:
        ValueError: there is none of that name.
    """
    return module(name).METHOD


def methods() -> tuple[Method, ...]:
    """All methods by their number."""
    return tuple(sorted(map(get, names()), key=lambda method: method.number))


def owner(public: str) -> str | None:
    """The method whose file exports a public name."""
    return next((name for name, exported in _public().items() if public in exported and public != "METHOD"), None)


def public() -> list[str]:
    """The public names of all methods' files."""
    return sorted({name for exported in _public().values() for name in exported} - {"METHOD"})

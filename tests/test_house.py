# SPDX-License-Identifier: Apache-2.0
"""The picture of the house in CONTRIBUTING.md, kept true: who may include and import whom, and how files are called."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from fastflat import _ops, _spec

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
FAMILIES = {op.family for op in _ops.OPS.values()}
#: Families that Triton alone computes on GPUs.
WITHOUT_CUDA = {"compressors"}
SIBLINGS = {"quant", "optim", "curvature", "evaluate", "distributed"}

#: The storeys of the Python package, lowest first. A unit imports from lower storeys only. A module that is named
#: nowhere here may import nothing of the package; everyone may import it.
STOREYS = (
    {"_spec"},
    {"_ops"},
    {"_load", "_checks"},
    {"data"},
    {"triton_kernels"},
    {"backends"},
    {"autograd"},
    {"functional"},
    SIBLINGS,
    {"methods", "integrations", "audit", "export"},
    {"__init__"},
    {"benchmarks"},
    {"cli"},
    {"__main__"},
)
STOREY = {unit: level for level, units in enumerate(STOREYS) for unit in units}


def tracked() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    paths = [ROOT / name for name in listing.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def code(path: Path) -> str:
    """The text of a C++ file without its comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)


def includes(path: Path) -> list[str]:
    """Include directives as they are written, with their brackets or quotes."""
    return re.findall(r'^\s*#\s*include\s+([<"][^>"]+[>"])', code(path), flags=re.MULTILINE)


def resolve(path: Path, include: str) -> Path | None:
    """The file of the tree that a quoted include names: beside the including one, or from csrc/."""
    if include.startswith("<"):
        return None
    for folder in (path.parent, CSRC):
        found = (folder / include.strip('"')).resolve()
        if found.is_file() and found.is_relative_to(CSRC):
            return found
    return None


def sources(folder: str, *suffixes: str) -> list[Path]:
    return sorted(
        path for path in (CSRC / folder).rglob("*") if path.suffix in (suffixes or (".h", ".cpp", ".cu", ".cuh"))
    )


# C++ ----------------------------------------------------------------------------------------------------------------


def test_math_knows_the_standard_library_only():
    allowed = {"<cmath>", "<cstdint>", "<cstring>", "<limits>"}
    assert sources("math"), "csrc/math holds no functor"
    for path in sources("math"):
        for include in includes(path):
            target = resolve(path, include)
            assert include in allowed or (target and target.parent == CSRC / "math"), f"{short(path)}: {include}"


@pytest.mark.parametrize(
    ("folder", "below"), [("core", {"math"}), ("cpu", {"math", "core"}), ("cuda", {"math", "core"})]
)
def test_includes_point_downwards(folder, below):
    assert sources(folder)
    for path in sources(folder):
        for include in includes(path):
            if include.startswith("<"):
                continue
            target = resolve(path, include)
            if target is None:
                assert (short(path), include) == ("csrc/cuda/launch.cuh", '"cuda_emulator.h"'), (
                    f"{short(path)}: {include}"
                )
                continue
            storey = target.relative_to(CSRC).parts[0]
            assert storey in below | {folder}, f"{short(path)} includes {short(target)}"


def test_torch_headers_are_those_of_the_stable_abi():
    stable = ("<torch/csrc/stable/", "<torch/headeronly/", "<torch/csrc/inductor/aoti_torch/c/shim")
    for path in sources("."):
        for include in includes(path):
            if "torch" in include or "ATen" in include or "c10" in include:
                assert include.startswith(stable), f"{short(path)}: {include}"


def reachable(path: Path) -> set[Path]:
    seen, open_ = set(), [path]
    while open_:
        current = open_.pop()
        if current not in seen:
            seen.add(current)
            open_ += [target for include in includes(current) if (target := resolve(current, include))]
    return seen


def test_device_code_sees_no_torch():
    for path in sources("cuda", ".cu"):
        for file in reachable(path):
            for include in includes(file):
                assert "torch" not in include, f"{short(path)} reaches {include} through {short(file)}"


def test_cuda_headers_and_launches_are_in_launch_cuh_only():
    for path in sources("cuda", ".cu", ".cuh", ".h"):
        if path.name == "launch.cuh":
            continue
        assert not [i for i in includes(path) if i.startswith("<cu")], f"{short(path)} includes a header of the toolkit"
    for path in sources("."):
        if path.name != "launch.cuh":
            assert "<<<" not in code(path), f"{short(path)} launches a kernel by itself"
    assert "<<<" in code(CSRC / "cuda" / "launch.cuh")


def test_no_threads_of_our_own_and_no_python_in_the_libraries():
    for path in sources("."):
        text = code(path)
        for word in ("#pragma omp", "<omp.h>", "<thread>", "pybind11", "Python.h", "PyInit_"):
            assert word not in text, f"{short(path)}: {word}"


def arguments(text: str, start: int) -> int:
    """Number of arguments of the call whose opening parenthesis lies before `start`."""
    depth, commas, quote, i = 1, 0, "", start
    while depth:
        c = text[i]
        if quote:
            i += c == "\\"
            quote = "" if text[i] == quote and c != "\\" else quote
        elif c in "\"'":
            quote = c
        else:
            depth += (c in "([{") - (c in ")]}")
            commas += c == "," and depth == 1
        i += 1
    return commas + 1


def test_every_check_has_a_message():
    calls = [
        (path, match, text)
        for path in sources(".")
        for text in [code(path)]
        for match in re.finditer(r"\bSTD_TORCH_CHECK\s*\(", text)
    ]
    assert calls
    for path, match, text in calls:
        line = text[: match.start()].count("\n") + 1
        assert arguments(text, match.end()) > 1, f"{short(path)}: a check without a message (about line {line})"


def test_rules_are_one_table():
    text = (CSRC / "math" / "rules.h").read_text()
    assert {name: int(bit) for name, bit in re.findall(r"constexpr int64_t (\w+) = (\d+);", text)} == _spec.RULES


# Python -------------------------------------------------------------------------------------------------------------


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "fastflat" else ("fastflat", *parts))


def imported(path: Path) -> set[str]:
    """Absolute names of what a module imports, wherever in the file."""
    package = dotted(path).split(".")[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, node.module] if node.module else base
            names |= {".".join([*base, alias.name]) for alias in node.names}
    return names


def unit(name: str) -> str:
    """The unit of the package to which a dotted name belongs; ``__init__`` for a public name."""
    part = [*name.split("."), "__init__"][1]
    if part in STOREY or (ROOT / "fastflat" / part).is_dir() or (ROOT / "fastflat" / f"{part}.py").is_file():
        return part
    return "__init__"


@pytest.mark.parametrize("folder", ["fastflat", "triton_kernels", "benchmarks"])
def test_imports_point_downwards(folder):
    assert modules(folder)
    for path in modules(folder):
        own = unit(dotted(path))
        for name in imported(path):
            if name.split(".")[0] != "fastflat":
                continue
            other = unit(name)
            if other == own or other not in STOREY:
                continue
            assert own in STOREY, f"{short(path)} imports {name}, so it needs a storey in tests/test_house.py"
            assert STOREY[other] < STOREY[own], f"{short(path)} imports {name}, which is not below it"


def test_examples_know_public_names_only():
    assert modules("examples")
    for path in modules("examples"):
        for name in imported(path):
            private = name.split(".")[0] == "fastflat" and any(part.startswith("_") for part in name.split("."))
            assert not private, f"{short(path)} imports {name}"


def test_triton_kernels_know_torch_and_triton_only():
    standard = {"__future__", "contextlib", "dataclasses", "functools", "math", "struct"}
    for path in modules("triton_kernels"):
        for name in imported(path):
            assert name.split(".")[0] in {"torch", "triton", "fastflat", *standard}, f"{short(path)} imports {name}"
            assert not name.startswith("fastflat.") or unit(name) == "triton_kernels", f"{short(path)} imports {name}"


def test_build_tools_know_neither_fastflat_nor_torch():
    for path in [*modules("build_tools"), ROOT / "setup.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                for name in names:
                    assert name.split(".")[0] not in ("fastflat", "torch", "triton", "numpy"), f"{short(path)}: {name}"


def test_packages_are_packages():
    for folder in ("fastflat", "triton_kernels", "benchmarks"):
        for path in modules(folder):
            assert (path.parent / "__init__.py").is_file(), f"{short(path.parent)} has no __init__.py: a wheel lacks it"


# Names ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern",
    [
        "csrc/math/{}.h",
        "csrc/cpu/{}.cpp",
        "csrc/cpu/{}_loops.cpp",
        "csrc/cuda/{}.cu",
        "csrc/cuda/{}.cpp",
        "triton_kernels/{}.py",
        "tests/ops/test_{}.py",
        "benchmarks/cases/{}.py",
    ],
)
def test_names_are_derivable(pattern):
    for family in sorted(FAMILIES - WITHOUT_CUDA if "cuda" in pattern else FAMILIES):
        if "_loops" in pattern or "csrc/math" in pattern or pattern.endswith(".cu"):
            family = family.removesuffix("_list")  # a list of tensors takes the functors and loops of one
        assert (ROOT / pattern.format(family)).is_file(), f"{pattern.format(family)} is missing"


@pytest.mark.parametrize(
    "pattern", ["csrc/cpu/*.cpp", "csrc/cuda/*.cu", "triton_kernels/[!_]*.py", "benchmarks/cases/[!_]*.py"]
)
def test_no_op_file_without_a_row_in_the_table(pattern):
    # The choice among instruction sets serves all families.
    assert {path.stem.removesuffix("_loops") for path in ROOT.glob(pattern)} - {"isa"} <= FAMILIES


# Texts ---------------------------------------------------------------------------------------------------------------


def test_every_source_names_its_licence():
    for path in tracked():
        if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh", ".sh") or short(path) in ("Makefile", ".ci/run"):
            head = path.read_text().splitlines()[:2]
            assert not head or any("SPDX-License-Identifier: Apache-2.0" in line for line in head), short(path)


def test_no_machine_path_and_no_registry_in_the_tree():
    path_of_a_machine = re.compile(r"(?<![\w.$}>)~-])/(?:work|home|root|opt|Users|mnt)/\w[\w.-]*")
    registry = re.compile(r"\b(?:pypi\.org|pythonhosted\.org|download\.pytorch\.org|anaconda\.org|pypi\.nvidia\.com)\b")
    for path in tracked():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        for kind in (path_of_a_machine, registry):
            found = kind.search(text)
            assert not found, f"{short(path)}: {found and found[0]}"


def test_setup_is_short():
    assert len((ROOT / "setup.py").read_text().splitlines()) < 80


def test_the_linters_are_one_version():
    pins = r"\b(ruff|clang-format|typos)==([\d.]+)"
    hooks = set(re.findall(pins, (ROOT / ".pre-commit-config.yaml").read_text()))
    assert hooks == set(re.findall(pins, (ROOT / "pyproject.toml").read_text()))
    assert len(hooks) == 3

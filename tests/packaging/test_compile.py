# SPDX-License-Identifier: Apache-2.0
"""The incremental build, on a tree of two small sources."""

import dataclasses
import os
import platform

import pytest

from build_tools import compile as compiler
from build_tools import find


@pytest.fixture
def tree(tmp_path):
    tools = find.tools(os.environ)
    if not tools.cxx or not tools.torch:
        pytest.skip("needs a C++ compiler and torch's libraries")
    (tmp_path / "csrc/cpu").mkdir(parents=True)
    (tmp_path / "csrc/value.h").write_text("inline int value() { return 1; }\n")
    (tmp_path / "csrc/cpu/b.cpp").write_text('#include "value.h"\nint b() { return value(); }\n')
    (tmp_path / "csrc/cpu/a.cpp").write_text("int a() { return 2; }\n")
    return tmp_path, tools


def build(tree):
    """Builds, and returns what was compiled or linked anew."""
    root, tools = tree
    old = times(root)
    compiler.build(root, "cpu", tools, (), {"MAX_JOBS": "1"})
    return sorted(name for name, when in times(root).items() if old.get(name) != when)


def times(root):
    made = [*root.glob("build/**/*.o"), *root.glob("build/**/*.so")]
    return {path.name: path.stat().st_mtime_ns for path in made}


ALL = ["a.cpp.o", "b.cpp.o", "libfastflat_cpu.so"]


def test_only_what_changed_is_compiled(tree):
    root, _ = tree
    assert build(tree) == ALL
    assert build(tree) == []
    (root / "csrc/value.h").write_text("inline int value() { return 3; }\n")
    assert build(tree) == ["b.cpp.o", "libfastflat_cpu.so"]
    (root / "csrc/cpu/a.cpp").unlink()
    assert build(tree) == ["libfastflat_cpu.so"]


def test_other_flags_compile_everything(tree, monkeypatch):
    build(tree)
    monkeypatch.setitem(compiler.flags.SHARED, "-DANOTHER", "a flag more")
    assert build(tree) == ALL


def test_a_cache_in_front_of_the_compiler_compiles_nothing_anew(tree, tmp_path_factory):
    build(tree)
    cache = tmp_path_factory.mktemp("bin") / "ccache"
    cache.write_text('#!/bin/sh\nexec "$@"\n')
    cache.chmod(0o755)
    root, tools = tree
    assert build((root, dataclasses.replace(tools, cxx=(str(cache), *tools.cxx)))) == []


def test_an_error_names_the_command_and_is_not_remembered(tree):
    root, _ = tree
    (root / "csrc/cpu/b.cpp").write_text("int b() { return unknown_name; }\n")
    with pytest.raises(compiler.CompileError, match=r"csrc/cpu/b\.cpp[\s\S]*unknown_name"):
        build(tree)
    (root / "csrc/cpu/b.cpp").write_text("int b() { return 4; }\n")
    assert build(tree)[-2:] == ["b.cpp.o", "libfastflat_cpu.so"]


def test_a_missing_symbol_fails_at_the_link(tree):
    root, _ = tree
    (root / "csrc/cpu/b.cpp").write_text("int absent(); int b() { return absent(); }\n")
    with pytest.raises(compiler.CompileError, match="absent"):
        build(tree)


def test_sources_are_sorted(root):
    for name in ("cpu", "cuda"):
        found = compiler.sources(root, name)
        assert found
        assert found == sorted(found)
        assert all((root / source).is_file() for source in found)


def test_loops_are_compiled_once_for_each_instruction_set(tree):
    root, _ = tree
    (root / "csrc/cpu/c_loops.cpp").write_text(
        "#if defined(FASTFLAT_ISA_AVX2)\nint c2() { return 0; }\n#elif defined(FASTFLAT_ISA_AVX512)\n"
        "int c5() { return 0; }\n#else\nint c0() { return 0; }\n#endif\n"
    )
    sets = compiler.instruction_sets("csrc/cpu/c_loops.cpp", platform.machine())
    assert build(tree) == sorted([*ALL, *(f"c_loops.cpp.{isa}.o" for isa in sets)])
    assert compiler.instruction_sets("csrc/cpu/c_loops.cpp", "aarch64") == ("baseline",)
    assert compiler.instruction_sets("csrc/cpu/c.cpp", "x86_64") == ("",)


def test_jobs():
    assert compiler.jobs({}, 8, 10 << 30) == 3
    assert compiler.jobs({}, 2, 64 << 30) == 2
    assert compiler.jobs({}, 4, 1 << 30) == 1
    assert compiler.jobs({"MAX_JOBS": "7"}, 1, 1 << 30) == 7
    for wrong in ("0", "-1", "many"):
        with pytest.raises(ValueError, match="MAX_JOBS must be a positive integer"):
            compiler.jobs({"MAX_JOBS": wrong}, 1, 1 << 30)

# SPDX-License-Identifier: Apache-2.0
"""Every compile and link flag, with its why."""

from __future__ import annotations

from build_tools.arches import gencode
from build_tools.decide import TORCH_FLOOR

#: Both compilers, C++ and CUDA sources alike.
SHARED = {
    "-std=c++20": "the oldest standard that the stable headers of every torch from 2.10 compile with",
    "-Icsrc": "sources write math/x.h, core/x.h, cpu/x.h",
    "-MD": "writes the header dependencies next to the object: a changed header rebuilds what includes it",
}

#: The host compiler; nvcc hands them on.
HOST = {
    "-fPIC": "shared library",
    "-fvisibility=hidden": "nothing is called by name: the operators register themselves when the library loads",
    "-fvisibility-inlines-hidden": "the same for inline functions",
    "-ffp-contract=off": "a*b+c in two roundings on every target, so that all backends give the same bits",
    "-fno-math-errno": "no loop calls a libm function for the sake of errno",
    "-fno-trapping-math": "comparisons and choices vectorise; no result changes, only which exception flags are raised",
    "-ffile-prefix-map={root}=.": "no path of the build machine in the binary",
    "-ffile-prefix-map={torch}=torch": "the same for the texts of torch's check macros",
    "-Wall": "warnings",
    "-Wextra": "warnings",
}

FAST = {"-O3": "the vector loops need it"}

#: Checks of arguments and calls of loops.
CALLS = {"-Os": "no loop over elements in them"}

#: Loops of many forms: half the size of -O3 alone, and as fast.
LEAN = {
    "-O3": "the vector loops need it",
    "-fno-unswitch-loops": "no copy of a loop for each value of a condition",
    "-fno-peel-loops": "no copy of a loop for its first elements",
    "--param=vect-epilogues-nomask=0": "no second, narrower vector loop for the last elements",
}

#: Loops of even more forms: smaller still, and as fast where the sources force what must be inlined.
LEANER = {
    "-O2": "inlines what the sources say must be inlined, and little else",
    "-fvect-cost-model=dynamic": "vectorises as -O3 does",
    "-fpeel-loops": "unrolls the short loops whose length the compiler knows, as -O3 does",
    "-fno-unswitch-loops": "no copy of a loop for each value of a condition",
    "--param=vect-epilogues-nomask=0": "no second, narrower vector loop for the last elements",
}

#: Loops for the x86 processors without AVX2: few, old, and not worth a third of the library.
RARE = {"-Os": "scalar, at a third of the size"}

#: How the loops of a family are optimised; all others are FAST: they get their speed from a copy for each condition.
LOOPS = {
    "binarize": LEANER,
    "bitplane": LEAN,
    "compressors": LEAN,
    "fake_quantize": LEAN,
    "general_quantize": LEANER,
    "liq": LEANER,
    "mixquant": LEANER,
}

#: Sources beside the loops that compute enough themselves to be worth it.
FAST_CALLS = ("tangents",)

#: Sources that include torch.
TORCH = {
    "-isystem{torch}/include": "torch's headers, without their warnings",
    "-DTORCH_STABLE_ONLY": "any header outside the stable ABI is an error",
    "-DTORCH_TARGET_VERSION=0x{floor:016x}": "only symbols that the oldest supported torch already has",
}

NVCC = {
    **FAST,
    "-fmad=false": "as -ffp-contract=off, on the device",
    "-Xptxas=-v,--warn-on-spills": "registers in the build log, a warning for every spill",
}

#: For a build of the tree; in a wheel they would be two thirds of the device code.
LINES = {"-lineinfo": "profilers and compute-sanitizer name source lines; costs nothing at run time"}

#: From ZSTD_FROM on, whose drivers all read it.
SMALL = {"--compress-mode=size": "device code by zstd: a third less in a wheel than what zip makes of it"}
ZSTD_FROM = 13

#: The C++ half of the CUDA library: its part of the stable ABI is behind this macro.
CUDA_HOST = {"-DUSE_CUDA": "declares the stream and the error check of the stable ABI"}

LINK = {
    "-shared": "shared library",
    "-L{torch}/lib": "where torch is now; not stored, the loaded torch is found by name",
}

#: Options for the linker itself.
LINKER = {
    "--no-as-needed": "keep libtorch in DT_NEEDED: through it the CUDA library finds a symbol of libtorch_cuda",
    "-ltorch": "in a CUDA build of torch it brings libtorch_cuda",
    "-ltorch_cpu": "the stable ABI's C functions",
    "--build-id=sha1": "the same sources give the same file",
    "--exclude-libs,ALL": "the static CUDA runtime stays our own: its symbols are not exported",
}

NVCC_LINK = {
    "-cudart=static": "the driver is all that the library needs, whatever CUDA runtime torch brings",
    "-nodlink": "no kernel calls into another object",
}

#: The CPU library leaves nothing unresolved. The CUDA library may be linked against a CPU-only torch.
CPU_LINKER = {"-z,defs": "a symbol that torch lacks is an error now, not when a user loads the library"}

TARGET_VERSION = (TORCH_FLOOR[0] << 56) | (TORCH_FLOOR[1] << 48)


def cxx(torch: str, root: str) -> list[str]:
    """Options of the host compiler for every source of the CPU library. `torch`: folder of the torch package."""
    return _fill((*SHARED, *HOST, *TORCH), torch, root)


def optimisation(source: str, isa: str, others: bool) -> list[str]:
    """How one source of the CPU library is optimised.

    Args:
        source: its path.
        isa: the instruction set that it is compiled for, empty for a source without loops.
        others: whether the library holds faster sets beside ``baseline``.
    """
    family = source.rpartition("/")[2].removesuffix(".cpp").removesuffix("_loops")
    if not isa:
        return list(FAST if family in FAST_CALLS else CALLS)
    if isa == "baseline" and others:
        return list(RARE)
    return list(LOOPS.get(family, FAST))


def cuda_cxx(torch: str, root: str) -> list[str]:
    """Options of nvcc for a .cpp of the CUDA library: it calls the host compiler with its own include path."""
    options = _fill((*SHARED, *TORCH, *CUDA_HOST), torch, root)
    # nvcc itself knows no -Os
    optimising = (f"-Xcompiler={option}" for option in CALLS)
    return [*(o.replace("-isystem", "-isystem=") for o in options), *_host(torch, root), *optimising]


def nvcc(toolkit: str, arches: tuple[str, ...], torch: str, root: str, *, lines: bool) -> list[str]:
    """Options of nvcc `toolkit` for a .cu: no torch headers, machine code for `arches`, source lines if asked."""
    small = SMALL if int(toolkit.split(".")[0]) >= ZSTD_FROM else ()
    return [
        *_fill((*SHARED, *NVCC, *(LINES if lines else ()), *small), torch, root),
        *gencode(arches),
        *_host(torch, root),
    ]


def link_cpu(torch: str, root: str) -> list[str]:
    """Options that link the CPU library with the host compiler; they go behind the objects."""
    return _fill((*LINK, *(_pass_on(o) for o in (*LINKER, *CPU_LINKER))), torch, root)


def link_cuda(torch: str, root: str) -> list[str]:
    """Options that link the CUDA library with nvcc."""
    linker = (option if option.startswith("-l") else f"-Xlinker={option}" for option in LINKER)
    return _fill((*LINK, *NVCC_LINK, *linker), torch, root)


def public(toolkit: str | None, arches: tuple[str, ...], *, lines: bool) -> dict[str, list[str] | dict[str, list[str]]]:
    """The options as they go into the build record: with placeholders instead of the build machine's paths."""
    at = ("<torch>", "<root>")
    loops = {family: [*options] for family, options in LOOPS.items()}
    device = [*nvcc(toolkit, arches, *at, lines=lines), *link_cuda(*at)] if toolkit and arches else []
    return {"cxx": [*cxx(*at), *link_cpu(*at)], "loops": loops, "nvcc": device}


def _pass_on(option: str) -> str:
    return option if option.startswith("-l") else f"-Wl,{option}"


def _host(torch: str, root: str) -> list[str]:
    return [f"-Xcompiler={option}" for option in _fill(HOST, torch, root)]


def _fill(options, torch: str, root: str) -> list[str]:
    return [option.format(torch=torch, root=root, floor=TARGET_VERSION) for option in options]

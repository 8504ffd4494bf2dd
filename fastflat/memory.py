# SPDX-License-Identifier: Apache-2.0
"""Memory of the host: large tensors without a page fault for every page at every allocation."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import mmap
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

# Parameters of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_MMAP_MAX = -4

#: mallopt takes a C int.
_LARGEST = 2**31 - 1
_OWN_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_")
_OTHER_ALLOCATORS = ("jemalloc", "tcmalloc", "mimalloc")


@dataclasses.dataclass(frozen=True)
class HostMemory:
    """Answer of :func:`tune_host_memory`.

    Attributes:
        applied: whether the allocator's thresholds are set.
        reason: what was set, or why nothing was.
    """

    applied: bool
    reason: str


_done: dict[int, HostMemory] = {}


def tune_host_memory(limit: int = 1 << 30) -> HostMemory:
    """Let the C library keep freed memory for the next tensor. Opt-in; holds for the process; calling again is free.

    glibc maps every block of 32 MiB and more from the kernel and gives it back when it is freed, so each new large
    tensor pays a page fault per 4 KiB, for every PyTorch operation that allocates its result. This sets two thresholds
    by ``mallopt``: blocks below `limit` come from the heap (``M_MMAP_THRESHOLD``), and the heap is never trimmed
    (``M_TRIM_THRESHOLD``).

    What it costs: the process keeps its largest heap until it ends, so its resident size stays at the peak of what it
    used, and a block that lies between others can leave gaps. What it does not reach: threads other than the main one
    (backward passes run on the thread that called them, data loaders elsewhere), blocks of `limit` and more, memory
    that is already mapped, pinned and device memory.

    Args:
        limit: blocks of this many bytes and more are mapped as before; from 1 to 2**31 - 1.

    Returns:
        What was done. Nothing is, with the reason, off Linux, with another C library (musl) or allocator (jemalloc,
        tcmalloc, mimalloc), and where the environment sets these thresholds itself.

    Raises:
        ValueError: `limit` is out of range.
    """
    if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= _LARGEST:
        raise ValueError(f"fastflat::tune_host_memory: limit must be an integer from 1 to 2**31 - 1, got {limit!r}")
    if limit not in _done:
        obstacle = _obstacle()
        result = HostMemory(False, obstacle) if obstacle else _set(limit)
        _done.clear()
        _done[limit] = result
    return _done[limit]


#: Bytes from which a tensor is given huge pages: two of them on x86.
_LARGE = 4 << 20


def in_huge_pages(t: Tensor) -> Tensor:
    """`t`, whose memory Linux is asked to hold in huge pages where it has not been written yet (``MADV_HUGEPAGE``).

    A pass over several large tensors misses the address cache once per page; pages of 2 MiB make it a fifth faster. The
    answer is advice: nothing happens to small tensors, on other systems and devices, or where the kernel's setting
    ``transparent_hugepage`` is ``never``.
    """
    if t.device.type == "cpu" and t.numel() * t.element_size() >= _LARGE and (madvise := _madvise()) is not None:
        begin = -(-t.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        madvise(begin, t.data_ptr() + t.numel() * t.element_size() - begin, mmap.MADV_HUGEPAGE)
    return t


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes, madvise.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return madvise


def _obstacle() -> str | None:
    """Why the thresholds are not ours to set."""
    if sys.platform != "linux":
        return f"glibc's thresholds exist on Linux only, this is {sys.platform}"
    if _glibc() is None:
        return "the C library is not glibc"
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if "glibc.malloc.mmap_" in tunables or "glibc.malloc.trim_threshold" in tunables:
        return "GLIBC_TUNABLES sets the allocator's thresholds"
    for name in _OWN_SETTINGS:
        if name in os.environ:
            return f"{name} sets the allocator's thresholds"
    other = _other_allocator()
    return f"{other} replaces glibc's allocator" if other else None


def _glibc() -> str | None:
    """Version of glibc as in ``"2.36"``; None with another C library."""
    try:
        version = ctypes.CDLL(None).gnu_get_libc_version
    except (AttributeError, OSError):
        return None
    version.restype = ctypes.c_char_p
    return version().decode()


def _other_allocator() -> str | None:
    """The allocator that is loaded into this process in place of glibc's."""
    try:
        with open("/proc/self/maps") as maps:
            files = {line.split()[-1].rsplit("/", 1)[-1] for line in maps if "/" in line}
    except OSError:
        files = {os.environ.get("LD_PRELOAD", "")}
    return next((name for name in _OTHER_ALLOCATORS if any(name in file for file in files)), None)


def _set(limit: int) -> HostMemory:
    mallopt = ctypes.CDLL(None).mallopt
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    if mallopt(_M_MMAP_THRESHOLD, limit):
        mapped = f"blocks below {limit} bytes come from the heap"
    elif mallopt(_M_MMAP_MAX, 0):
        # Older versions of glibc take no threshold above 32 MiB, but can do without mapping.
        mapped = "all blocks come from the heap"
    else:
        return HostMemory(False, f"mallopt of glibc {_glibc()} refused")
    mallopt(_M_TRIM_THRESHOLD, -1)
    return HostMemory(True, f"{mapped}, which is never trimmed (glibc {_glibc()})")


def available(device: torch.device) -> int | None:
    """Bytes that a new tensor could take on a device: what the kernel and the control group leave, or what the GPU and
    PyTorch's cache hold free; None where nobody says."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    found = [left for left in (_left_of_machine(), _left_of_group()) if left is not None]
    return min(found, default=None)


def _left_of_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


_GROUP = Path("/sys/fs/cgroup")


def _left_of_group() -> int | None:
    """Of the control group (version 2) that a container lives in; files that the kernel caches do not count."""
    try:
        limit, used = (_GROUP / "memory.max").read_text().strip(), int((_GROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_GROUP / "memory.stat").read_text().splitlines())
        cached = stat.get("inactive_file", 0)
    except (OSError, ValueError):
        return None
    return None if limit == "max" else max(int(limit) - used + int(cached), 0)

# SPDX-License-Identifier: Apache-2.0
"""tune_host_memory: its effect on page faults, and every reason for which it does nothing."""

import os
import subprocess
import sys

import pytest

import fastflat as ff
from fastflat import memory

# Each in a process of its own: the thresholds hold until a process ends.
_FAULTS = """
import resource, sys, torch
import fastflat as ff
from fastflat import memory
torch.set_num_threads(1)

def faults_of_a_step(count=4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        y = x * 0.5
        del y
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / count

x = torch.ones(int(sys.argv[1]))
faults_of_a_step()
before = faults_of_a_step()
print(ff.tune_host_memory().applied)
faults_of_a_step()
print(before * resource.getpagesize() / (x.numel() * 4), faults_of_a_step() * resource.getpagesize() / (x.numel() * 4))
"""


def in_a_process(program, *arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def fresh(monkeypatch):
    """No answer remembered, and no threshold of this process touched."""
    monkeypatch.setattr(memory, "_done", {})
    monkeypatch.setattr(memory, "_set", lambda limit: memory.HostMemory(True, f"set to {limit}"))
    for name in memory._OWN_SETTINGS + ("GLIBC_TUNABLES",):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.skipif(memory._obstacle() is not None, reason=f"{memory._obstacle()}")
@pytest.mark.parametrize("elements", [2**23, 2**24 + 3])
def test_large_tensors_stop_faulting(elements):
    applied, faults = in_a_process(_FAULTS, str(elements))
    before, after = map(float, faults.split())
    assert applied == "True"
    # In units of the tensor: every page of every result before, none to speak of afterwards. With transparent huge
    # pages for everything a fault brings 2 MiB at once and there is nothing to win.
    if before > 0.5:
        assert after < 0.05
    else:
        assert after <= before


def test_answer_is_remembered(fresh):
    first = ff.tune_host_memory()
    assert first == memory.HostMemory(True, f"set to {1 << 30}")
    assert ff.tune_host_memory() is first
    assert ff.tune_host_memory(1 << 28).reason == f"set to {1 << 28}"


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_other_platforms(fresh, monkeypatch, platform):
    monkeypatch.setattr(memory.sys, "platform", platform)
    result = ff.tune_host_memory()
    assert not result.applied
    assert platform in result.reason


def test_other_c_library(fresh, monkeypatch):
    monkeypatch.setattr(memory, "_glibc", lambda: None)
    monkeypatch.setattr(memory.sys, "platform", "linux")
    assert ff.tune_host_memory() == memory.HostMemory(False, "the C library is not glibc")


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc's environment")
@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_MMAP_THRESHOLD_", "4096"), ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=4096")]
)
def test_settings_of_the_user_stay(fresh, monkeypatch, name, value):
    monkeypatch.setattr(memory, "_glibc", lambda: "2.36")
    monkeypatch.setenv(name, value)
    result = ff.tune_host_memory()
    assert not result.applied
    assert result.reason.startswith(name)


def test_other_allocator(fresh, monkeypatch):
    monkeypatch.setattr(memory, "_glibc", lambda: "2.36")
    monkeypatch.setattr(memory.sys, "platform", "linux")
    monkeypatch.setattr(memory, "_other_allocator", lambda: "jemalloc")
    assert ff.tune_host_memory() == memory.HostMemory(False, "jemalloc replaces glibc's allocator")


def test_no_other_allocator_is_seen_where_none_is(fresh):
    if any(name in os.environ.get("LD_PRELOAD", "") for name in memory._OTHER_ALLOCATORS):
        pytest.skip("another allocator is preloaded")
    assert memory._other_allocator() is None


@pytest.mark.parametrize("limit", [0, -1, 2**31, 1.5, True, "1"])
def test_limit_is_checked(limit):
    with pytest.raises(ValueError, match=r"^fastflat::tune_host_memory: limit must be an integer from 1 to .*, got "):
        ff.tune_host_memory(limit)


@pytest.mark.skipif(memory._glibc() is None, reason="asks glibc's mallopt")
@pytest.mark.parametrize(("accepted", "applied"), [({-4, -1}, True), (set(), False)])
def test_old_versions_of_glibc(monkeypatch, accepted, applied):
    calls = []

    class Library:
        def __init__(self, _):
            class Mallopt:
                def __call__(self, parameter, value):
                    calls.append((parameter, value))
                    return int(parameter in accepted)

            self.mallopt = Mallopt()

    monkeypatch.setattr(memory, "_glibc", lambda: "2.31")
    monkeypatch.setattr(memory.ctypes, "CDLL", Library)
    result = memory._set(1 << 30)
    assert result.applied is applied
    assert calls[:2] == [(-3, 1 << 30), (-4, 0)]
    assert (calls[2:] == [(-1, -1)]) is applied

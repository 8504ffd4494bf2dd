# SPDX-License-Identifier: Apache-2.0
"""The emulator itself: barriers, shuffles, atomics and order, and that it catches what it is there to catch."""

import pytest
import torch


def run(module, name, data):
    return module.probe(name, data.data_ptr(), data.numel())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_barrier_and_shared_memory(module, emulated, seed):
    module.set_order(seed)
    data = torch.arange(512.0)
    assert run(module, "reverse_block", data) == 0
    assert torch.equal(data, torch.arange(512.0).view(2, 256).flip(1).flatten())


def test_missing_barrier_shows_as_a_change_with_the_order(module, emulated):
    results = []
    for seed in range(4):
        module.set_order(seed)
        data = torch.arange(512.0)
        run(module, "race", data)
        results.append(data)
    assert any(not torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("seed", [0, 7])
def test_shuffles_and_atomics(module, emulated, seed):
    module.set_order(seed)
    data = torch.arange(256.0)
    assert run(module, "warp_sums", data) == 0
    assert torch.equal(data, torch.arange(256.0).view(8, 32).sum(1, keepdim=True).expand(8, 32).flatten())
    data = torch.arange(256.0)
    assert run(module, "half_a_warp", data) == 0
    low = torch.arange(256.0).view(8, 2, 8, 2)
    low[:, 0] = low[:, 0].sum(-1, keepdim=True).expand(-1, -1, 2).clone()
    assert torch.equal(data, low.flatten())
    data = torch.zeros(1000)
    assert run(module, "count_threads", data) == 0
    assert data[0] == 1024


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("lost_at_barrier", r"block 0: 32 of 256 threads reached the barrier at probes\.cu:\d+"),
        ("two_barriers", r"different barriers, one at probes\.cu:\d+"),
        ("lost_in_shuffle", r"lane 5 never joined the shuffle at probes\.cu:\d+"),
        ("lane_outside_mask", r"reads a lane outside its mask at probes\.cu:\d+"),
    ],
)
def test_divergence_is_reported_and_leaves_a_working_emulator(module, emulated, name, text):
    with pytest.raises(RuntimeError, match=text):
        run(module, name, torch.zeros(256))
    data = torch.arange(256.0)
    assert run(module, "reverse_block", data) == 0
    assert torch.equal(data, torch.arange(256.0).flip(0))


def test_launch_limits(module, emulated):
    data = torch.zeros(256)
    assert run(module, "too_many_threads", data) == 9
    assert run(module, "too_many_blocks", data) == 9
    assert data[0] == 0
    assert run(module, "reverse_block", torch.zeros(0)) == 0
    assert module.take_counts()["launches"] == 0

# SPDX-License-Identifier: Apache-2.0
"""Bytes of global memory that each kernel moves, counted by its accessors, against the least possible."""

import pytest
import torch

from .cases import Layout, data, grid, parameters

LARGE = 1 << 22
REGIMES = {
    "tensor": Layout((LARGE,)),
    "channel_first": Layout((256, LARGE // 256), axis=0),
    "channel_middle": Layout((16, 64, 64, 64), axis=1),
    "short_runs": Layout((LARGE // (64 * 16), 64, 4, 4), axis=1),
    "channel_last": Layout((LARGE // 64, 64), axis=1),
    "odd_channels_last": Layout((LARGE // 63 + 1, 63), axis=1),
    "groups": Layout((64, 4096), group=32),
}
SLACK = 1.05  # partial sums and ragged ends


def moved(emulated, call):
    emulated.module.take_counts()
    call()
    counts = emulated.module.take_counts()
    return counts["read"], counts["written"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("regime", REGIMES)
def test_backward_reads_twice_and_writes_once(emulated, regime, dtype):
    layout = REGIMES[regime]
    x = data(layout, dtype, 0, special=False)
    scale, zero_point = parameters(layout, dtype, 0, True)
    args = (x, x, scale, zero_point, *grid(layout, 0), 1.0, True)
    read, written = moved(emulated, lambda: emulated.fake_quantize_bwd(*args))
    b, n = dtype.itemsize, x.numel()
    assert 2 * b * n <= read
    assert b * n <= written
    assert read + written <= SLACK * 3 * b * n


SMALL = Layout((7, 1001), axis=0)


@pytest.mark.parametrize(
    ("x_dtype", "y_dtype"),
    [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float64,) * 2, (torch.float32, torch.bfloat16)],
)
def test_maps_touch_every_element_once(emulated, x_dtype, y_dtype):
    x, gy = data(SMALL, x_dtype, 0), data(SMALL, y_dtype, 1)
    scale, _ = parameters(SMALL, x_dtype, 0, False)
    n, a, b = x.numel(), x_dtype.itemsize, y_dtype.itemsize
    args = (x, scale, None, *grid(SMALL, 0))
    assert moved(emulated, lambda: emulated.identity(x)) == (a * n, a * n)
    assert moved(emulated, lambda: emulated.fake_quantize(*args, y_dtype)) == (a * n, b * n)
    assert moved(emulated, lambda: emulated.fake_quantize_bwd(gy, *args, 1.0, False)) == ((a + b) * n, a * n)
    assert moved(emulated, lambda: emulated.fake_quantize_jvp(gy, scale, None, *args, 1.0, y_dtype)) == (
        (a + b) * n,
        b * n,
    )
    assert moved(emulated, lambda: emulated.fake_quantize_jvp(None, scale, None, *args, 1.0, y_dtype)) == (
        a * n,
        b * n,
    )


def test_dynamic_scale_reads_once_where_a_run_fits_in_registers(emulated):
    for layout, reads in (
        (Layout((64, 32), group=16), 1),
        (Layout((5, 4099), axis=0), 1),
        (Layout((2, 16000), axis=0), 1),
        (Layout((2, 20000), axis=0), 2),
        (Layout((64, 32), axis=1), 2),
    ):
        x = data(layout, torch.float32, 0)
        read, written = moved(emulated, lambda: emulated.fake_quantize_absmax(x, *grid(layout, 0)))
        assert 4 * x.numel() * reads <= read <= 4 * x.numel() * reads + 4 * 4096
        assert 4 * x.numel() <= written <= 4 * x.numel() + 4 * 4096


def test_large_reductions_use_the_whole_gpu_and_a_bounded_workspace(emulated):
    m = emulated.module
    for layout in REGIMES.values():
        x = torch.empty(layout.shape, device="meta")
        g = emulated.geometry(x, layout.axis, layout.group)
        plan = m.reduce_plan(g, 4)
        if not plan["direct"]:
            assert m.fake_quantize_bwd_workspace(m.Pair.f32_f32, g) == 2 * 4 * plan["parts"] * plan["width"]
            assert plan["parts"] * plan["width"] * 8 <= 0.1 * 4 * x.numel()
        teams = plan["parts"] * plan["width"] if not plan["columns"] else plan["parts"] * plan["width"] / 4
        threads = teams * (1 if plan["columns"] else plan["team"])
        assert threads >= 1 << 15

# SPDX-License-Identifier: Apache-2.0
"""More than 2^31 elements: the real launch over sparse memory, of which only the first and last blocks run.

The arrays are mapped and never touched in between, so gigabytes of addresses cost a few pages. The far end must be what
the same elements give in a small tensor.
"""

import mmap

import pytest
import torch

from fastflat.backends import reference

from .cases import Layout, grid, same_bits

EDGE = 16  # blocks at each end that run
FAR = 1024  # elements at the far end that are looked at: inside the last block of every kernel here

LAYOUTS = {
    "tensor": Layout(((1 << 31) + 1029,)),
    "channel_first": Layout((3, (1 << 30) + 11), axis=0),
    "channel_middle": Layout((1 << 15, 3, 1 << 15), axis=1),
    "channel_last": Layout(((1 << 22) + 3, 513), axis=1),
    "groups": Layout(((1 << 15) + 1, 1 << 16), group=32),
}


def sparse(shape, dtype):
    """Zeros that take memory only where they are written."""
    n = torch.Size(shape).numel()
    memory = mmap.mmap(-1, n * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    return torch.frombuffer(memory, dtype=dtype, count=n).view(shape)


def scales_of(layout):
    """scale of flat element i is the (i // inner) % channels-th; and how many there are."""
    shape = torch.Size(layout.shape)
    if layout.group:
        return layout.group, shape.numel() // layout.group
    if layout.axis < 0:
        return shape.numel(), 1
    return shape[layout.axis + 1 :].numel(), shape[layout.axis]


@pytest.mark.parametrize("name", LAYOUTS)
def test_offsets_beyond_int32(emulated, name, monkeypatch):
    layout = LAYOUTS[name]
    n = torch.Size(layout.shape).numel()
    assert n > 1 << 31
    inner, channels = scales_of(layout)
    x, gy = sparse(layout.shape, torch.bfloat16), sparse(layout.shape, torch.bfloat16)
    g = torch.Generator().manual_seed(0)
    tail = torch.randn(FAR, generator=g).bfloat16()
    x.view(-1)[-FAR:] = tail
    gy.view(-1)[-FAR:] = 1
    index = torch.arange(n - FAR, n).div(inner, rounding_mode="floor") % channels
    scale = sparse((channels,), torch.float32)
    used = index.unique()
    scale[used] = (used % 7 + 1) * 0.125
    scale = scale.view(layout.shape[0], -1) if layout.group else scale.view(channels if layout.axis >= 0 else ())
    of_element = scale.view(-1)[index]

    # outputs: sparse too, instead of filled with a pattern
    monkeypatch.setitem(type(emulated).fake_quantize.__globals__, "poisoned", lambda t, d: sparse(t.shape, d))
    monkeypatch.setitem(
        type(emulated).fake_quantize.__globals__, "poison", lambda t: sparse(t.shape, t.dtype) if t.numel() else t
    )
    emulated.module.set_edge_blocks(EDGE)
    rest = grid(layout, 0)
    small = (of_element, None, *rest[:2], 0, 0, *rest[4:])  # a scale an element

    y = emulated.fake_quantize(x, scale, None, *rest)
    assert same_bits(y.view(-1)[-FAR:], reference.fake_quantize(tail, *small))
    ty = emulated.fake_quantize_jvp(gy, None, None, x, scale, None, *rest, 1.0)
    ones = torch.ones_like(tail)
    assert same_bits(ty.view(-1)[-FAR:], reference.fake_quantize_jvp(ones, None, None, tail, *small, 1.0))
    assert torch.equal(emulated.identity(x).view(-1)[-FAR:], tail)

    gx, gs, _ = emulated.fake_quantize_bwd(gy, x, scale, None, *rest, 1.0, True)
    expected_gx, shares, _ = reference.fake_quantize_bwd(ones, tail, *small, 1.0, True)
    assert same_bits(gx.view(-1)[-FAR:], expected_gx)
    expected = torch.zeros(channels, dtype=torch.float64).index_add_(0, index, shares.double())
    far = used[-8:] if layout.group else used[(used < EDGE) | (used >= channels - EDGE)]  # a block a scale, at least
    assert torch.allclose(gs.view(-1)[far].double(), expected[far], rtol=1e-5, atol=1e-5)


def test_plans_of_huge_tensors_stay_in_the_limits(emulated):
    m = emulated.module
    for outer, channels, inner in [(1, 1, 1 << 40), (1 << 30, 64, 1), (1 << 20, 1 << 10, 1 << 10), (1, 1 << 34, 16)]:
        plan = m.reduce_plan(m.Geometry(outer, channels, inner), 4)
        n = outer * channels * inner
        assert plan["parts"] >= 1
        if plan["columns"]:
            assert plan["parts"] * plan["rows"] * plan["width"] >= n
            blocks = plan["parts"] * -(-plan["width"] // 1024)
        else:
            assert plan["parts"] * plan["rows"] * max(plan["chunk"], inner) >= outer * inner
            blocks = -(-channels * plan["parts"] // (256 // plan["team"]))
        assert blocks < 1 << 31

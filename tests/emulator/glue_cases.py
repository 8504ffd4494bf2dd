# SPDX-License-Identifier: Apache-2.0
"""Runs csrc/cuda/*.cpp over the emulated kernels on CPU tensors and compares with the reference; test_glue starts it.

Arguments: the library. Prints the number of calls compared.
"""

import ctypes
import sys

import glue_inputs
import glue_lists
import glue_logits
import glue_row_tangents
import glue_tangents
import glue_vectors
import glue_weight_norms
import torch

from fastflat import _ops
from fastflat._spec import RULES, TINY
from fastflat.backends import reference

LIBRARY = sys.argv[1]
torch.ops.load_library(LIBRARY)
SYMBOLS = ctypes.CDLL(LIBRARY)
compared = 0


def randn(*shape, dtype=torch.float32):
    return (torch.randn(shape, dtype=torch.float64) * 3).to(dtype)


def layouts(dtype):
    """Tensors that the kernels cannot take as they are, beside some that they can; with an axis each."""
    yield randn(6, 33, dtype=dtype), 0
    yield randn(6, 33, dtype=dtype), 1
    yield randn(33, 6, dtype=dtype).t(), 0  # dense, axes swapped
    yield randn(2, 5, 4, 3, dtype=dtype).contiguous(memory_format=torch.channels_last), 1
    yield randn(2, 5, 4, 3, dtype=dtype).permute(3, 0, 2, 1), 2
    yield randn(6, 66, dtype=dtype)[:, ::2], 0  # gaps
    yield randn(6 * 33 + 1, dtype=dtype)[1:].view(6, 33), 0  # off the 16-byte grid
    yield randn(6 * 33 + 1, dtype=dtype)[1:].view(33, 6).t(), 1
    yield randn(1, 33, dtype=dtype).expand(6, 33), 0
    yield randn(6, 1, 33, dtype=dtype), 1
    yield randn(0, 5, dtype=dtype), 1
    yield randn(5, 0, dtype=dtype), 0
    yield randn(4, 3, dtype=dtype)[1], 0


def same(got, want):
    assert (got.dtype, got.shape, got.stride()) == (want.dtype, want.shape, want.stride()), (
        got.stride(),
        want.stride(),
    )
    assert torch.equal(got, want)


def close(got, want):
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-4)


def nearly(got, want):
    """Elements that follow from a sum: equal but for its error, after rounding to their type."""
    assert (got.dtype, got.shape, got.stride()) == (want.dtype, want.shape, want.stride())
    assert torch.allclose(got, want, rtol=1e-4 + torch.finfo(want.dtype).eps, atol=1e-4)


def call(name, *args):
    global compared
    # Else the op would fall back to the reference and be compared with itself.
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastflat::{name}", "CPU"), name
    result = _ops.overload(name)(*args)
    assert SYMBOLS.fastflat_test_guards() == 0
    first = (args[0] or [None])[0] if isinstance(args[0], list) else args[0]
    assert first is None or first.numel() == 0 or SYMBOLS.fastflat_test_on_current_stream()
    compared += 1
    return result


def compare(x, axis, group, result):
    shape = _ops.scale_shape(x.shape, axis, group)
    compute = _ops.compute_dtype(x.dtype)
    scale, zero_point = torch.rand(shape, dtype=compute) + 0.2, randn(*shape, dtype=compute)
    if scale.dim() == 2:
        scale = scale.t().contiguous().t()  # parameters need not be contiguous
    rest = (-8, 7, axis, group, TINY, 0)
    same(call("identity", x), reference.identity(torch.empty_like(x).copy_(x)))
    for zero in (None, zero_point):
        args = (x, scale, zero, *rest)
        same(call("fake_quantize", *args, result), reference.fake_quantize(*args, result))
        gy = randn(*reversed(x.shape), dtype=result).permute(*reversed(range(x.dim())))  # another layout
        for need_scale in (False, True):
            got = call("fake_quantize_bwd", gy, *args, 0.5, need_scale)
            want = reference.fake_quantize_bwd(gy, *args, 0.5, need_scale)
            same(got[0], want[0])
            close(got[1], want[1])
            close(got[2], want[2])
        ts = torch.rand_like(scale)
        for tangents in ((gy, ts, None), (gy.to(x.dtype), None, ts), (None, ts, ts)):
            got = call("fake_quantize_jvp", *tangents, *args, 0.5, result)
            same(got, reference.fake_quantize_jvp(*tangents, *args, 0.5, result))
    got, want = call("fake_quantize_absmax", x, *rest, result), reference.fake_quantize_absmax(x, *rest, result)
    same(got[0], want[0])
    same(got[1], want[1])


def compare_mixed(x, axis, group, result):
    shape, compute = _ops.scale_shape(x.shape, axis, group), _ops.compute_dtype(x.dtype)
    scale, weight = torch.rand((2, *shape), dtype=compute) + 0.2, torch.randn(2, dtype=compute)
    if scale.dim() == 3:
        scale = scale.mT.contiguous().mT  # parameters need not be contiguous
    low = torch.tensor([-2.0, -8.0], dtype=compute)
    candidates = (scale, low, -low - 1, weight)
    rest = (axis, group, TINY, 0)
    same(call("mixquant", x, *candidates, *rest, result), reference.mixquant(x, *candidates, *rest, result))
    gy = randn(*reversed(x.shape), dtype=result).permute(*reversed(range(x.dim())))
    args = (gy, x, *candidates, weight, *rest)
    got, want = call("mixquant_bwd", *args), reference.mixquant_bwd(*args)
    same(got[0], want[0])
    close(got[1], want[1])
    close(got[2], want[2])
    for tangents in ((gy, scale, None), (gy.to(x.dtype), None, weight), (None, scale, weight)):
        args = (*tangents, x, *candidates, weight, *rest, result)
        same(call("mixquant_jvp", *args), reference.mixquant_jvp(*args))


def bitplanes(pair):
    """Planes that the kernels take as they are, and some that they cannot."""
    dtype, result = pair
    compute = _ops.compute_dtype(dtype)
    plane = randn(5, 4, 6, dtype=dtype)
    off_the_grid = randn(5 * 24 + 1, dtype=dtype)[1:].view(5, 4, 6)
    m, scale, beta = randn(10, dtype=compute)[::2], torch.tensor(0.7, dtype=compute), torch.tensor(1.5, dtype=compute)
    for p, q in (
        (plane, off_the_grid),
        (off_the_grid, randn(5, 6, 4, dtype=dtype).transpose(1, 2)),
        (randn(5, 8, 6, dtype=dtype)[:, ::2], plane),
        (plane[:, :0], plane[:, :0]),
    ):
        args = (p, q, m, scale, beta, False, False)
        same(call("bitplane", *args, result), reference.bitplane(*args, result))
        gw = randn(6, p.shape[1], dtype=result).t()
        got, want = call("bitplane_bwd", gw, *args), reference.bitplane_bwd(gw, *args)
        same(got[0], want[0])
        same(got[1], want[1])
        close(got[2], want[2])
        close(got[3], want[3])
        for tangents in ((q, None, m, None), (None, p, None, scale)):
            same(call("bitplane_jvp", *tangents, *args, result), reference.bitplane_jvp(*tangents, *args, result))


def compare_binarized(x, axis, group, result):
    compute = _ops.compute_dtype(x.dtype)
    ga = torch.randn(_ops.scale_shape(x.shape, axis, group), dtype=compute)
    if ga.dim() == 2:
        ga = ga.t().contiguous().t()
    gy = randn(*reversed(x.shape), dtype=result).permute(*reversed(range(x.dim())))
    tx = gy.to(x.dtype)
    full = torch.rand_like(x, dtype=compute)
    shared = torch.rand([1 if d == axis else n for d, n in enumerate(x.shape)], dtype=compute)
    for h in (None, full, torch.stack([full, full], -1)[..., 0], shared):
        (y, alpha), (wanted_y, wanted) = (
            call("binarize", x, h, axis, group, result),
            reference.binarize(x, h, axis, group, result),
        )
        close(alpha, wanted)
        nearly(y, wanted_y)
        rule = (0.8, False, axis, group)
        args = (gy, None, x, h, wanted, *rule)
        same(call("binarize_bwd", *args), reference.binarize_bwd(*args))
        for through, cotangent in ((True, None), (True, ga), (False, ga)):
            rule = (0.8, through, axis, group)
            args = (gy, cotangent, x, h, wanted, *rule)
            nearly(call("binarize_bwd", *args), reference.binarize_bwd(*args))
            args = (tx, x, h, wanted, *rule, result)
            for got, want in zip(call("binarize_jvp", *args), reference.binarize_jvp(*args)):
                nearly(got, want)


def compare_normalised(w, axis, result):
    compute = _ops.compute_dtype(w.dtype)
    moments = call("liq_moments", w, axis)
    for got, want in zip(moments, reference.liq_moments(w, axis)):
        close(got, want)
    if axis >= 0:
        moments = [torch.stack([t, t], -1)[:, 0] for t in moments]  # gaps
    clip = torch.tensor(1.4, dtype=compute)
    point = (w, *moments, clip, 15, axis, TINY)
    same(call("liq", *point, result), reference.liq(*point, result))
    gy = randn(*reversed(w.shape), dtype=result).permute(*reversed(range(w.dim())))
    got, want = call("liq_bwd", gy, *point), reference.liq_bwd(gy, *point)
    same(got[0], want[0])
    close(got[1], want[1])
    for tangents in ((gy.to(w.dtype), clip), (gy.to(w.dtype), None), (None, clip)):
        same(call("liq_jvp", *tangents, *point, result), reference.liq_jvp(*tangents, *point, result))


#: Of general_quantize: no draws, uniform ones, normal ones.
RULE_SETS = (RULES["round_away"], RULES["noise_temper"], RULES["noise_normal"])


def compare_general(x, axis, group, result, rules):
    shape, compute = _ops.scale_shape(x.shape, axis, group), _ops.compute_dtype(x.dtype)
    scale, zero_point = torch.rand(shape, dtype=compute) + 0.2, randn(*shape, dtype=compute)
    if scale.dim() == 2:
        scale = scale.t().contiguous().t()
    state = torch.tensor([5, 1 << 40])
    nu, a, delta = (torch.rand((), dtype=compute) for _ in range(3))
    drawn = (state, nu, a) if rules != RULE_SETS[0] else (None, None, None)
    rest = (-8, 7, axis, group, TINY, rules)
    for zero in (None, zero_point):
        args = (x, scale, zero, *drawn, *rest)
        same(call("general_quantize", *args, result), reference.general_quantize(*args, result))
        gy = randn(*reversed(x.shape), dtype=result).permute(*reversed(range(x.dim())))
        for of_delta, need_scale, need_delta in (
            (None, False, True),
            (delta, True, True),
            (delta, True, False),
            (delta, False, True),
        ):
            args = (gy, x, scale, zero, *drawn, of_delta, *rest, 0.5, need_scale, need_delta)
            got, want = call("general_quantize_bwd", *args), reference.general_quantize_bwd(*args)
            same(got[0], want[0])
            for k in (1, 2, 3):
                close(got[k], want[k])
        ts = torch.rand_like(scale)
        for tangents in ((gy, ts, None), (gy.to(x.dtype), None, ts), (None, ts, ts)):
            args = (*tangents, x, scale, zero, *drawn, *rest, 0.5, result)
            same(call("general_quantize_jvp", *args), reference.general_quantize_jvp(*args))
    for name, outer in (("scale_floor", None), ("scale_e4m3", nu)):
        args = (x, *drawn, outer, 0, 0, *rest[2:5], rules | RULES["e2m1"] | RULES[name], result)
        for got, want in zip(call("general_quantize_dynamic", *args), reference.general_quantize_dynamic(*args)):
            same(got, want)


def compare_lists():
    """All types and layouts in one list, against the ops for one tensor."""
    xs, scales, zeros, gys, axes = [], [], [], [], []
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for i, (x, axis) in enumerate(layouts(dtype)):
            shape = _ops.scale_shape(x.shape, axis, 0)
            scales.append(torch.rand(shape, dtype=_ops.compute_dtype(dtype)) + 0.2)
            zeros.append(torch.randn_like(scales[-1]) * 3 if i % 2 else None)
            gys.append(randn(*reversed(x.shape), dtype=dtype).permute(*reversed(range(x.dim()))))
            xs.append(x)
            axes.append(axis)
    count = len(xs)
    grids = ([-8] * count, [7] * count, axes, [0] * count, [TINY] * count, [0] * count)
    for of_zero in (zeros, []):
        calls = list(zip(xs, scales, of_zero or [None] * count, *grids, strict=True))
        for got, args in zip(call("fake_quantize_list", xs, scales, of_zero, *grids), calls, strict=True):
            same(got, reference.fake_quantize(*args))
        for needs in ([1] * count, [i % 2 for i in range(count)], [0] * count):
            rest = (xs, scales, of_zero, *grids, [0.5] * count, needs)
            gxs, gss, gzs = call("fake_quantize_list_bwd", gys, *rest)
            assert (len(gss), len(gzs)) == (count if any(needs) else 0, count if any(needs) and of_zero else 0)
            for i, args in enumerate(calls):
                gx, gs, gz = _ops.overload("fake_quantize_bwd")(gys[i], *args, 0.5, bool(needs[i]))
                same(gxs[i], gx)
                if gss:
                    same(gss[i], gs)
                if gzs:
                    same(gzs[i], gz)


def refused(text, name, *args):
    message = None
    try:
        _ops.overload(name)(*args)
    except RuntimeError as error:
        message = str(error)
    assert message is not None, f"{name} accepted what it must refuse: {text}"
    assert text in message, message
    assert SYMBOLS.fastflat_test_guards() == 0


torch.manual_seed(0)
calls = 0
PAIRS = [(d, d) for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)]
for dtype, result in [*PAIRS, (torch.float32, torch.bfloat16), (torch.float32, torch.float16)]:
    for x, axis in layouts(dtype):
        compare(x, axis, 0, result)
        compare(x, -1, 0, result)
        compare_mixed(x, axis, 0, result)
        compare_normalised(x, axis, result)
        compare_normalised(x, -1, result)
        calls += 1
        compare_binarized(x, (axis, -1)[calls % 2], 0, result)
        compare_general(x, (axis, -1)[calls % 2], 0, result, RULE_SETS[calls % len(RULE_SETS)])
        if x.shape[-1] % 3 == 0 and x.numel():
            compare(x, -1, 3, result)
            compare_mixed(x, -1, 3, result)
            compare_binarized(x, -1, 3, result)
            compare_general(x, -1, 3, result, RULE_SETS[calls % len(RULE_SETS)])

for pair in [*PAIRS, (torch.float32, torch.bfloat16), (torch.float32, torch.float16)]:
    bitplanes(pair)

compare_lists()
glue_lists.compare_sharpness(call)
glue_lists.refuse_sharpness(refused)
glue_lists.compare_descent(call)
glue_lists.refuse_descent(refused)
glue_vectors.compare(call)
glue_vectors.refuse(refused)
glue_row_tangents.compare(call)
glue_row_tangents.refuse(refused)
glue_inputs.compare(call)
glue_inputs.refuse(refused)
glue_weight_norms.compare(call)
glue_weight_norms.refuse(refused)
glue_logits.compare(call)
glue_logits.refuse(refused)
glue_tangents.compare(call)
glue_tangents.refuse(refused)
x, one = randn(4, 6), torch.ones(())
grid = (-8, 7, -1, 0, TINY, 0)
refused("scale must have 4 values", "fake_quantize", x, torch.ones(3), None, -8, 7, 0, 0, TINY, 0)
refused("scale must be float32", "fake_quantize", x, one.double(), None, *grid)
refused("x must be float32, bfloat16", "fake_quantize", x.int(), one, None, *grid)
refused("group must divide", "fake_quantize", x, one, None, -8, 7, -1, 4, TINY, 0)
refused("gy must have the shape of x", "fake_quantize_bwd", x[1:], x, one, None, *grid, 1.0, True)
refused("tx must have the dtype", "fake_quantize_jvp", x.half(), None, None, x, one, None, *grid, 1.0)
lists = ([x, x], [one, one], [], [-8] * 2, [7] * 2, [-1] * 2, [0] * 2, [TINY] * 2, [0] * 2)
refused("all lists must be as long as xs, 2", "fake_quantize_list", *lists[:1], [one], *lists[2:])
refused("scale must be float32", "fake_quantize_list", *lists[:1], [one, one.double()], *lists[2:])
general = (x, one, None, None, None, None, -8, 7, -1, 0, TINY)
refused("state must be given", "general_quantize", *general, RULES["noise_bypass"])
refused("only where x has 16 bits", "general_quantize", *general, RULES["compute_input"])
words = torch.zeros(3, dtype=torch.int64)
refused("contiguous int64 tensor of 2", "general_quantize", x, one, None, words, *general[4:], RULES["noise_bypass"])
refused("nu must have 1 values", "general_quantize", x, one, None, None, words.float(), *general[5:], 0)
nine = torch.ones(9)
refused("from 1 to 8 candidates", "mixquant", x, nine, nine, nine, nine, -1, 0, TINY, 0)
refused("h must have the axes of x", "binarize", x, x[:2], -1, 0)
refused("h must be float32", "binarize", x, x.double(), -1, 0)
refused("alpha must have 1 values", "binarize_bwd", x, None, x, None, nine, 1.0, True, -1, 0)
refused("ga must have 1 values", "binarize_bwd", x, nine, x, None, one, 1.0, True, -1, 0)
refused("tx must have the dtype of x", "binarize_jvp", x.half(), x, None, one, 1.0, True, -1, 0)
refused("std must have 4 values", "liq", x, torch.ones(4), one, one, 15, 0, TINY)
refused("clip must be float32", "liq", x, one, one, one.double(), 15, -1, TINY)
refused("gy must have the shape of x", "liq_bwd", x[1:], x, one, one, one, 15, -1, TINY)
refused("tw must have the dtype of w", "liq_jvp", x.half(), None, x, one, one, one, 15, -1, TINY)
refused("axis must be less than 2", "liq_moments", x, 2)
refused("q must have the shape of p", "bitplane", x, x[1:], torch.ones(4), one, one, False, False)
refused("m must have 4 values", "bitplane", x, x, torch.ones(3), one, one, False, False)
refused("gw must have the shape of a plane", "bitplane_bwd", x, x, x, torch.ones(4), one, one, False, False)
refused(
    "tp must have the dtype of p", "bitplane_jvp", x.half(), None, None, None, x, x, x[:, 0], one, one, False, False
)
print(compared)

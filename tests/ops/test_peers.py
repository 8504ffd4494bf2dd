# SPDX-License-Identifier: Apache-2.0
"""The named forms of QuantSpec against the libraries that they are named after: y and dx in every bit.

Each test runs against the library where it is installed (``make peers``) and always against its formulas. The kernels
are those in force; that all backends give the same bits is proved elsewhere.
"""

from __future__ import annotations

import pytest
import torch

import fastflat as ff
from fastflat import QuantSpec

from . import comparison, peer_formulas, peer_packages
from .peer_formulas import data, scales

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [FP32, BF16, FP16]


@pytest.fixture(params=[peer_formulas, peer_packages], ids=["formula", "installed"])
def peer(request):
    return request.param


def ours(spec, x, s, z, g):
    """y and the gradients of what trains."""
    given = [t.detach().clone() for t in (x, s, z) if t is not None]
    leaves = [t.requires_grad_() for t in (given if spec.trains_scale else given[:1])]
    y = ff.fake_quantize(*given, spec=spec)
    return y.detach(), *torch.autograd.grad(y, leaves, g)


def parameter(t, spec, dtype=None):
    """[rows, 1] as the spec takes it."""
    flat = t.reshape(-1)[0] if spec.axis is None and spec.group is None else t.reshape(-1)
    return flat if dtype is None else flat.to(dtype)


def assert_same(actual, expected, sign_of_zero=True):
    for a, e in zip(actual[:2], expected[:2]):
        comparison.assert_same_bits(*((a, e) if sign_of_zero else (a + 0.0, e + 0.0)))


def assert_sum(actual, expected, terms):
    """Sums of fp32 terms, in other orders and with other roundings of each: 2**-17 of the sum of magnitudes."""
    assert ((actual - expected).abs() <= terms * 2.0**-17).all(), (actual - expected).abs().max()


def noise(x, seed=9):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.dtype)


# torchao -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_torchao(peer, bits, signed, dtype):
    for scale_type in {FP32, dtype}:
        spec = QuantSpec.torchao(bits, signed, axis=0, compute="fp32" if scale_type is FP32 else "input")
        s = scales(48, bits).to(scale_type)
        z = torch.randint(spec.qmin, spec.qmax + 1, s.shape, generator=torch.Generator().manual_seed(1))
        z[::3] = 0
        x = data(s, dtype, seed=bits)
        expected = peer.torchao(x, s, z.to(torch.int32), noise(x), spec.qmin, spec.qmax)
        assert_same(ours(spec, x, s[:, 0], z[:, 0].to(scale_type), noise(x)), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_torchao_per_tensor_and_in_groups(peer, dtype):
    for spec, rows in ((QuantSpec.torchao(4), 1), (QuantSpec.torchao(4, group=16), 96)):
        s = scales(rows, 2) if rows > 1 else torch.tensor([[0.037]])
        x = data(s, dtype, seed=3, columns=16 if rows > 1 else 700)
        z = torch.full(s.shape, -3, dtype=torch.int32)
        expected = peer.torchao(x, s, z, noise(x), -8, 7)
        if rows > 1:
            x, s, z = x.view(24, 64), s.view(24, 4), z.view(24, 4)
            expected = [t.view(24, 64) for t in expected[:2]]
        else:
            s, z = s[0, 0], z[0, 0]
        assert_same(ours(spec, x, s, z.float(), noise(x.view(expected[0].shape))), expected)


def test_torchao_zero_point_of_zero_may_be_left_out():
    s, spec = scales(48, 2), QuantSpec.torchao(4, axis=0)
    x = data(s, FP32, seed=3)
    assert_same(ours(spec, x, s[:, 0], None, noise(x)), ours(spec, x, s[:, 0], torch.zeros(48), noise(x)))
    y = ff.fake_quantize(x, s[:, 0], spec=spec.replace(signed_zero=True))
    assert (y.signbit() & (y == 0)).any()  # what signed_zero=False is for


@pytest.mark.parametrize("trained_zero", [False, True])
def test_torchao_range_learning(peer, trained_zero):
    """A zero-point that is trained is not rounded, and its code not clamped."""
    spec = QuantSpec.torchao(4, axis=0, estimator="lsq", zero="outside_float" if trained_zero else "outside")
    s = scales(48, 4)
    z = torch.linspace(-9.3, 8.7, 48)[:, None] if trained_zero else torch.zeros(48, 1)
    x = data(s, FP32, seed=5, special=False)
    y, dx, ds, dz = peer.torchao(x, s, z, noise(x), -8, 7)
    actual = ours(spec, x, s[:, 0], z[:, 0], noise(x))
    assert_same(actual, (y, dx))
    size = noise(x).abs()
    assert_sum(actual[2], ds[:, 0], (size * (y.abs() + x.abs()) / s).sum(1))
    assert_sum(actual[3], dz[:, 0], (size * s).sum(1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_torchao_weight_quantizer(bits, dtype):
    """IntxFakeQuantizer as its users make it: symmetric, dynamic, per channel and in groups."""
    qat = peer_packages.package("torchao.quantization.qat")
    kind = {2: torch.int2, 4: torch.int4, 8: torch.int8}[bits]
    for form in ({"granularity": "per_channel"}, {"group_size": 16}):
        group = form.get("group_size")
        x = data(scales(48, bits), dtype, seed=bits, special=False)
        x[0] = 0.0
        x[2, 5] = 6e4
        x[4::2] = (x[4::2].float() * 100).round().clamp(-100, 100).to(dtype) / 128  # ties of the scale 2**-k
        leaf = x.clone().requires_grad_()
        expected = qat.IntxFakeQuantizer(qat.IntxFakeQuantizeConfig(kind, **form))(leaf)
        (dx,) = torch.autograd.grad(expected, leaf, noise(x))
        s = peer_formulas.torchao_scale(x.view(48, -1, group or 64), bits)[..., 0]
        spec = QuantSpec.torchao(bits, axis=None if group else 0, group=group)
        s = s if group else s[:, 0]
        assert_same(ours(spec, x, s, torch.zeros_like(s), noise(x)), (expected.detach(), dx))


def test_torchao_learned_weight_quantizer():
    qat = peer_packages.package("torchao.quantization.qat")
    config = qat.IntxFakeQuantizeConfig(
        torch.int4, "per_channel", is_symmetric=True, is_dynamic=False, range_learning=True
    )
    quantizer = qat.IntxFakeQuantizer(config)
    quantizer._initialized = True
    x = data(scales(48, 4), FP32, seed=6, special=False).requires_grad_()
    quantizer(x)  # makes the scale
    y = quantizer(x)
    dx, ds = torch.autograd.grad(y, [x, quantizer.scale], noise(x))
    s = quantizer.scale.detach().reshape(-1)
    actual = ours(QuantSpec.torchao(4, axis=0, estimator="lsq"), x, s, torch.zeros(48), noise(x))
    assert_same(actual, (y.detach(), dx))
    assert_sum(actual[2], ds.reshape(-1), (noise(x).abs() * (y.abs() + x.abs()).detach()).sum(1) / s)


# Brevitas ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", [True, False], ids=["TensorClampSte", "TensorClamp"])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_brevitas(peer, bits, signed, weight, dtype):
    for narrow in (False, True):
        spec = QuantSpec.brevitas(bits, signed, axis=0, weight=weight, narrow=narrow, compute="input")
        for zero in (0.0, 3.0, 2.4):
            s = scales(48, bits).to(dtype)
            x = data(s, dtype, seed=bits)
            z = torch.tensor(zero, dtype=dtype)
            expected = peer.brevitas(x, s, z, noise(x), spec.qmin, spec.qmax, weight)
            # An unsigned grid: theirs keeps -0 of a small negative x, ours clamps it to +0.
            assert_same(ours(spec, x, s[:, 0], z.expand(48).contiguous(), noise(x)), expected, sign_of_zero=signed)


@pytest.mark.parametrize("weight", [True, False], ids=["TensorClampSte", "TensorClamp"])
def test_brevitas_scale_gradient(peer, weight):
    spec = QuantSpec.brevitas(4, axis=0, weight=weight, estimator="lsq")
    s = scales(48, 1)
    x = data(s, FP32, seed=7, special=False)
    y, dx, ds = peer.brevitas(x, s, torch.tensor(0.0), noise(x), spec.qmin, spec.qmax, weight)
    actual = ours(spec, x, s[:, 0], torch.zeros(48), noise(x))
    assert_same(actual, (y, dx))
    assert_sum(actual[2], ds[:, 0], (noise(x).abs() * (y.abs() + x.abs()) / s).sum(1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("bits", [4, 8])
def test_brevitas_weight_quantizers(bits, axis, dtype):
    """Int8WeightPerTensorFloat and Int8WeightPerChannelFloat: the scale is max|w| / qmax, in the graph."""
    quantizers, layers = peer_packages.package("brevitas.quant"), peer_packages.package("brevitas.nn")
    made_by = quantizers.Int8WeightPerTensorFloat if axis is None else quantizers.Int8WeightPerChannelFloat
    layer = layers.QuantLinear(64, 24, bias=False, weight_quant=made_by, weight_bit_width=bits).to(dtype)
    w = data(scales(24, bits), dtype, seed=8, special=False)
    if dtype is not FP16:  # their least scale, 1e-10, is 0 there: 0/0
        w[3] = 0.0
    layer.weight.data.copy_(w)
    theirs = layer.quant_weight()
    g = noise(w)
    (expected,) = torch.autograd.grad(theirs.value, layer.weight, g)

    spec = QuantSpec.brevitas(bits, axis=axis, compute="input", estimator="lsq")
    leaf = w.clone().requires_grad_()
    top = leaf.abs().max() if axis is None else leaf.abs().max(1)[0]
    s = top.clamp_min(1e-10) / torch.tensor(float(spec.qmax))
    assert torch.equal(s.detach().reshape(-1), theirs.scale.detach().reshape(-1))
    y = ff.fake_quantize(leaf, s, torch.zeros_like(s), spec=spec)
    comparison.assert_same_bits(y.detach(), theirs.value.detach())
    (actual,) = torch.autograd.grad(y, leaf, g)
    largest = w.abs() == (w.abs().max() if axis is None else w.abs().amax(1, keepdim=True))
    assert torch.equal(actual[~largest], expected[~largest])
    if dtype is FP32:  # where the maximum is, dx holds ds, a sum; in bf16 theirs is summed in bf16
        terms = (g.abs() * 2).sum() if axis is None else (g.abs() * 2).sum(1, keepdim=True).expand_as(w)[largest]
        assert_sum(actual[largest], expected[largest], terms)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("signed", [True, False], ids=["QuantIdentity", "QuantReLU"])
def test_brevitas_learned_activations(signed, dtype):
    """The scale is |value| / 8 or value / 15 at 4 bits."""
    layers = peer_packages.package("brevitas.nn")
    layer = (layers.QuantIdentity if signed else layers.QuantReLU)(bit_width=4).to(dtype)
    layer.train()
    layer(data(torch.tensor([[0.1]]), dtype, seed=1, columns=900, special=False))
    scaling = layer.act_quant.fused_activation_quant_proxy.tensor_quant.scaling_impl
    scaling.init_scale()
    s = (scaling.value.detach().abs().clamp_min(1e-10) / torch.tensor([8.0 if signed else 15.0], dtype=dtype))[0]
    x = data(s.float().reshape(1, 1), dtype, seed=2, columns=900)
    g = noise(x)
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    (expected,) = torch.autograd.grad(y, leaf, g)
    leaf = x.clone().requires_grad_()
    spec = QuantSpec.brevitas(4, signed, weight=False, compute="input")
    actual = ff.fake_quantize(leaf if signed else leaf.relu(), s, torch.zeros_like(s), spec=spec)
    assert_same((actual.detach(), *torch.autograd.grad(actual, leaf, g)), (y.detach(), expected), sign_of_zero=signed)


# Model-Optimizer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_modelopt(peer, bits, signed, dtype):
    for narrow, straight, per_channel in ((False, False, True), (signed, True, True), (signed, False, False)):
        spec = QuantSpec.modelopt(bits, signed, axis=0 if per_channel else None, narrow=narrow)
        spec = spec.replace(mask="none") if straight else spec
        s = scales(48, bits) if per_channel else torch.tensor(0.037)
        x = data(s, dtype, seed=bits)
        x = x if signed else x.abs()
        amax = (s * spec.qmax).to(dtype).float()  # PyTorch rounds a 0-dim fp32 amax to the type of x to compare them
        if per_channel:
            amax[:3, 0] = torch.tensor([0.0, 2.0**-24, 2.0**-23])
        for amax_type in {FP32, dtype}:
            expected = peer.modelopt(x, amax.to(amax_type), noise(x), int(spec.qmin), spec.qmax, straight)
            assert_same(ours(spec, x, amax.to(amax_type).reshape(-1 if per_channel else ()), None, noise(x)), expected)


def test_modelopt_tensor_quantizer():
    """As its users make it: the gradient passes everywhere."""
    config = peer_packages.package("modelopt.torch.quantization.config")
    module = peer_packages.package("modelopt.torch.quantization.nn.modules.tensor_quantizer")
    x = data(scales(48, 3), FP32, seed=4, special=False)
    quantizer = module.TensorQuantizer(config.QuantizerAttributeConfig(num_bits=4, axis=0))
    quantizer.amax = x.abs().amax(1, keepdim=True)
    leaf = x.clone().requires_grad_()
    y = quantizer(leaf)
    (dx,) = torch.autograd.grad(y, leaf, noise(x))
    spec = QuantSpec.modelopt(4, axis=0, mask="none")
    assert_same(ours(spec, x, quantizer.amax[:, 0], None, noise(x)), (y.detach(), dx))


def test_modelopt_learned_blocks(peer):
    amax = torch.rand(96, 1, generator=torch.Generator().manual_seed(2)) * 0.3 + 0.1
    x = data(amax / 7, FP32, seed=3, columns=16, special=False)
    y, dx, da = peer.modelopt_block(x, amax, noise(x), -8, 7)
    spec = QuantSpec(4, axis=0, through="chain", estimator="lsq", scale_is="absmax")
    actual = ours(spec, x, amax[:, 0], None, noise(x))
    assert_same(actual, (y, dx))
    assert_sum(actual[2], da[:, 0], (noise(x).abs() * (y.abs() + x.abs()) / amax).sum(1))


# Block formats -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("rule", ["floor", "ceil", "even", "rceil"])
@pytest.mark.parametrize("format", ["e4m3", "e5m2", "e3m2", "e2m3", "e2m1"])
def test_mx(peer, format, rule, dtype):
    x = peer_formulas.blocks(dtype)
    y, scale = peer.mx(x, format, rule)
    leaf = x.clone().requires_grad_()
    actual, found = ff.fake_quantize_dynamic(leaf, spec=QuantSpec.mx(format, rule))
    some = x.abs().amax(1) > 0  # the scale of a block of zeros means nothing
    assert torch.equal(found[some], scale[some])
    comparison.assert_same_bits(actual.detach(), y)
    assert torch.equal(torch.autograd.grad(actual, leaf, x)[0], x)


@pytest.mark.parametrize("rule", ["floor", "ceil", "even", "rceil"])
@pytest.mark.parametrize("format", ["e4m3", "e5m2", "e3m2", "e2m3", "e2m1"])
def test_mx_of_nan_and_infinity(format, rule):
    """A NaN makes its block NaN; beside an infinity everything is 0. Their scale of infinity is 2**128 or NaN."""
    x = torch.ones(4, 32)
    x[0, 3], x[1, 3], x[2, 3], x[3] = float("nan"), float("inf"), -float("inf"), 3.4e38
    actual, _ = ff.fake_quantize_dynamic(x, spec=QuantSpec.mx(format, rule))
    assert actual[0].isnan().all()
    assert actual[1].tolist() == [0.0] * 3 + [float("inf")] + [0.0] * 28
    assert actual[2].tolist() == [0.0] * 3 + [-float("inf")] + [0.0] * 28
    y, _ = peer_packages.mx(x, format, rule)
    comparison.assert_same_bits(actual, y)


@pytest.mark.parametrize("format", ["e4m3", "e5m2", "e3m2", "e2m3", "e2m1"])
def test_mx_differs_at_the_smallest_scale_alone(format):
    """Blocks that torchao gives 2**-127, the least of E8M0, have 2**-126 here, the least normal number."""
    x = peer_formulas.blocks(FP32) * 2.0**-39
    y, scale = peer_packages.mx(x, format, "floor")
    actual, found = ff.fake_quantize_dynamic(x, spec=QuantSpec.mx(format))
    smallest = scale[:, 0] == 2.0**-127
    assert 0 < smallest.sum() < len(x)
    assert torch.equal(actual[~smallest], y[~smallest])
    assert (found[smallest] == 2.0**-126).all()


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_nvfp4(peer, dtype):
    """Scales are theirs in every bit, and y off the borders of codes: they multiply by (1/outer)/inner where ours
    divides by the scale outer*inner, which may decide otherwise within the error of these three roundings."""
    generator = torch.Generator().manual_seed(4)
    x = (torch.randn(64, 256, generator=generator) * 0.3).to(dtype)
    x[0], x[1] = 0.0, x[1] * 1e-4
    y, scale = peer.nvfp4(x)
    actual, found = ff.fake_quantize_dynamic(x, spec=QuantSpec.nvfp4())
    assert torch.equal(found, scale)
    u = (x.double() / scale.repeat_interleave(16, 1)).abs()
    borders = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=torch.float64)
    beside = ((u.unsqueeze(-1) - borders).abs() < u.unsqueeze(-1) * 2.0**-22).any(-1)
    assert beside.float().mean() < 0.01
    assert torch.equal(actual[~beside], y[~beside])


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_nvfp4_with_an_outer_scale_of_a_power_of_two(peer, dtype):
    """Then a product with 1/scale is theirs in every bit, on the borders, too."""
    generator = torch.Generator().manual_seed(5)
    x = (torch.randn(64, 256, generator=generator)).to(dtype).clamp(-2.625, 2.625)
    x[2, 0] = 2.625  # 448 * 6 * 2**-10
    scale = peer.nvfp4(x)[1].repeat_interleave(16, 1)
    for i, border in enumerate((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, -5.0)):
        at = (border * scale[:, i + 1 :: 16]).to(dtype)
        x[:, i + 1 :: 16] = torch.where(at.abs() < x[:, ::16].abs(), at, x[:, i + 1 :: 16])
    y, scale = peer.nvfp4(x)
    actual, found = ff.fake_quantize_dynamic(x, spec=QuantSpec.nvfp4(arithmetic="reciprocal"))
    assert torch.equal(found, scale)
    comparison.assert_same_bits(actual, y)
    assert not torch.equal(ff.fake_quantize_dynamic(x, spec=QuantSpec.nvfp4())[0], y)


# What these tests notice ---------------------------------------------------------------------------------------------

WRONG = {
    "torchao": [
        {"arithmetic": "divide"}, {"through": "exact"}, {"mask": "before"}, {"mask": "none"}, {"zero": "inside"},
        {"nan_gradient": "pass"}, {"nan": "qmin"}, {"rounding": "away"}, {"narrow": True},
    ],
    "torchao_trained": [{"zero": "outside"}, {"zero": "float"}],
    "brevitas": [
        {"arithmetic": "reciprocal"}, {"through": "exact"}, {"mask": "before"}, {"mask": "none"},
        {"nan_gradient": "stop"}, {"zero": "inside"}, {"zero": "outside_float"}, {"narrow": True}, {"compute": "fp32"},
    ],
    "modelopt": [{"mask": "after", "narrow": True}, {"mask": "none"}, {"eps": 2.0**-126}, {"narrow": True}],
    "modelopt_divided": [{"arithmetic": "divide", "mask": "after"}, {"arithmetic": "reciprocal", "mask": "after"}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "change"),
    [(name, change) for name, changes in WRONG.items() for change in changes],
    ids=lambda value: value if isinstance(value, str) else "-".join(f"{k}={v}" for k, v in value.items()),
)
def test_a_wrong_convention_is_noticed(name, change):
    s = scales(48, 11)
    z = torch.randint(-8, 8, s.shape, generator=torch.Generator().manual_seed(1)).float()
    x = data(s, FP32, seed=12)
    if name.startswith("torchao"):
        zero = z + 0.37 if name.endswith("trained") else z
        spec = QuantSpec.torchao(4, axis=0, zero="outside_float" if name.endswith("trained") else "outside")
        expected = peer_formulas.torchao(x, s, zero, noise(x), -8, 7)
    elif name == "brevitas":
        s, x, zero = s.bfloat16(), data(s.bfloat16(), BF16, seed=12), (z + 0.37).bfloat16()
        spec = QuantSpec.brevitas(4, axis=0, weight=False, compute="input")
        expected = peer_formulas.brevitas(x, s, zero, noise(x), -8, 7, straight=False)
        if change.get("arithmetic") or change.get("through"):  # bf16 rounds these away
            s, x, zero = s.float(), data(s, FP32, seed=12), zero.float()
            expected = peer_formulas.brevitas(x, s, zero, noise(x), -8, 7, straight=False)
    else:
        s, zero = s * 7, None
        s[:2, 0] = torch.tensor([0.0, 2.0**-24])
        spec = QuantSpec.modelopt(4, axis=0)
        expected = peer_formulas.modelopt(x, s, noise(x), -8, 7)
    zero = None if zero is None else zero[:, 0]
    assert_same(ours(spec, x, s[:, 0], zero, noise(x)), expected)
    if name == "modelopt_divided":
        s = s / 7
        live = slice(2, None)  # eps says what the first two are
        wrong = ours(spec.replace(eps=2.0**-126, **change), x[live], s[live, 0], None, noise(x)[live])
        assert not torch.equal(wrong[0].nan_to_num(0.5), expected[0][live].nan_to_num(0.5))
        return
    with pytest.raises(AssertionError):
        assert_same(ours(spec.replace(**change), x, s[:, 0], zero, noise(x)), expected)

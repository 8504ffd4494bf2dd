# SPDX-License-Identifier: Apache-2.0
"""Named forms against the operators whose numbers they promise, and the defects of peers that must not be ours."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import Function

import fastflat as ff

from . import comparison as common

pytestmark = pytest.mark.usefixtures("on_backend")

SCALES = [0.1, 0.037, 1 / 3, 2.0, 1e-3, 1e4]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_torch_per_tensor_is_exact(bits, signed):
    spec = ff.QuantSpec.torch(bits, signed)
    x = common.random_data((5000,), seed=bits)
    for scale in SCALES:
        for zero in {0, spec.qmin, spec.qmax, (spec.qmin + spec.qmax) // 2}:
            theirs = x.clone().requires_grad_()
            ours = x.clone().requires_grad_()
            expected = torch.fake_quantize_per_tensor_affine(theirs, scale, zero, spec.qmin, spec.qmax)
            z = torch.tensor(float(zero))
            actual = ff.fake_quantize(ours, torch.tensor(scale), z, spec=spec)
            common.assert_same_bits(actual.detach(), expected.detach())
            g = torch.randn_like(x)
            actual.backward(g)
            expected.backward(g)
            assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_torch_per_channel_is_exact(axis):
    spec = ff.QuantSpec.torch(4, axis=axis)
    x = common.random_data((8, 8, 8), seed=3)
    scale = torch.rand(8) * 0.3 + 0.01
    zero = torch.randint(-8, 8, (8,), dtype=torch.int32)
    theirs = x.clone().requires_grad_()
    expected = torch.fake_quantize_per_channel_affine(theirs, scale, zero, axis % 3, -8, 7)
    ours = x.clone().requires_grad_()
    actual = ff.fake_quantize(ours, scale, zero.float(), spec=spec)
    common.assert_same_bits(actual.detach(), expected.detach())
    g = torch.randn_like(x)
    actual.backward(g)
    expected.backward(g)
    assert torch.equal(ours.grad, theirs.grad)


def test_torch_learnable_gradients():
    spec = ff.QuantSpec.torch(4, estimator="lsq", grad_scale=0.3)
    x = common.random_data((3000,), special=False)
    scale, zero = torch.tensor([0.21]), torch.tensor([2.0])
    leaves = [t.clone().requires_grad_() for t in (x, scale, zero)]
    expected = torch._fake_quantize_learnable_per_tensor_affine(*leaves, -8, 7, 0.3)
    ours = [t.clone().requires_grad_() for t in (x, scale[0], zero[0])]
    actual = ff.fake_quantize(*ours, spec=spec)
    assert torch.equal(actual, expected)
    g = torch.randn_like(x)
    expected = torch.autograd.grad(expected, leaves, g)
    actual = torch.autograd.grad(actual, ours, g)
    assert torch.equal(actual[0], expected[0])
    for a, e in zip(actual[1:], expected[1:]):
        torch.testing.assert_close(a, e[0], rtol=1e-5, atol=1e-4)  # they sum 3000 fp32 terms in another order


class _Round(Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g


class _ScaleGradient(Function):
    @staticmethod
    def forward(ctx, s, factor):
        ctx.factor = factor
        return s.view_as(s)

    @staticmethod
    def backward(ctx, g):
        return g * ctx.factor, None


def eager_lsq(x: Tensor, s: Tensor, qmin: int, qmax: int) -> Tensor:
    """The paper's pseudo-code (Esser et al., 2020, appendix), one scale."""
    s = _ScaleGradient.apply(s, 1 / math.sqrt(x.numel() * qmax))
    return _Round.apply((x / s).clamp(qmin, qmax)) * s


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_lsq_paper_form_is_exact(bits, signed):
    spec = ff.QuantSpec.lsq(bits, signed)
    x = common.random_data((4000,), seed=bits)
    for scale in SCALES:
        ours = [x.clone().requires_grad_(), torch.tensor(scale).requires_grad_()]
        theirs = [t.detach().clone().requires_grad_() for t in ours]
        actual, expected = ff.fake_quantize(*ours, spec=spec), eager_lsq(*theirs, spec.qmin, spec.qmax)
        assert torch.equal(actual.isnan(), expected.isnan())
        assert torch.equal(actual.nan_to_num(0.0), expected.nan_to_num(0.0))
    x = common.random_data((4000,), seed=bits, special=False)
    ours = [x.clone().requires_grad_(), torch.tensor(0.2).requires_grad_()]
    theirs = [t.detach().clone().requires_grad_() for t in ours]
    g = torch.randn_like(x)
    actual = torch.autograd.grad(ff.fake_quantize(*ours, spec=spec), ours, g)
    expected = torch.autograd.grad(eager_lsq(*theirs, spec.qmin, spec.qmax), theirs, g)
    # Theirs is (g s) / s, rounded twice; and they add x/s and q in separate sums.
    assert torch.equal(actual[0] != 0, expected[0] != 0)
    torch.testing.assert_close(actual[0], expected[0], rtol=2**-22, atol=0)
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-4, atol=1e-5)


def test_lsq_plus_offset():
    """LSQ+ (eq. 1-3): y = round(clamp((x - b)/s)) s + b, with b = -z s."""
    spec = ff.QuantSpec.lsq(4, signed=False, symmetric=False, zero="float", grad_scale="none")
    x = torch.randn(2000, dtype=torch.float64) + 1
    s, b = torch.tensor(0.3, dtype=torch.float64), torch.tensor(-1.7, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (x, s, b)]
    v = (leaves[0] - leaves[2]) / leaves[1]
    expected = _Round.apply(v.clamp(0, 15)) * leaves[1] + leaves[2]
    ours = [t.clone().requires_grad_() for t in (x, s, b)]
    actual = ff.fake_quantize(ours[0], ours[1], -ours[2] / ours[1], spec=spec)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(x)
    torch.testing.assert_close(
        torch.autograd.grad(actual, ours, g), torch.autograd.grad(expected, leaves, g), rtol=1e-9, atol=1e-9
    )


# Defects of peers (quantized training libraries read for this project); each is a test that ours passes. -------------


def test_forward_and_backward_round_the_zero_point_alike():
    """PyTorch's learnable form rounds -1.7 to -2 forward and to -1 backward, and 2.5 to 2 and 3."""
    spec = ff.QuantSpec.torch(4, estimator="lsq")
    x, s = torch.linspace(-3, 3, 601), torch.tensor(0.25)
    for z in (-1.7, 2.5, -0.5):
        zero = torch.tensor(z)
        rounded = torch.tensor(float(round(z)))
        a = [t.clone().requires_grad_() for t in (x, s, zero)]
        b = [t.clone().requires_grad_() for t in (x, s, rounded)]
        g = torch.randn_like(x)
        results = [(f := ff.fake_quantize(*v, spec=spec), *torch.autograd.grad(f, v, g)) for v in (a, b)]
        for left, right in zip(*results):
            assert torch.equal(left, right)


def test_gradient_falls_in_the_bin_of_the_value_at_ties():
    """PyTorch's learnable backward rounds z + x/s at once, the forward x/s alone: other bins at ties with odd z."""
    spec = ff.QuantSpec.torch(4, estimator="lsq")
    x, s, z = torch.tensor([0.5, 1.5, -0.5, -2.5]), torch.tensor(1.0), torch.tensor(1.0)
    leaf = s.clone().requires_grad_()
    for i in range(4):
        y = ff.fake_quantize(x[i : i + 1], leaf, z, spec=spec)
        (gs,) = torch.autograd.grad(y.sum(), leaf)
        assert gs.item() == (y.item() - x[i].item()) / s.item()


def test_channel_axis_negative_and_strided():
    """Peers took the wrong channel for negative axes and wrong values for non-contiguous input."""
    x = torch.randn(4, 5, 6)
    s = torch.rand(6) + 0.1
    y = ff.fake_quantize(x, s, spec=ff.QuantSpec(4, axis=-1))
    for c in range(6):
        assert torch.equal(y[..., c], ff.fake_quantize(x[..., c], s[c], spec=ff.QuantSpec(4)))
    strided = torch.randn(6, 10, 5).permute(2, 0, 1)[:, :, ::2]
    expected = ff.fake_quantize(strided.contiguous(), s, spec=ff.QuantSpec(4, axis=1))
    assert torch.equal(ff.fake_quantize(strided, s, spec=ff.QuantSpec(4, axis=1)), expected)


def test_mask_sees_unclamped_codes():
    """A peer computed its mask from clamped codes: always true."""
    x = torch.tensor([-9.0, 0.3, 9.0], requires_grad=True)
    ff.fake_quantize(x, torch.tensor(0.5), spec=ff.QuantSpec(4)).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 0.0]


def test_scale_of_zero_or_below_stays_finite():
    """LSQ scales that crossed zero gave NaN in peers."""
    spec = ff.QuantSpec.lsq(4, axis=0)
    x = torch.randn(4, 50, requires_grad=True)
    s = torch.tensor([0.0, -0.1, -0.0, 1e-45], requires_grad=True)
    y = ff.fake_quantize(x, s, spec=spec)
    gx, gs = torch.autograd.grad(y.sum(), (x, s))
    assert all(bool(t.isfinite().all()) for t in (y, gx, gs))
    nan = ff.fake_quantize(x, torch.full((4,), float("nan")), spec=spec)
    assert bool(nan.isnan().all())


def test_one_bit_grids():
    """A 1-bit signed grid has qmax 0: peers divided by it."""
    for signed, codes in ((True, {-1.0, 0.0}), (False, {0.0, 1.0})):
        spec = ff.QuantSpec.lsq(1, signed)
        x, s = torch.randn(100, requires_grad=True), torch.tensor(1.0, requires_grad=True)
        y = ff.fake_quantize(x, s, spec=spec)
        assert {abs(v) * (1 if v > 0 else -1) + 0.0 for v in y.tolist()} <= codes
        assert bool(torch.autograd.grad(y.sum(), s)[0].isfinite())


def test_empty_tensors():
    for spec, shape, parameters in ((ff.QuantSpec.lsq(4), (0,), ()), (ff.QuantSpec.lsq(4, axis=1), (0, 3), (3,))):
        x, s = torch.empty(shape, requires_grad=True), torch.ones(parameters, requires_grad=True)
        y = ff.fake_quantize(x, s, spec=spec)
        gx, gs = torch.autograd.grad(y, (x, s), y.detach())
        assert gx.shape == shape
        assert gs.tolist() == torch.zeros(parameters).tolist()


def test_group_scales_train_alone():
    spec = ff.QuantSpec.lsq(4, group=4, grad_scale="none")
    x, s = torch.randn(3, 8), (torch.rand(3, 2) + 0.1).requires_grad_()
    ff.fake_quantize(x, s, spec=spec)[1, 4:].sum().backward()
    assert s.grad.count_nonzero() == 1
    assert s.grad[1, 1] != 0

# SPDX-License-Identifier: Apache-2.0
"""Brevitas' quantizers, swapped at their proxies."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

import fastflat as ff

from . import alike

qnn = pytest.importorskip("brevitas.nn")
quant = pytest.importorskip("brevitas.quant")
pytestmark = pytest.mark.filterwarnings("ignore")

WEIGHTS = {
    "tensor": {"weight_quant": quant.Int8WeightPerTensorFloat, "weight_bit_width": 4},
    "channel": {"weight_quant": quant.Int8WeightPerChannelFloat, "weight_bit_width": 4},
    "2 bits": {"weight_bit_width": 2},
    "whole grid": {"weight_bit_width": 4, "weight_narrow_range": False},
    "power of two": {"weight_quant": quant.Int8WeightPerTensorFixedPoint, "weight_bit_width": 4},
    "asymmetric": {"weight_quant": quant.ShiftedUint8WeightPerTensorFloat, "weight_bit_width": 4},
    "asymmetric channel": {"weight_quant": quant.ShiftedUint8WeightPerChannelFloat, "weight_bit_width": 4},
    "learned": {"weight_bit_width": 4, "weight_scaling_impl_type": "parameter_from_stats"},
    "constant": {"weight_bit_width": 4, "weight_scaling_impl_type": "const", "weight_scaling_init": 0.2},
    "ternary": {"weight_quant": quant.SignedTernaryWeightPerTensorConst, "weight_scaling_init": 0.2},
}
ACTIVATIONS = {
    "relu": (qnn.QuantReLU, {"bit_width": 4}),
    "relu, 8 bits": (qnn.QuantReLU, {}),
    "identity": (qnn.QuantIdentity, {"bit_width": 4}),
    "tanh": (qnn.QuantTanh, {"bit_width": 4}),
    "unsigned": (qnn.QuantIdentity, {"act_quant": quant.Uint8ActPerTensorFloat, "bit_width": 3}),
    "asymmetric": (qnn.QuantIdentity, {"act_quant": quant.ShiftedUint8ActPerTensorFloat, "bit_width": 4}),
    "power of two": (qnn.QuantReLU, {"act_quant": quant.Uint8ActPerTensorFixedPoint, "bit_width": 4}),
    "constant": (qnn.QuantReLU, {"bit_width": 4, "scaling_impl_type": "const", "scaling_init": 2.0}),
    "parameter": (qnn.QuantReLU, {"bit_width": 4, "scaling_impl_type": "parameter", "scaling_init": 2.0}),
    "channels": (
        qnn.QuantReLU,
        {
            "bit_width": 4,
            "scaling_per_output_channel": True,
            "per_channel_broadcastable_shape": (1, 6, 1, 1),
            "scaling_stats_permute_dims": (1, 0, 2, 3),
        },
    ),
}


def conv(**options):
    return qnn.QuantConv2d(4, 8, 3, bias=False, **options)


def both(make):
    """A module and an accelerated copy of it."""
    torch.manual_seed(0)
    theirs = make()
    ours = copy.deepcopy(theirs)
    report = ff.accelerate(ours, strict=True)
    assert len(report.swapped) == 1
    return theirs, ours


def compare(theirs, ours, x, exact=True):
    """y and all else that a call returns, bit for bit; gradients of x where they hold no sum, others as sums."""
    results = []
    for module in (theirs, ours):
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        fields = [f for f in out if isinstance(f, Tensor)] if isinstance(out, tuple) else [out]
        g = torch.randn(
            x.shape if fields[0].shape == x.shape else fields[0].shape, generator=torch.Generator().manual_seed(2)
        )
        parameters = dict(module.named_parameters())
        loss = (fields[0] * g.to(fields[0].dtype)).sum()
        grads = torch.autograd.grad(loss, [leaf, *parameters.values()], allow_unused=True)
        results.append((fields, dict(zip(["x", *parameters], grads, strict=True))))
    (fields, expected), (others, found) = results
    for a, b in zip(fields, others, strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype
    for name, grad in expected.items():
        coarse = grad is not None and grad.element_size() == 2
        close = {"rtol": 2e-2, "atol": 0.1} if coarse else {"rtol": 1e-3, "atol": 1e-4}
        close = {"rtol": 0, "atol": 0} if name == "x" and exact else close
        torch.testing.assert_close(found[name], grad, **close)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights(kind):
    theirs, ours = both(lambda: conv(**WEIGHTS[kind]))
    x = torch.randn(2, 4, 7, 7)
    for mode in (True, False):
        theirs.train(mode), ours.train(mode)
        compare(
            theirs.weight_quant, ours.weight_quant, theirs.weight.detach(), kind in ("constant", "ternary", "learned")
        )
        compare(theirs, ours, x)
    with torch.no_grad():
        ours.weight.mul_(2), theirs.weight.mul_(2)
        assert torch.equal(theirs(x), ours(x))


@pytest.mark.parametrize("returned", [False, True])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations(kind, returned):
    make, options = ACTIVATIONS[kind]
    theirs, ours = both(lambda: make(return_quant_tensor=returned, **options))
    collecting = [m for m in (*theirs.modules(), *ours.modules()) if hasattr(m, "collect_stats_steps")]
    for m in collecting:
        m.collect_stats_steps = 2
    shapes = [(3, 6, 5, 5), (2, 6, 33, 31)] if kind == "channels" else [(3, 6, 5, 5), (7,), (2, 1025)]
    for call, shape in enumerate(shapes * 2):
        x = torch.randn(shape) * 2
        if len(shape) == 4 and call % 2:
            x = x.to(memory_format=torch.channels_last)
        compare(theirs, ours, x, exact=call >= 2 or not collecting)
    theirs.eval(), ours.eval()
    compare(theirs, ours, torch.randn(shapes[0]))
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: conv(weight_quant=quant.Int4WeightPerTensorFloatDecoupled), "one scale to divide by and another"),
        (lambda: conv(weight_quant=quant.Int8AccumulatorAwareWeightQuant), "forward of its own"),
        (lambda: conv(weight_quant=quant.Fp8e4m3WeightPerTensorFloat), "FloatQuant is not RescalingIntQuant"),
        (lambda: conv(weight_bit_width_impl_type="parameter"), "its bit width is BitWidthParameter"),
        (lambda: qnn.QuantReLU(float_to_int_impl_type="floor"), "its rounding is FloorSte"),
        (lambda: qnn.QuantReLU(quant_delay_steps=3), "its delay is _DelayQuant"),
    ],
)
def test_left_alone(make, why):
    report = ff.accelerate(nn.Sequential(make()))
    assert why in report.left[0].why
    assert not report.swapped


class Net(nn.Module):
    def __init__(self, returned=False, **weights):
        super().__init__()
        self.conv = qnn.QuantConv2d(3, 8, 3, bias=False, weight_bit_width=4, **weights)
        self.norm, self.act = nn.BatchNorm2d(8), qnn.QuantReLU(bit_width=4, return_quant_tensor=returned)
        self.out = qnn.QuantConv2d(8, 4, 3, bias=True, weight_quant=quant.Int8WeightPerChannelFloat)

    def forward(self, x):
        y = self.out(self.act(self.norm(self.conv(x))))
        return (y if isinstance(y, Tensor) else y.value).mean((2, 3))


def constant(net):
    """The same without a gradient of any scale."""
    for m in net.modules():
        if hasattr(m, "collect_stats_steps"):
            m.counter = m.collect_stats_steps + 1
            m.value.requires_grad_(False).fill_(2.0)
    return net


def train(model, order=None, steps=50):
    return alike.train_on_one_batch(model, 9, order, steps)


def test_constant_scales_train_bit_for_bit():
    class Fixed(Net):
        def __init__(self):
            super().__init__(weight_scaling_impl_type="const", weight_scaling_init=0.3)
            self.out = qnn.QuantConv2d(8, 4, 3, weight_scaling_impl_type="const", weight_scaling_init=0.2)

    torch.manual_seed(1)
    theirs = constant(Fixed())
    ours = copy.deepcopy(theirs)
    assert len(ff.accelerate(ours, strict=True).swapped) == 3
    assert torch.equal(train(theirs), train(ours))
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True))


@pytest.mark.parametrize("returned", [False, True])
def test_learned_scales_train_within_the_spread_of_sums(returned):
    def model():
        torch.manual_seed(1)
        net = Net(returned)
        for m in net.modules():
            if hasattr(m, "collect_stats_steps"):
                m.collect_stats_steps = 5
        return net

    ours = model()
    ff.accelerate(ours, strict=True)
    plain = train(model())
    orders = [torch.randperm(16, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    spread = max(float((train(model(), order) - plain).abs().max()) for order in orders)
    assert float((train(ours) - plain).abs().max()) <= 2 * spread + 1e-6
    assert plain[-1] < plain[0]


def test_what_stays_and_comes_back():
    theirs = Net()
    ours = Net()
    keys = list(ours.state_dict())
    report = ff.accelerate(ours, strict=True)
    names = {name for e in report.swapped for name in e.names}
    assert names == {"conv.weight_quant", "act.act_quant", "out.weight_quant"}
    train(theirs, steps=2)
    ours.load_state_dict(theirs.state_dict())  # builds the parts anew; the proxies stay
    assert len(ff.accelerate(ours).swapped) == 3
    assert list(theirs.state_dict())[: len(keys)] == list(ours.state_dict())[: len(keys)]
    x = torch.randn(4, 3, 9, 9)
    theirs.eval(), ours.eval()
    assert torch.equal(theirs(x), ours(x))
    twin = copy.deepcopy(ours)
    assert torch.equal(theirs(x), twin(x))
    ours.conv.weight_quant.disable_quant = True
    assert torch.equal(ours.conv.quant_weight(), ours.conv.weight)
    ours.conv.weight_quant.disable_quant = False
    assert ff.restore(ours) == ff.restore(twin) == 3
    assert torch.equal(theirs(x), ours(x))
    assert type(ours.act.act_quant) is type(theirs.act.act_quant)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(dtype):
    for make in (lambda: conv(weight_bit_width=4), lambda: conv(**WEIGHTS["channel"])):
        theirs, ours = both(lambda make=make: make().to(dtype))
        with torch.no_grad():
            ours.weight[0], theirs.weight[0] = 0, 0
        assert torch.equal(theirs.quant_weight().value, ours.quant_weight().value) or dtype is torch.float16
    theirs, ours = both(lambda: qnn.QuantReLU(bit_width=4, scaling_impl_type="parameter", scaling_init=2.0).to(dtype))
    compare(theirs, ours, torch.randn(3, 6, 5, 5).to(dtype))
    for x in (torch.randn(9, 7), torch.randn(9, 7).bfloat16()):  # types mix
        assert torch.equal(theirs(x), ours(x))


def test_second_derivatives():
    for theirs, ours in (
        both(lambda: conv(weight_bit_width=4)),
        both(lambda: qnn.QuantReLU(**ACTIVATIONS["parameter"][1])),
    ):
        found = []
        for module in (theirs, ours):
            x = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(5), requires_grad=True)
            leaves = [x, *module.parameters()]
            grads = torch.autograd.grad(module(x).pow(3).sum(), leaves, create_graph=True)
            found.append(torch.autograd.grad(sum(g.pow(2).sum() for g in grads), leaves, allow_unused=True))
        for a, b in zip(*found, strict=True):
            # Ours leaves the residual of rounding frozen, which theirs differentiates once more by the scale.
            if a is not None and a.dim():
                torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2 * float(a.abs().max()))


def test_no_graph_outlives_its_step():
    _, ours = both(lambda: qnn.QuantReLU(**ACTIVATIONS["parameter"][1]))
    x = torch.randn(5, 5).requires_grad_() * 1.0
    kept = weakref.ref(x)
    y = ours(x)
    gc.disable()
    try:
        del x, y
        assert kept() is None
    finally:
        gc.enable()


def test_torch_compile():
    torch.manual_seed(0)
    theirs, ours = both(lambda: conv(weight_bit_width=4))
    x = torch.randn(2, 4, 7, 7)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager")
    assert torch.equal(compiled(x), theirs(x))


def test_torchscript_is_left_alone():
    model = nn.Sequential(qnn.QuantReLU(bit_width=4))
    model[0].act_quant.fused_activation_quant_proxy.tensor_quant.int_quant.scripted = torch.jit.script(nn.Identity())
    assert "BREVITAS_JIT=1" in ff.accelerate(model).left[0].why

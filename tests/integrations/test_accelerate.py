# SPDX-License-Identifier: Apache-2.0
"""accelerate() and restore(): what they keep, what they refuse."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import fastflat as ff
from fastflat import integrations


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, s, factor):
        ctx.factor = factor
        return s.view_as(s)

    @staticmethod
    def backward(ctx, g):
        return g * ctx.factor, None


class Step(nn.Module):
    """A plain LSQ quantizer, as people write it."""

    def __init__(self, bits=4):
        super().__init__()
        self.bits = bits
        self.step = nn.Parameter(torch.tensor(0.1))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x):
        qmax = 2 ** (self.bits - 1) - 1
        s = Scaled.apply(self.step, 1.0 / (x.numel() * qmax) ** 0.5)
        return Round.apply((x / s).clamp(-qmax - 1, qmax)) * s


class StepAdapter(integrations.Adapter):
    """A step size of one's own."""

    def applies(self, module):
        return isinstance(module, Step)

    def forward(self, module, x):
        return ff.fake_quantize(x, module.step, spec=ff.QuantSpec.lsq(bits=module.bits, through="chain"))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.weight_quantizer, self.quantizer = Step(), Step(3)

    def forward(self, x):
        x = self.quantizer(x)
        return nn.functional.conv2d(x, self.weight_quantizer(self.conv.weight), self.conv.bias)


@pytest.fixture
def registered():
    adapters = []

    def give(adapter):
        adapters.append(adapter)
        integrations.register(adapter)
        return adapter

    yield give
    for adapter in adapters:
        integrations.unregister(adapter)


def test_everything_but_the_class_stays(registered):
    model = Model()
    called = []
    model.quantizer.register_forward_hook(lambda *_: called.append(1))
    model.weight_quantizer.eval()
    before, modes = dict(model.state_dict(keep_vars=True)), [m.training for m in model.modules()]
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    registered(StepAdapter())
    report = ff.accelerate(model)
    assert [e.names for e in report.swapped] == [("weight_quantizer",), ("quantizer",)]
    assert not report.left
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[k] is before[k] for k in before)
    assert [m.training for m in model.modules()] == modes
    assert isinstance(model.quantizer, Step)
    assert "step size" in str(report)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    assert len(called) == 2
    assert ff.accelerate(model).swapped == report.swapped  # a second call finds them swapped
    assert ff.restore(model) == 2
    assert type(model.quantizer) is Step
    assert ff.restore(model) == 0


def test_a_liar_is_refused(registered):
    class Liar(StepAdapter):
        """Five bits in place of four."""

        def forward(self, module, x):
            return ff.fake_quantize(x, module.step, spec=ff.QuantSpec.lsq(bits=module.bits + 1, through="chain"))

    registered(Liar())
    model = Model()
    report = ff.accelerate(model)
    assert len(report.left) == 2
    assert "the result differs" in report.left[0].why
    with pytest.raises(ValueError, match=r"^fastflat::accelerate: strict=True, but weight_quantizer \(Step\)"):
        ff.accelerate(model, strict=True)
    assert type(model.quantizer) is Step


@pytest.mark.parametrize("lie", ["gradient", "state", "raises"])
def test_lies_about_gradients_and_state_are_seen(registered, lie):
    class Liar(StepAdapter):
        def forward(self, module, x):
            if lie == "raises":
                raise RuntimeError("cannot")
            if lie == "state":
                module.calls.add_(2)
                return super().forward(module, x)
            y = self.original(module, x)
            return y + 0.25 * (y - y.detach())

    registered(Liar())
    (left, *_) = ff.accelerate(Model()).left
    assert {"gradient": "gradient", "state": "calls differs", "raises": "RuntimeError: cannot"}[lie] in left.why


def test_copies_and_files_of_a_swapped_model(registered):
    registered(StepAdapter())
    model = Model()
    ff.accelerate(model)
    x = torch.randn(1, 3, 6, 6)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    assert ff.restore(twin) == 2
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    plain = Model()
    plain.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(plain(x), model(x), rtol=1e-5, atol=1e-6)


def test_shared_and_unknown_quantizers_are_named(registered):
    registered(StepAdapter())

    class OddQuantizer(nn.Module):
        def forward(self, x):
            return x.round()

    model = nn.ModuleDict({"a": Step(), "other": OddQuantizer()})
    model["b"] = model["a"]
    report = ff.accelerate(model)
    assert [e.names for e in report.entries] == [("a", "b"), ("other",)]
    assert report.left[0].why == "no adapter knows it"
    assert str(report).splitlines()[0] == "1 quantizers swapped, 1 left alone"


def test_bad_input():
    with pytest.raises(TypeError, match=r"^fastflat::accelerate: model must be a torch.nn.Module, got int$"):
        ff.accelerate(3)
    with pytest.raises(TypeError, match="must be an instance of Adapter, got StepAdapter"):
        integrations.register(StepAdapter)
    model = Model()
    compiled = torch.compile(model)
    for given in (compiled, nn.Sequential(compiled)):
        with pytest.raises(ValueError, match=r"not be compiled yet, got .*; accelerate, then torch.compile"):
            ff.accelerate(given)

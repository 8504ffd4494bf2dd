# SPDX-License-Identifier: Apache-2.0
"""torch.ao's fake-quantization modules, accelerated: bits of results, gradients and state, and trajectories."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.ao import quantization as tq
from torch.ao.quantization import observer
from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize

import fastflat as ff
from fastflat.integrations import _minmax
from tests.ranks import leave

from . import alike

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.ao.quantization.*", "ignore:.*reduce_range.*")

SIGNED = {"quant_min": -128, "quant_max": 127, "dtype": torch.qint8}
CHANNELS = {"qscheme": torch.per_channel_symmetric, "ch_axis": 0, **SIGNED}


def made(kind, name, **options):
    return kind(observer=getattr(observer, name), **options)


FQ, FUSED = tq.FakeQuantize, tq.FusedMovingAvgObsFakeQuantize
FORMS = {
    "default": lambda: tq.default_fake_quant(),
    "average": lambda: made(FQ, "MovingAverageMinMaxObserver", averaging_constant=0.3, **SIGNED),
    "average symmetric": lambda: made(
        FQ, "MovingAverageMinMaxObserver", qscheme=torch.per_tensor_symmetric, dtype=torch.quint8
    ),
    "minmax": lambda: made(FQ, "MinMaxObserver", quant_min=0, quant_max=15, dtype=torch.quint8),
    "minmax symmetric": lambda: made(
        FQ, "MinMaxObserver", qscheme=torch.per_tensor_symmetric, quant_min=-7, quant_max=7, dtype=torch.qint8
    ),
    "channels": lambda: made(FQ, "PerChannelMinMaxObserver", **CHANNELS),
    "channels average": lambda: made(FQ, "MovingAveragePerChannelMinMaxObserver", averaging_constant=0.3, **CHANNELS),
    "channels affine": lambda: made(
        FQ, "MovingAveragePerChannelMinMaxObserver", **{**CHANNELS, "qscheme": torch.per_channel_affine, "ch_axis": 1}
    ),
    "histogram": lambda: tq.default_histogram_fake_quant(),
    "fixed": lambda: tq.default_symmetric_fixed_qparams_fake_quant(),
    "fused": lambda: tq.default_fused_act_fake_quant(),
    "fused symmetric": lambda: tq.default_fused_wt_fake_quant(),
    "fused channels": lambda: tq.default_fused_per_channel_wt_fake_quant(),
    "fused narrow": lambda: tq.fused_per_channel_wt_fake_quant_range_neg_127_to_127(),
}


@pytest.mark.parametrize("form", FORMS)
def test_bits_over_calls(form, monkeypatch):
    theirs = FORMS[form]()
    ours = alike.accelerated(theirs)
    ours.train() if form != "fused" else ours.eval()  # the switches count, not the mode
    with alike.by_fastflat_alone(monkeypatch):
        for seed in (0, 10):
            alike.assert_alike(theirs, ours, alike.layouts((5, 5, 7, 3), seed, scale=seed + 0.5))
            if form != "channels affine":
                alike.assert_alike(theirs, ours, alike.layouts((5, 33), seed + 5))


def test_which_batches_lie_on_the_grid():
    """As the kernels' own mask has it, at the borders of the grid and beside them."""
    generator = torch.Generator().manual_seed(0)
    answers = set()
    for _ in range(400):
        scale = torch.rand(1, generator=generator) * 0.1 + 1e-3
        z = int(torch.randint(-128, 128, (1,), generator=generator))
        ends = (torch.tensor([-128.5, 127.5]) - z) * scale
        low, high = torch.nextafter(ends, ends + torch.randint(-1, 2, (2,), generator=generator))
        x = torch.stack([low, high]).requires_grad_()
        y = torch.fake_quantize_per_tensor_affine(x, scale, torch.tensor([z], dtype=torch.int32), -128, 127)
        (kept,) = torch.autograd.grad(y.sum(), x)
        found = _minmax.on_grid(low.item(), high.item(), scale.item(), z, -128, 127)
        assert found == bool(kept.all())
        answers.add(found)
    assert answers == {False, True}
    assert not _minmax.on_grid(float("nan"), 1.0, 0.1, 0, -128, 127)
    assert not _minmax.on_grid(0.0, float("inf"), 0.1, 0, -128, 127)


@pytest.mark.parametrize("form", FORMS)
def test_switches_work_after_the_swap(form):
    theirs = FORMS[form]()
    ours = alike.accelerated(theirs)
    seed, states = 0, [(1, 0), (1, 1), (0, 1), (0, 0), (1, 1)]
    if form.startswith("fused"):  # whose scale is not yet set after a first call that only observes
        states = [(1, 1), *states]
    for observes, quantizes in states:
        for twin in (theirs, ours):
            twin.apply(tq.enable_observer if observes else tq.disable_observer)
            twin.apply(tq.enable_fake_quant if quantizes else tq.disable_fake_quant)
        alike.assert_alike(theirs, ours, [alike.data((5, 5, 6), seed), alike.data((5, 5, 6), seed + 1, scale=3.0)])
        seed += 2


@pytest.mark.parametrize("form", FORMS)
def test_fixed_scales_take_nan_infinities_and_nothing(form):
    theirs = FORMS[form]()
    theirs(alike.data((5, 5, 7, 3)))
    theirs.apply(tq.disable_observer)
    ours = alike.accelerated(theirs)
    alike.assert_alike(theirs, ours, alike.layouts((5, 5, 7, 3), special=True))
    alike.assert_alike(theirs, ours, [torch.empty(5, 5, 0)])


@pytest.mark.parametrize("form", ["average", "minmax", "channels"])
def test_observers_meet_nan_and_infinities(form):
    """Their state goes the same way."""
    theirs = FORMS[form]()
    ours = alike.accelerated(theirs)
    batches = [alike.data((5, 5, 6), seed) for seed in range(4)]
    batches[1][0, 1, 2], batches[2][3, 0, 0] = float("inf"), float("nan")
    alike.assert_alike(theirs, ours, batches)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("form", ["average", "channels", "fixed", "fused"])
def test_other_types(form, dtype):
    """Exact, or what the module itself says about them."""
    theirs = FORMS[form]()
    ours = alike.accelerated(theirs)
    x = alike.data((5, 5, 6), dtype=dtype)
    try:
        theirs(x)
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=str(error).splitlines()[0][:40]):
            ours(x)
        return
    ours(x)
    alike.assert_alike(theirs, ours, [alike.data((5, 5, 6), seed, dtype=dtype) for seed in range(3)])


def test_a_scale_that_does_not_fit_is_the_modules_own_error():
    theirs = FORMS["channels"]()
    theirs(alike.data((5, 6)))
    theirs.apply(tq.disable_observer)
    ours = alike.accelerated(theirs)
    messages = []
    for twin in (theirs, ours):
        with pytest.raises(RuntimeError) as error:
            twin(alike.data((4, 6)))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_state_dicts_load_into_a_swapped_module():
    theirs = FORMS["fused channels"]()
    theirs(alike.data((7, 6)))
    ours = alike.accelerated(FORMS["fused channels"]())
    ours.load_state_dict(theirs.state_dict())
    alike.assert_alike(theirs, ours, [alike.data((7, 6), 1)])


LEARNED = {
    "tensor": {"qscheme": torch.per_tensor_symmetric, **SIGNED},
    "tensor affine": {"quant_min": 0, "quant_max": 255, "dtype": torch.quint8},
    "tensor affine signed": {**SIGNED},
    "channels": {"qscheme": torch.per_channel_symmetric, "channel_len": 5, **SIGNED},
    "channels affine": {"qscheme": torch.per_channel_affine, "channel_len": 5, **SIGNED},
}


def learnable(form, **options):
    kind = "MovingAveragePerChannelMinMaxObserver" if "channels" in form else "MovingAverageMinMaxObserver"
    return made(_LearnableFakeQuantize, kind, **LEARNED[form], **options)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("form", LEARNED)
def test_learnable(form, scaled):
    theirs = learnable(form, use_grad_scaling=scaled)
    ours = alike.accelerated(theirs)
    alike.assert_alike(theirs, ours, alike.layouts((5, 5, 7, 3)))
    for twin in (theirs, ours):
        twin.enable_param_learning()
    alike.assert_alike(theirs, ours, alike.layouts((5, 33), 5))
    for z in (0.4, 3.5, -2.0, 6.6):
        for twin in (theirs, ours):
            twin.zero_point.data.fill_(z)
        alike.assert_alike(theirs, ours, [alike.data((5, 33), 7, scale=2.0)])
    for twin in (theirs, ours):
        twin.scale.data.fill_(-1.0)  # held at eps
        twin.toggle_fake_quant(False)
    alike.assert_alike(theirs, ours, [alike.data((5, 4), 8)])


class Block(nn.Module):
    """Convolutions with batch norm, a shortcut and a classifier."""

    def __init__(self, width=8):
        super().__init__()
        self.quant, self.dequant = tq.QuantStub(), tq.DeQuantStub()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.conv = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width))
        self.add, self.relu = nn.quantized.FloatFunctional(), nn.ReLU()
        self.head = nn.Linear(width * 9, 4)

    def forward(self, x):
        x = self.stem(self.quant(x))
        x = self.relu(self.add.add(x, self.conv(x)))
        return self.dequant(self.head(nn.functional.avg_pool2d(x, 2).flatten(1)))


def batches(count=4, size=4):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, size, 3, 6, 6, generator=generator)
    return [(b, (b.mean((1, 2, 3)) * 40).long().remainder(4)) for b in x]


def prepared(config=None, model=None):
    torch.manual_seed(0)
    model = Block() if model is None else model
    model.train()
    model.qconfig = tq.get_default_qat_qconfig("fbgemm") if config is None else config
    for part, names in ((model.stem, ["0", "1", "2"]), (model.conv, ["0", "1"])):
        tq.fuse_modules_qat(part, names, inplace=True)
    return tq.prepare_qat(model)


def plain_config():
    return tq.get_default_qat_qconfig("fbgemm", version=0)


@pytest.mark.parametrize("config", ["fused", "plain"])
def test_training_eager(config):
    model = prepared(None if config == "fused" else plain_config())
    report = ff.accelerate(copy.deepcopy(model))
    assert len(report.swapped) >= 7
    alike.assert_same_training(model, batches())


def test_training_fx():
    fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4)).train()
    mapping = tq.get_default_qat_qconfig_mapping("fbgemm")
    alike.assert_same_training(fx.prepare_qat_fx(model, mapping, (torch.randn(1, 3, 6, 6),)), batches())


def test_training_with_learned_scales():
    config = tq.QConfig(
        activation=_LearnableFakeQuantize.with_args(
            observer=tq.MovingAverageMinMaxObserver, quant_min=0, quant_max=255, use_grad_scaling=True, scale=0.05
        ),
        weight=_LearnableFakeQuantize.with_args(
            observer=tq.MovingAverageMinMaxObserver, qscheme=torch.per_tensor_symmetric, scale=0.01, **SIGNED
        ),
    )
    model = prepared(config)
    for x, _ in batches():
        model(x)
    for part in model.modules():
        if isinstance(part, _LearnableFakeQuantize):
            part.enable_param_learning()
    alike.assert_within_spread(model, batches(), lr=0.01)


@pytest.mark.parametrize("form", ["fused", "average"])
def test_compiled(form):
    """The fused module without a break in the graph; the other asks its switches, which breaks it, as its own does."""
    model = nn.Sequential(FORMS[form](), nn.Linear(6, 5), nn.ReLU(), FORMS[form]())
    model(alike.data((4, 6)))
    ours = alike.accelerated(model)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=form == "fused")
    for switch in (tq.enable_fake_quant, tq.disable_fake_quant):
        model.apply(switch)
        ours.apply(switch)
        x = alike.data((4, 6), 1)
        for twin in (model, compiled):
            twin(x).square().sum().backward()
        for p, q in zip(model.parameters(), ours.parameters(), strict=True):
            alike.same(p.grad, q.grad)
        for b, c in zip(model.buffers(), ours.buffers(), strict=True):
            alike.same(b, c)


def test_copies_and_restore_and_conversion():
    model = prepared()
    model(batches()[0][0])
    ours = alike.accelerated(model)
    twin = copy.deepcopy(ours)
    x = batches()[1][0]
    expected = model(x)
    assert torch.equal(twin(x), expected)
    assert torch.equal(ours(x), expected)
    assert ff.restore(twin) == len(ff.accelerate(ours).swapped)
    a, b, c = (tq.convert(part.eval())(x) for part in (model, ours, twin))
    assert torch.equal(a, b)
    assert torch.equal(a, c)


def test_data_parallel(tmp_path):
    from torch import distributed

    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = prepared()
        ours = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
        assert len(ff.accelerate(ours, strict=True).swapped) >= 7
        for x, t in batches():
            for twin in (model, ours):
                nn.functional.cross_entropy(twin(x), t).backward()
        for p, q in zip(model.parameters(), ours.module.parameters(), strict=True):
            alike.same(p.grad, q.grad)
    finally:
        leave()


def test_known_beside_unknown():
    class Own(tq.FakeQuantize):
        def forward(self, x):
            return x

    class OtherQuantizer(nn.Module):
        def forward(self, x):
            return x.round()

    model = nn.ModuleDict(
        {
            "known": FORMS["default"](),
            "own": Own(),
            "other": OtherQuantizer(),
            "embedding": tq.default_embedding_fake_quant(),
            "odd": made(FQ, "MinMaxObserver", quant_min=0, quant_max=200, dtype=torch.quint8),
        }
    )
    report = ff.accelerate(model)
    assert [e.names for e in report.swapped] == [("known",)]
    assert {e.names[0]: e.why for e in report.left} == {
        "own": "its class has a forward of its own",
        "other": "no adapter knows it",
        "embedding": "its zero-point is in units of x",
        "odd": "no spec has the grid [0, 200]",
    }


def test_what_torchao_prepares():
    """Graphs of torchao's pt2e flow hold copies of torch.ao's classes."""
    pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    quantizer = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(model, (batches()[0][0],)).module()
        config = quantizer.X86InductorQuantizer()
        config.set_global(quantizer.get_default_x86_inductor_quantization_config(is_qat=True))
        theirs = pt2e.prepare_qat_pt2e(exported, config)
    alike.assert_same_training(theirs, batches())

# SPDX-License-Identifier: Apache-2.0
"""QuantLSTM and QuantGRU: nn.LSTM and nn.GRU with the quantizers off, and with quantized weights and input put in."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastflat as ff
from fastflat.quant import QuantGRU, QuantLSTM, quantizers, summary

from .conftest import WEIGHTS

SIGNED = ff.QuantSpec.lsq(bits=4)
FORMS = {nn.LSTM: QuantLSTM, nn.GRU: QuantGRU}
KINDS = [nn.LSTM, nn.GRU]


def pair(kind, activations=SIGNED, **settings):
    torch.manual_seed(0)
    source = kind(6, 5, **settings)
    layer = FORMS[kind].from_float(source, WEIGHTS, activations)
    layer.input_quantizer.set_scale(torch.tensor(0.25))
    return source, layer


def off(layer):
    for _, quantizer in quantizers(layer):
        quantizer.enabled = False
    return layer


def flat(result):
    """All tensors of a layer's result."""
    y, state = result
    y = y.data if isinstance(y, nn.utils.rnn.PackedSequence) else y
    return [y, *(state if isinstance(state, tuple) else (state,))]


def same(got, want):
    got, want = flat(got), flat(want)
    assert len(got) == len(want)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def states(kind, layers, batch=3):
    h = torch.randn(layers, batch, 5)
    return (h, torch.randn(layers, batch, 5)) if kind is nn.LSTM else h


SETTINGS = [
    {},
    {"batch_first": True},
    {"num_layers": 2, "bidirectional": True, "dropout": 0.5},
    {"num_layers": 2, "bias": False},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_off_it_is_the_layer_that_it_replaces(kind, settings):
    source, layer = pair(kind, **settings)
    off(layer)
    x = torch.randn(4, 3, 6)
    batch = 4 if settings.get("batch_first") else 3
    for arguments in ((x,), (x, states(kind, source.num_layers * (1 + source.bidirectional), batch)), (x[0],)):
        for training in (True, False):
            results = []
            for m in (layer.train(training), source.train(training)):
                torch.manual_seed(1)
                results.append(m(*arguments))
            same(*results)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_off_projections_and_one_sequence_with_a_state_are_the_same():
    source, layer = pair(nn.LSTM, proj_size=2)
    assert "weight_hr_l0" in layer.weight_quantizers()
    x = torch.randn(4, 3, 6)
    same(off(layer)(x), source(x))
    for kind in KINDS:
        source, layer = pair(kind)
        state = states(kind, 1)
        state = tuple(h[:, 0] for h in state) if kind is nn.LSTM else state[:, 0]
        same(off(layer)(x[:, 0], state), source(x[:, 0], state))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sort", [True, False])
def test_packed_sequences_are_the_layers_own(kind, sort):
    source, layer = pair(kind, num_layers=2)
    x, lengths = torch.randn(4, 3, 6), torch.tensor([4, 2, 1] if sort else [2, 4, 1])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=sort)
    for state in (None, states(kind, 2)):
        got, want = layer(packed, state), substituted(source, layer)(quantized(layer, packed), state)
        same(got, want)
        assert torch.equal(pad_packed_sequence(got[0])[0], pad_packed_sequence(want[0])[0])
        same(off(layer)(packed, state), source(packed, state))
        for _, quantizer in quantizers(layer):
            quantizer.enabled = True


def quantized(layer, x):
    if isinstance(x, nn.utils.rnn.PackedSequence):
        return x._replace(data=layer.input_quantizer(x.data))
    return layer.input_quantizer(x)


@torch.no_grad()
def substituted(source, layer):
    """The ordinary layer with the quantized weights in place of its own."""
    plain = copy.deepcopy(source)
    for name, quantizer in layer.weight_quantizers().items():
        weight = getattr(source, name)
        getattr(plain, name).copy_(ff.fake_quantize(weight, quantizer.scale, spec=quantizer.spec))
    return plain


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_it_is_its_formula(kind, settings):
    source, layer = pair(kind, **settings)
    x = torch.randn(4, 3, 6)
    results = []
    for m, data in ((layer, x), (substituted(source, layer), quantized(layer, x))):
        torch.manual_seed(1)
        results.append(m(data))
    same(*results)
    assert layer.weight_quantizers().keys() == {n for n, _ in source.named_parameters() if n.startswith("weight_")}
    assert not torch.equal(results[0][0], off(layer)(x)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_weight_and_scale_and_the_original_is_untouched(kind):
    source, layer = pair(kind)
    keys = set(source.state_dict())
    x = torch.randn(4, 3, 6, requires_grad=True)
    layer(x)[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in [x, *layer.parameters()])
    assert set(source.state_dict()) == keys
    assert keys == {k for k in layer.state_dict() if "_quantizer." not in k}
    layer.double()
    assert source.weight_ih_l0 is layer.weight_ih_l0  # conversion in place keeps the parameters
    assert layer(x.detach().double())[0].dtype == torch.float64


class Tagger(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.embedding = nn.Embedding(9, 6, padding_idx=0)
        self.rnn = kind(6, 5, num_layers=2, bidirectional=True)
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        return self.head(self.rnn(self.embedding(x))[0])


@pytest.mark.parametrize("kind", KINDS)
def test_prepare_calibrates_trains_and_saves_a_network(kind):
    def made():
        torch.manual_seed(0)
        bits = {"rnn": {"weights": 3, "activations": 6}}
        return ff.prepare(Tagger(kind), weights=WEIGHTS, activations=SIGNED, bits=bits)

    model, x = made(), torch.randint(0, 9, (4, 3))
    ff.calibrate(model, [x])
    model(x).square().sum().backward()
    scales = {g["name"]: g["params"] for g in ff.param_groups(model)}["scales"]
    assert len(scales) == 1 + (8 + 1) + 2
    assert all(s.grad is not None for s in scales)
    twin = made()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin.eval()(x), model.eval()(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    rows = {row.name: row for row in summary(model)}
    assert len(rows) == 1 + 8 + 1
    assert rows["rnn.weight_hh_l1_reverse"].weight_bits == 3
    assert rows["rnn.weight_ih_l0"].activation_bits == 6
    assert rows["embedding"].kind == "QuantEmbedding"
    assert rows["embedding"].activation_bits is None
    other = Tagger(kind)
    model.load_state_dict(other.state_dict(), strict=False)  # the scales follow the weights
    fresh = ff.prepare(other, weights=WEIGHTS.replace(bits=3))
    name = "weight_hh_l0_quantizer"
    assert torch.equal(getattr(model.rnn, name).scale, getattr(fresh.rnn, name).scale)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(6), "x must have 2 axes, or 3 with a batch, got 1"),
        (torch.randn(1, 4, 3, 6), "x must have 2 axes, or 3 with a batch, got 4"),
    ],
)
def test_inputs_of_other_shapes_are_named(x, message):
    with pytest.raises(ValueError, match=f"QuantGRU: {message}"):
        pair(nn.GRU)[1](x)

# SPDX-License-Identifier: Apache-2.0
"""BiTAT on models: layers of every kind agree with the ones they replace, what is kept, what is refused."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastflat.methods import BinaryLayer, binarize_layers
from fastflat.methods import bitat as module


def net(bias=True):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, groups=8, padding="same", padding_mode="reflect", bias=bias),
        nn.Conv2d(8, 12, 3, groups=2, stride=2, padding=(1, 2), dilation=(2, 1)),
        nn.BatchNorm2d(12),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(12 * 8, 10),
        nn.ReLU(),
        nn.Linear(10, 3),
    )
    x = torch.randn(32, 1, 10, 10)
    with torch.no_grad():
        features = model[:8](x).shape[1]
    model[8] = nn.Linear(features, 10)
    return model, [(x[:16], torch.randint(3, (16,))), (x[16:], torch.randint(3, (16,)))]


@pytest.mark.parametrize("at", [3, 4, 8])
def test_layers_walk_as_the_ones_they_replace(at):
    model, batches = net()
    x = model.eval()[:at](batches[0][0]).detach()
    layer = model[at]
    options, groups = module._options(layer), getattr(layer, "groups", 1)
    rows = module._rows(x, options, groups)
    _, _, basis = module.decorrelate(rows)
    made = BinaryLayer(layer, basis, activations=False)
    replaced = copy.deepcopy(layer)
    with torch.no_grad():
        replaced.weight.copy_(made.binary_weight())
    torch.testing.assert_close(made(x), replaced(x))
    # The rows that the statistics see are those that the weight meets.
    by_group = replaced.weight.detach().flatten(1).view(groups, -1, rows.shape[2])
    outputs = module._columns(replaced(x) - replaced.bias.view(-1, *[1] * (x.dim() - 2)), options, groups)
    torch.testing.assert_close(rows @ by_group.transpose(1, 2), outputs, atol=1e-5, rtol=1e-4)
    assert len(made.weight.detach().sign().unique()) == 2


def test_every_layer_is_binary_and_trains():
    model, batches = net(bias=False)
    model.train()
    tuned = []
    out = binarize_layers(
        model,
        batches,
        F.cross_entropy,
        skip=("0", "10"),
        blocks=4,
        tune=lambda m, name: tuned.append((m.training, name)),
    )
    assert out is model
    assert model.training
    assert tuned == [(True, "3"), (True, "4"), (True, "8")]
    kinds = [name for name, m in model.named_modules() if isinstance(m, BinaryLayer)]
    assert kinds == ["3", "4", "8"]
    assert model[4].group == 9  # 36 inputs in four blocks
    assert len(model[4].binary_input(torch.randn(2, 8, 10, 10)).detach().unique()) == 2
    x, y = batches[0]
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        opt.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            scores = model(x)
        loss = F.cross_entropy(scores.float(), y)
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for p in model[4].parameters())
    again = copy.deepcopy(model)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(x), model.eval()(x))


def test_options_off_is_xnor_net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    w = model[0].weight.detach().clone()
    x, y = torch.randn(40, 6), torch.randint(3, (40,))
    plain = {"rotate": False, "weighted": False, "match": False, "activations": False}
    binarize_layers(model, [(x, y)], F.cross_entropy, skip=["2"], **plain)
    torch.testing.assert_close(model[0].binary_weight().detach(), w.abs().mean(1, keepdim=True) * w.sign())


def test_the_output_keeps_its_mean():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5))
    x, y = torch.rand(40, 6), torch.randint(5, (40,))
    want = model(x).mean(0)
    binarize_layers(model, [(x, y)], F.cross_entropy)
    torch.testing.assert_close(model(x).mean(0), want)


def test_sweeps_lower_the_output_error():
    errors = []
    for sweeps in (0, 2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
        x = (torch.randn(16, 4, 9, 9) + torch.randn(16, 1, 9, 9)).relu()
        want = model(x).detach()

        def loss(out, _):
            return out.square().mean()

        binarize_layers(
            model, [(x, x)], loss, rotate=False, weighted=False, match=False, activations=False, sweeps=sweeps
        )
        errors.append(float((model(x) - want).detach().square().mean()))
    assert errors[1] < 0.97 * errors[0]


def test_refused_and_as_before():
    model, batches = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    shared = nn.Linear(4, 4)
    pair = [(torch.randn(2, 4), torch.tensor([0, 1]))]
    for call, line in (
        (lambda: binarize_layers(model, [], F.cross_entropy), "batches must hold inputs and targets, got none"),
        (
            lambda: binarize_layers(model, batches, F.cross_entropy, skip=("fc",)),
            "skip must match the name of a linear",
        ),
        (lambda: binarize_layers(model, batches, F.cross_entropy, skip="0"), "skip must be a sequence of patterns"),
        (lambda: binarize_layers(model, batches, F.cross_entropy, blocks=0), "blocks must be a positive int, got 0"),
        (lambda: binarize_layers(model, batches, F.cross_entropy, skip=["*.", "*"]), "skip must match the name"),
        (
            lambda: binarize_layers(model, batches, F.cross_entropy, sweeps=1),
            "sweeps must be an int of at least 0",
        ),
        (lambda: binarize_layers(model, batches, F.cross_entropy, skip=["*"]), "that are not skipped, got none"),
        (
            lambda: binarize_layers(nn.Sequential(shared, shared), pair, F.cross_entropy),
            "call each layer once, got two calls",
        ),
        (lambda: BinaryLayer(shared, blocks=3), "blocks must divide the 4 inputs of an output, got 3"),
        (lambda: BinaryLayer(shared, torch.eye(4)), r"basis must have shape \[1, 4, 4\], got \[4, 4\]"),
    ):
        with pytest.raises(ValueError, match=line):
            call()
    with pytest.raises(TypeError, match=r"layer must be an nn.Linear or nn.Conv2d, got ReLU"):
        BinaryLayer(nn.ReLU())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training

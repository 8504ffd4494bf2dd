# SPDX-License-Identifier: Apache-2.0
"""Averages of iterates with statistics of their own."""

import pytest
import torch
from torch import nn

import fastflat as ff


def _trained(optimizer=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2))
    opt = optimizer(model.parameters()) if optimizer else ff.methods.Gadam(model.parameters(), lr=0.05)
    x = torch.randn(32, 4)
    for _ in range(4):
        opt.zero_grad()
        model(x).square().mean().backward()
        opt.step()
    return model, opt, x


def test_statistics_are_those_of_the_mean():
    model, opt, x = _trained()
    model[2].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    w, b = (opt.state[p]["average"].clone() for p in model[0].parameters())
    with ff.methods.averaged(model, opt, [(x[:16], None), (x[16:], None)]):
        hidden = [torch.nn.functional.linear(part, w, b) for part in (x[:16], x[16:])]
        torch.testing.assert_close(model[1].running_mean, torch.stack([h.mean(0) for h in hidden]).mean(0))
        torch.testing.assert_close(model[1].running_var, torch.stack([h.var(0) for h in hidden]).mean(0))
        assert [m.training for m in model.modules()] == modes
        assert model[1].momentum == 0.1
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes


def test_refused_and_nothing_changed():
    model, opt, _ = _trained()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with (
        pytest.raises(ValueError, match="data must hold batches for the statistics, got none"),
        ff.methods.averaged(model, opt, []),
    ):
        pass
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model, opt, x = _trained(ff.optim.AdamW)
    with pytest.raises(RuntimeError, match="no parameter has an average"), ff.methods.averaged(model, opt, [x]):
        pass


def test_schedule():
    factor = ff.methods.averaging_schedule(100)
    got = [factor(s) for s in (0, 50, 70, 90, 300)]
    assert got == pytest.approx([1.0, 1.0, 0.75, 0.5, 0.5])
    with pytest.raises(ValueError, match="start must be at least 1"):
        ff.methods.averaging_schedule(0)

# SPDX-License-Identifier: Apache-2.0
"""Warm-ups of the gradient-norm penalty."""

import pytest
import torch

import fastflat as ff


def _opt():
    params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))]
    return ff.methods.GNP([{"params": params[:1]}, {"params": params[1:], "rho": 0.4}], lr=0.1, rho=0.2, alpha=0.8)


@pytest.mark.parametrize(
    ("kind", "alphas", "radii"),
    [
        ("r", [0.8] * 5, [0.0, 0.05, 0.1, 0.15, 0.2]),
        ("lambda", [0.0, 0.2, 0.4, 0.6, 0.8], [0.2] * 5),
        ("zero", [0.0, 0.0, 0.0, 0.0, 0.8], [0.2] * 5),
    ],
)
def test_warm_up(kind, alphas, radii):
    opt = _opt()
    warm_up = ff.methods.GNPWarmUp(opt, kind, 4)
    for alpha, rho in zip([*alphas, 0.8], [*radii, 0.2], strict=True):
        assert opt.alpha == pytest.approx(alpha)
        assert [g["rho"] for g in opt.param_groups] == pytest.approx([rho, 2 * rho])
        warm_up.step()


@pytest.mark.parametrize("kind", ["r", "lambda", "zero"])
def test_stopped_run_goes_on(kind):
    opt = _opt()
    warm_up = ff.methods.GNPWarmUp(opt, kind, 4)
    warm_up.step()
    other = _opt()
    again = ff.methods.GNPWarmUp(other, kind, 4)
    other.load_state_dict(opt.state_dict())
    again.load_state_dict(warm_up.state_dict())
    for _ in range(4):
        assert other.alpha == opt.alpha
        assert [g["rho"] for g in other.param_groups] == [g["rho"] for g in opt.param_groups]
        again.step()
        warm_up.step()


def test_refused():
    with pytest.raises(ValueError, match="kind must be one of r, lambda, zero, got 'linear'"):
        ff.methods.GNPWarmUp(_opt(), "linear", 3)
    with pytest.raises(ValueError, match="optimizer must be a GNP, got SGD"):
        ff.methods.GNPWarmUp(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]), "r", 3)
    with pytest.raises(ValueError, match="steps must be at least 0, got -1"):
        ff.methods.GNPWarmUp(_opt(), "r", -1)

# SPDX-License-Identifier: Apache-2.0
"""K tangents at once against double backward, layer by layer, in float64."""

from __future__ import annotations

import warnings

import pytest
import torch

from fastflat.curvature._rules import convolution

from .problems import CASES, by_engine, dense, setting, squares


@pytest.mark.parametrize("name", CASES)
def test_hessian_is_that_of_double_backward(name):
    model, x = setting(*CASES[name])
    params = {k: p.detach() for k, p in model.named_parameters()}
    buffers = {k: b.clone() for k, b in model.named_buffers()}
    loss = squares(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = by_engine(loss, params)
    for k, b in model.named_buffers():
        assert torch.equal(b, buffers[k])
    theirs = dense(loss, params)
    assert theirs.abs().max() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10 * float(theirs.abs().max()))
    torch.testing.assert_close(ours, ours.t(), rtol=0, atol=1e-12 * float(theirs.abs().max()))


@pytest.mark.parametrize("name", ["conv2d", "stride", "transposed", "batch norm"])
def test_convolutions_loop_over_k_where_weights_are_large(name, monkeypatch):
    model, x = setting(*CASES[name])
    params = {k: p.detach() for k, p in model.named_parameters()}
    folded = by_engine(squares(model, x), params)
    monkeypatch.setattr(convolution, "_LARGEST", 0)
    # small entries are differences of large ones
    atol = 1e-12 * float(folded.abs().max())
    torch.testing.assert_close(by_engine(squares(model, x), params), folded, rtol=1e-12, atol=atol)

# SPDX-License-Identifier: Apache-2.0
"""The general_quantize family on a GPU: bits against the reference on the CPU, draws under CUDA graphs.

Twins that run without a GPU: tests/emulator (CUDA) and test_triton_interpreter.py (Triton).
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import fastflat as ff
from fastflat.backends import backend, kernels, unavailable

from .test_general_quantize import DTYPES, LAYOUTS, RULE_SETS, RULES, check_call

pytestmark = pytest.mark.gpu
NAMES = ("general_quantize", "general_quantize_bwd", "general_quantize_jvp")


def moved(value, device):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return tuple(moved(v, device) for v in value) if isinstance(value, tuple) else value


@pytest.fixture(params=["cuda", "triton"])
def ops(request):
    """The raw ops of one GPU backend, called with CPU tensors and giving CPU tensors."""
    reason = unavailable(request.param, "cuda")
    if reason:
        pytest.skip(reason)
    with backend(request.param):
        own = kernels("cuda")

        def there_and_back(op):
            return lambda *args: moved(op(*(moved(a, "cuda") for a in args)), "cpu")

        yield SimpleNamespace(**{name: there_and_back(getattr(own, name)) for name in NAMES})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rules", RULE_SETS.values(), ids=RULE_SETS)
def test_rules(ops, rules, dtype):
    if rules & RULES["compute_input"] and dtype.itemsize > 2:
        dtype = torch.bfloat16
    for i, place in enumerate(LAYOUTS):
        check_call(place, dtype, rules, zero=i % 2 == 1, ops=ops)


@pytest.mark.parametrize("noise", ["uniform", "normal", "temper", "bypass"])
def test_a_graph_draws_anew_at_each_replay(ops, noise):
    """The generator's state is part of a captured graph; forward and backward of a replay see the same draws."""
    spec = ff.QuantSpec.lsq(4, noise=noise)
    x = torch.randn(64, 1000, device="cuda", requires_grad=True)
    s = torch.tensor(0.2, device="cuda", requires_grad=True)
    nu = torch.tensor(0.5, device="cuda")

    def step():
        y = ff.fake_quantize(x, s, spec=spec, nu=nu)
        return y, *torch.autograd.grad(y, (x, s), torch.ones_like(y))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, gx, gs = step()
    graph.replay()
    first = y.clone()
    graph.replay()
    assert not torch.equal(first, y)
    # The draws of the backward are those of the forward: dy/ds = d - m u wherever it is summed.
    u, d = (x / 0.2).detach(), (y / 0.2).detach()
    share = torch.where(gx != 0, d - u, d).double().sum() * spec.grad_factor(x.numel(), 1)
    torch.testing.assert_close(gs.double(), share, rtol=1e-3, atol=1e-3)
    nu.fill_(0.0)  # a schedule needs no new graph
    graph.replay()
    plain = ff.fake_quantize(x, s, spec=ff.QuantSpec.lsq(4))
    if noise in ("temper", "bypass"):
        assert torch.equal(y, plain)

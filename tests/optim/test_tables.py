# SPDX-License-Identifier: Apache-2.0
"""Many small parameters go to the CPU kernels as tables of addresses: the same bits as lists, and lists where a table
cannot be."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastflat as ff
from fastflat import optim
from fastflat.backends import unavailable
from fastflat.optim import _tensors

from . import problems

pytestmark = pytest.mark.skipif(unavailable("cpu", "cpu") is not None, reason=f"{unavailable('cpu', 'cpu')}")
SHAPES = ((3,), (), (0,), (1025,), (7, 5), (2, 3, 4, 5)) * 6


def parameters(dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)) for shape in SHAPES]


def give(params, seed, without=()):
    g = torch.Generator().manual_seed(seed)
    for i, p in enumerate(params):
        drawn = torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype)
        p.grad = None if i in without else drawn


@pytest.fixture
def tables(monkeypatch):
    """Counts the tables that are made, and turns them off at will."""

    class Counted:
        made = 0
        allowed = True

    def table(self, *arguments):
        Counted.made += 1
        return original(self, *arguments)

    def init(self, params):
        before(self, params)
        self.pays = self.pays and Counted.allowed

    original, before = _tensors.Tables._table, _tensors.Tables.__init__
    monkeypatch.setattr(_tensors.Tables, "_table", table)
    monkeypatch.setattr(_tensors.Tables, "__init__", init)
    return Counted


def trained(make, dtype, tables, allowed, without=()):
    """Parameters and states after four steps, the third without some gradients, the fourth skipped."""
    tables.made, tables.allowed = 0, allowed
    params = parameters(dtype)
    opt = make(params)
    for step in range(4):
        give(params, 2 * step, without if step == 2 else ())
        if isinstance(opt, optim.SAM):
            opt.first_step(zero_grad=True)
            give(params, 2 * step + 1, without if step == 2 else ())
        if step == 3:
            opt.grad_scale, opt.found_inf = torch.tensor(1.0), torch.tensor(1.0)
        opt.step()
        opt.zero_grad()
    states = [v for s in opt.state_dict()["state"].values() for v in s.values()]
    return [*params, *states], tables.made


MAKERS = {
    **{base: lambda p, base=base: optim.SAM(p, base, lr=0.1, rho=0.5) for base in optim.BASES},
    "momentum": lambda p: optim.SAM(p, lr=0.1, momentum=0.9, rho=0.5, weight_decay=0.1),
    "averaged": lambda p: optim.SAM(p, "adam", lr=0.1, rho=0.5, average="ema"),
    "adaptive": lambda p: optim.SAM(p, lr=0.1, rho=0.5, adaptive=True, eta=0.01),
    "swap": lambda p: optim.SAM(p, lr=0.1, rho=0.5, storage="swap", metric="linf"),
    "gsam": lambda p: optim.GSAM(p, lr=0.1, rho=0.5),
    "gnp": lambda p: optim.GNP(p, lr=0.1, rho=0.5),
    "base": lambda p: optim.SGD(p, lr=0.1, momentum=0.9),
    "groups": lambda p: optim.SAM([{"params": p[:20]}, {"params": p[20:], "rho": 0.0, "lr": 0.5}], lr=0.1, rho=0.5),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tables_change_no_bit(name, dtype, tables):
    lists, none = trained(MAKERS[name], dtype, tables, False, without=(3, 10))
    found, made = trained(MAKERS[name], dtype, tables, True, without=(3, 10))
    assert (none, made > 4) == (0, True)
    assert problems.same([t.detach() for t in found], [t.detach() for t in lists])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_masters(base, dtype, tables):
    def make(params):
        return optim.SAM(params, base, lr=0.1, rho=0.5, storage="master")

    lists, none = trained(make, dtype, tables, False)
    found, made = trained(make, dtype, tables, True)
    assert (none, made > 4) == (0, True)
    assert problems.same([t.detach() for t in found], [t.detach() for t in lists])


def test_mixed_types(tables):
    """Tables hold the type of each tensor."""
    results = []
    for allowed in (False, True):
        tables.made, tables.allowed = 0, allowed
        params = [*parameters(torch.float32), *parameters(torch.bfloat16, 1), *parameters(torch.float16, 2)]
        opt = optim.SAM(params, lr=0.1, rho=20.0, momentum=0.9)
        for step in range(2):
            give(params, 2 * step)
            opt.first_step(zero_grad=True)
            give(params, 2 * step + 1)
            opt.second_step(zero_grad=True)
        results.append([p.detach() for p in params])
        assert (tables.made > 0) == allowed
    assert problems.same(*results)


def test_other_layouts_are_lists(tables):
    """Gradients or weights that are not contiguous: each step as with contiguous ones."""
    results = []
    for turned in (None, "gradients", "weights"):
        params = [nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(i))) for i in range(20)]
        if turned == "weights":
            params[3] = nn.Parameter(params[3].detach().t().contiguous().t())
        opt = optim.SAM(params, lr=0.1, rho=0.5, momentum=0.9)
        for step in range(3):
            for number in range(2):
                give(params, 2 * step + number)
                if turned == "gradients" and step == 1:
                    params[5].grad = params[5].grad.t().contiguous().t()
                opt.second_step() if number else opt.first_step(zero_grad=True)
        results.append([p.detach().contiguous() for p in params])
    assert problems.same(results[0], results[1])
    assert problems.same(results[0], results[2])


def test_weights_that_move_are_followed(tables):
    """p.data with other memory between steps and between passes, and loaded states."""
    results = []
    for moves in (False, True):
        params = parameters()
        opt = optim.SAM(params, "adam", lr=0.1, rho=0.5)
        for step in range(3):
            for number in range(2):
                give(params, 2 * step + number)
                if moves:
                    for p in params[::2]:
                        p.data = p.data.clone()
                opt.second_step() if number else opt.first_step(zero_grad=True)
            if moves:
                opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        results.append([p.detach() for p in params])
    assert problems.same(*results)


def test_another_size_raises_and_changes_nothing(tables):
    params = parameters()
    opt = optim.SAM(params, lr=0.1, rho=0.5, momentum=0.9)
    give(params, 0)
    opt.first_step(zero_grad=True)
    give(params, 1)
    opt.second_step(zero_grad=True)
    params[0].data = torch.randn(2)
    give(params, 2)
    before = [p.detach().clone() for p in params]
    opt.first_step()  # the place in the backup is large enough
    with pytest.raises(RuntimeError, match="momenta must have the shape of the weight"):
        opt.second_step()
    opt.restore()
    assert problems.same(before, [p.detach() for p in params])


def test_gradients_of_another_type(tables):
    """Halves of fp32 masters' gradients do not come as what they are not."""
    params = parameters()
    opt = optim.SAM(params, lr=0.1, rho=0.5)
    give(params, 0)
    opt.first_step(zero_grad=True)
    opt.restore()
    if not hasattr(params[0], "grad_dtype"):
        pytest.skip("this torch has no grad_dtype")
    expected = []
    for allowed in (True, False):
        tables.allowed = allowed
        params = parameters()
        opt = optim.SAM(params, lr=0.1, rho=0.5)
        for p in params:
            p.grad_dtype = torch.bfloat16
            p.grad = torch.ones_like(p, dtype=torch.bfloat16)
        opt.first_step()
        expected.append([p.detach().clone() for p in params])
    assert problems.same(*expected)


def test_steps_leave_nothing_behind(tables):
    params = parameters()
    opt = optim.SAM(params, "adam", lr=0.1, rho=0.5)
    sizes = []
    for step in range(4):
        give(params, 2 * step)
        opt.first_step()
        give(params, 2 * step + 1)
        opt.second_step()
        plans = (*opt._plans.values(), *opt._ascents.values())
        sizes.append([(len(p._tables._known), len(p._tables._states), len(p._tables._templates)) for p in plans])
    assert sizes[1] == sizes[3]


def test_reference_takes_lists(tables):
    with ff.backend("reference"):
        params = parameters()
        opt = optim.SAM(params, lr=0.1, rho=0.5)
        give(params, 0)
        opt.first_step()
        opt.restore()
    assert tables.made == 0


def test_few_or_large_parameters_are_lists(tables):
    for shapes in (((5,),) * 15, ((40000,),) * 16):
        params = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
        opt = optim.SGD(params, lr=0.1)
        give(params, 0)
        opt.step()
    assert tables.made == 0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (([0], [1], [7]), "must be a table of addresses, numbers of elements and storage types"),
        (([0], [-1], [0]), "must be a table of addresses, numbers of elements and storage types"),
        (([0, 0], [0, 0], [0, 0]), "must be as long as the list of weights, 1"),
    ],
)
def test_a_broken_table_raises(rows, message):
    from fastflat import _ops

    ascent = _ops.callable_of("sharpness_ascent_")
    scale = torch.ones(3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=message):
        ascent([torch.ones(1)], [torch.tensor(rows)], [], None, [], scale, [0], 0.0, None)
    with pytest.raises(RuntimeError, match=message if len(rows[0]) == 1 else "as long as"):
        ascent([torch.tensor(rows)], [torch.ones(1)], [], None, [], scale, [0], 0.0, None)


def test_an_integer_weight_is_no_table():
    from fastflat import _ops

    sums = _ops.callable_of("sharpness_sums")
    for t in (torch.zeros(3, dtype=torch.int64), torch.zeros(3, 4, dtype=torch.int32), torch.zeros(2, 4).long()):
        with pytest.raises(RuntimeError, match="must be float32, bfloat16, float16 or float64"):
            sums([t], [], [0], 0.0)

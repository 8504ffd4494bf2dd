# SPDX-License-Identifier: Apache-2.0
"""Weights come back bit for bit, whatever happens between the two passes, and bad calls change nothing."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastflat import optim

from . import problems

VIEW = {8: torch.int64, 4: torch.int32, 2: torch.int16}
STORED = [
    ("backup", torch.float32), ("backup", torch.float64), ("backup", torch.bfloat16), ("backup", torch.float16),
    ("swap", torch.float32), ("swap", torch.bfloat16), ("master", torch.bfloat16), ("master", torch.float16),
    ("master", torch.float32),
]  # fmt: skip


def awkward(dtype, seed=0):
    """Parameters with every kind of number, of awkward sizes and layouts."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for shape in ((), (1,), (7,), (33, 5), (2, 3, 4, 5), (0, 3), (70001,)):
        x = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
        if x.numel() > 6:
            flat = x.view(-1)
            flat[:6] = torch.tensor([0.0, -0.0, 1e-40, -1e-7, 6e4, 1e-30]).to(dtype)
        made.append(nn.Parameter(x.to(memory_format=torch.channels_last) if len(shape) == 4 else x))
    return made


def raw(params):
    return [p.detach().clone().contiguous().view(VIEW[p.element_size()]) for p in params]


def give_gradients(params, seed, without=()):
    g = torch.Generator().manual_seed(seed)
    for i, p in enumerate(params):
        p.grad = None if i in without else torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype)


FORMS = ({}, {"adaptive": True, "eta": 0.01}, {"metric": "linf"})


def undone(opt, params, way, seed):
    """An ascent that something ends: the ways a step can come to nothing. Whether the weights had moved."""
    before, moved = raw(params), []

    def closure():
        if opt.is_perturbed:
            moved.append(not problems.same(raw(params), before))
            raise ArithmeticError
        opt.zero_grad()
        give_gradients(params, seed)
        return torch.zeros(())

    if way == "closure":
        with pytest.raises(ArithmeticError):
            opt.step(closure)
        return moved == [True]
    give_gradients(params, seed, without=(seed % 5,))
    if way == "perturbed":
        with opt.perturbed():
            return not problems.same(raw(params), before)
    opt.first_step(zero_grad=True)
    moved = not problems.same(raw(params), before)
    if way == "restore":
        opt.restore()
    elif way == "next":
        # The second backward ran, its step was forgotten.
        give_gradients(params, seed + 1)
        opt.zero_grad()
    elif way == "none":
        opt.second_step()
    else:
        give_gradients(params, seed + 1)
        params[3].grad[0, 0] = math.inf
        opt.found_inf = torch.tensor(1.0)
        opt.step()
        del opt.found_inf
    opt.zero_grad()
    return moved


@pytest.mark.parametrize(("storage", "dtype"), STORED)
def test_restore_is_exact_in_a_thousand_ascents(storage, dtype):
    ways = ("restore", "next", "none", "skipped", "closure", "perturbed")
    moved = 0
    for number, form in enumerate(FORMS):
        # The large one is for threads and units: few ascents of it do.
        for large, count in ((True, 12), (False, 330)):
            params = awkward(dtype)[: None if large else -1]
            opt = optim.SAM(params, lr=0.1, rho=3.0, momentum=0.9, storage=storage, **form)
            before, addresses = raw(params), [p.data_ptr() for p in params]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for seed in range(count):
                    moved += undone(opt, params, ways[seed % len(ways)], 1000 * number + seed)
                    assert problems.same(raw(params), before)
                    assert [p.data_ptr() for p in params] == addresses
    assert moved > 900


@pytest.mark.parametrize(("storage", "dtype"), STORED)
def test_skipped_step_restores(storage, dtype):
    """found_inf, as torch.amp.GradScaler sets it: weights, momentum and count stay."""
    params = awkward(dtype)
    opt = optim.SAM(params, lr=0.1, rho=3.0, momentum=0.9, storage=storage, rounding="nearest")
    give_gradients(params, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt.first_step(zero_grad=True)
        give_gradients(params, 1)
        opt.second_step(zero_grad=True)
        state = copy.deepcopy(opt.state_dict()["state"])
        before = raw(params)
        give_gradients(params, 2)
        opt.first_step(zero_grad=True)
    give_gradients(params, 3)
    params[3].grad[0, 0] = math.inf
    opt.grad_scale, opt.found_inf = torch.tensor(1024.0), torch.tensor(1.0)
    opt.step()
    del opt.grad_scale, opt.found_inf
    assert problems.same(raw(params), before)
    for number, values in opt.state_dict()["state"].items():
        for name, value in values.items():
            assert torch.equal(value, state[number][name]), name


@pytest.mark.parametrize(("storage", "dtype"), STORED)
@pytest.mark.parametrize("base", ["sgd", torch.optim.RMSprop])
def test_parameters_without_a_second_gradient_are_restored(storage, dtype, base):
    if storage == "master" and base != "sgd":
        pytest.skip("masters need a fused base")
    params = awkward(dtype)
    opt = optim.SAM(params, base, lr=0.1, rho=3.0, storage=storage)
    before = raw(params)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        give_gradients(params, 0, without=(4,))
        opt.first_step(zero_grad=True)
    give_gradients(params, 1, without=(2, 3))
    opt.second_step(zero_grad=True)
    after = raw(params)
    assert problems.same([after[2], after[3]], [before[2], before[3]])
    assert not torch.equal(after[4], before[4])
    assert not torch.equal(after[6], before[6])


@pytest.mark.parametrize("storage", ["backup", "swap"])
def test_mixed_sets_step_as_each_alone(storage):
    """Perturbed or not, with a gradient or not: each parameter's step is that of the formula (fp64)."""
    params = [nn.Parameter(torch.tensor([float(i + 1)], dtype=torch.float64)) for i in range(4)]
    groups = [{"params": params[:2]}, {"params": params[2:], "rho": 0.0, "lr": 0.5}]
    opt = optim.SAM(groups, lr=0.1, rho=0.5, storage=storage)
    give_gradients(params, 0, without=(1, 3))
    first = params[0].grad.clone()
    opt.first_step(zero_grad=True)
    assert params[0].item() == pytest.approx(1.0 + 0.5 * math.copysign(1, first.item()), rel=1e-14)
    assert [p.item() for p in params[1:]] == [2.0, 3.0, 4.0]
    give_gradients(params, 1, without=(2,))
    g = [None if p.grad is None else p.grad.item() for p in params]
    opt.second_step()
    want = [1.0 - 0.1 * g[0], 2.0 - 0.1 * g[1], 3.0, 4.0 - 0.5 * g[3]]
    assert [p.item() for p in params] == pytest.approx(want, rel=1e-14)


@pytest.mark.parametrize("storage", ["backup", "swap"])
def test_exceptions_restore(storage):
    model = problems.net()
    x, y = problems.batch()
    opt = optim.SAM(model, lr=0.1, rho=0.5, storage=storage)
    before = problems.bits(model)
    calls = []

    def closure():
        calls.append(1)
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        if len(calls) == 2:
            raise KeyboardInterrupt
        return loss

    with pytest.raises(KeyboardInterrupt):
        opt.step(closure)
    assert len(calls) == 2
    assert problems.same(problems.bits(model), before)
    assert not opt.is_perturbed
    with pytest.raises(ZeroDivisionError):
        fail_while_perturbed(opt, model, before)
    assert problems.same(problems.bits(model), before)
    opt.zero_grad()
    F.cross_entropy(model(x), y).backward()
    opt.first_step(zero_grad=True)
    with pytest.raises(ZeroDivisionError), opt.second_pass():
        raise ZeroDivisionError
    assert problems.same(problems.bits(model), before)


def fail_while_perturbed(opt, model, before):
    with opt.perturbed():
        assert opt.is_perturbed
        assert not problems.same(problems.bits(model), before)
        raise ZeroDivisionError


def test_a_new_step_restores_what_a_broken_one_left():
    """The next first_step, or a zero_grad that drops second gradients, restores; one between the passes does not."""
    model = problems.net().eval()
    x, y = problems.batch()
    opt = optim.SAM(model.parameters(), lr=0.1, rho=0.5)
    before = problems.bits(model)
    backward = lambda: F.cross_entropy(model(x), y).backward()  # noqa: E731
    for between in (lambda: opt.first_step(zero_grad=True), lambda: (opt.first_step(), opt.zero_grad())):
        backward()
        between()
        opt.zero_grad()  # nothing is there: it may be said twice
        assert opt.is_perturbed
        backward()
        opt.zero_grad()
        assert not opt.is_perturbed
        assert problems.same(problems.bits(model), before)
        with pytest.raises(RuntimeError, match=r"second_step: first_step\(\) must come before it"):
            opt.second_step()
    backward()
    opt.first_step()
    opt.first_step()
    opt.restore()
    assert problems.same(problems.bits(model), before)


def test_stale_perturbations_do_not_come_back():
    """A parameter that was perturbed a step ago and has no gradient now stays (the trap of kept perturbations)."""
    a, b = (nn.Parameter(torch.tensor([1.0])) for _ in range(2))
    opt = optim.SAM([a, b], lr=0.1, rho=0.5)
    for without in ((), (1,)):
        give_gradients([a, b], 0, without)
        opt.first_step(zero_grad=True)
        give_gradients([a, b], 1, without)
        held = b.detach().clone()
        opt.second_step(zero_grad=True)
    assert torch.equal(b.detach(), held)


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rho": -1.0}, ValueError, "rho must be a finite number of at least 0, got -1.0"),
        ({"rho": math.nan}, ValueError, "rho must be a finite number of at least 0, got nan"),
        ({"base": "adamx"}, ValueError, "base must be one of sgd, adam, adamw, padam, lars, lamb, or a class"),
        ({"base": 3}, TypeError, "base must be a name or an optimizer class, got int"),
        ({"lr": -0.1}, ValueError, "lr must be a finite number of at least 0, got -0.1"),
        ({"momentum": 0.0, "nesterov": True}, ValueError, "nesterov must have a momentum"),
        ({"base": "adam", "betas": (0.9, 1.0)}, ValueError, r"betas must be two numbers in \[0, 1\)"),
        ({"momentun": 0.9}, TypeError, "base 'sgd' has no option momentun"),
        ({"storage": "disk"}, ValueError, "storage must be one of backup, swap, master, got 'disk'"),
        ({"metric": "l1"}, ValueError, "metric must be 'l2' or 'linf', got 'l1'"),
        ({"metric": "linf", "adaptive": True}, ValueError, "adaptive must be False with metric 'linf'"),
        ({"rounding": "up"}, ValueError, "rounding must be 'nearest' or 'stochastic', got 'up'"),
        ({"average": "median"}, ValueError, "average must be None, ema or mean, got 'median'"),
        ({"base": torch.optim.RMSprop, "average": "ema"}, ValueError, "average and storage='master' must have a fused"),
        ({"base": torch.optim.RMSprop, "fused": True}, ValueError, "fused=True must have a base of SGD, Adam, AdamW"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=f"fastflat.optim.SAM: {message}"):
        optim.SAM([nn.Parameter(torch.ones(3))], **{"lr": 0.1, **options})


def test_bad_parameters():
    with pytest.raises(
        TypeError, match=r"parameters must be float32, float64, bfloat16 or float16, got torch\.complex64"
    ):
        optim.SAM([nn.Parameter(torch.ones(3, dtype=torch.complex64))])
    with pytest.raises(ValueError, match="parameters must be on one device, got cpu and meta"):
        optim.SAM([nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, device="meta"))])
    base = torch.ones(6)
    with pytest.raises(ValueError, match="parameters must not share memory"):
        optim.SAM([nn.Parameter(base[:4]), nn.Parameter(base[3:])])
    halves = [nn.Parameter(base[:3]), nn.Parameter(base[3:])]
    with pytest.raises(ValueError, match="storage 'swap' must have parameters with memory of their own"):
        optim.SAM(halves, storage="swap")
    optim.SAM(halves)


def test_bad_gradients_change_nothing():
    embedding = nn.Embedding(5, 3, sparse=True)
    other = nn.Parameter(torch.ones(3))
    opt = optim.SAM([other, *embedding.parameters()], lr=0.1)
    (embedding(torch.tensor([1, 2])) * other).sum().backward()
    before = [other.detach().clone(), embedding.weight.detach().clone()]
    with pytest.raises(ValueError, match=r"gradients must be dense, got torch.sparse_coo; build the embedding with"):
        opt.first_step()
    assert torch.equal(other, before[0])
    assert torch.equal(embedding.weight, before[1])
    assert not opt.is_perturbed
    opt.zero_grad()
    with pytest.raises(RuntimeError, match="no parameter has a gradient; call backward"):
        opt.first_step()


def test_calls_out_of_order():
    p = nn.Parameter(torch.ones(3))
    opt = optim.SAM([p], lr=0.1)
    for call in (opt.second_step, opt.accumulate, opt.step):
        with pytest.raises(RuntimeError, match=r"first_step\(\) must come before it"):
            call()
    p.grad = torch.ones(3)
    opt.first_step(zero_grad=True)
    for name, call in (
        ("state_dict", opt.state_dict),
        ("load_state_dict", lambda: opt.load_state_dict({})),
        ("add_param_group", lambda: opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]})),
    ):
        with pytest.raises(RuntimeError, match=f"{name}: the parameters must not be perturbed"):
            call()
    opt.restore()
    assert torch.equal(p.detach(), torch.ones(3))
    opt.add_param_group({"params": [nn.Parameter(torch.ones(2))], "rho": 0.3})
    assert opt.param_groups[1]["rho"] == 0.3

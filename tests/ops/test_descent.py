# SPDX-License-Identifier: Apache-2.0
"""The descent family: the compiled CPU kernels against the reference in every bit, and the reference against torch's
optimizers and the papers' formulas."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastflat  # noqa: F401
from fastflat import _ops
from fastflat._ops.descent import HYPER, ROW, RULES
from fastflat.backends import reference

from . import list_cases


def check(step, lists):
    expected = lists.copy()
    ours, returned = list_cases.run_step(_ops.callable_of(step.op), step, lists)
    want, wanted = list_cases.run_step(getattr(reference, step.op), step, expected)
    list_cases.assert_same(ours, want)
    if wanted is not None:
        torch.testing.assert_close(returned, wanted, rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.parametrize("storage", list_cases.STORAGES)
@pytest.mark.parametrize("step", list_cases.STEPS, ids=lambda s: s.name)
@pytest.mark.parametrize("larger", [False, True])
def test_step_has_the_bits_of_the_reference(compiled, storage, step, larger):
    check(step, list_cases.make(storage, list_cases.LARGER if larger else list_cases.SHAPES, special=not larger))


@pytest.mark.parametrize("step", list_cases.STOCHASTIC, ids=lambda s: s.name)
def test_step_rounds_bfloat16_by_the_same_draws(compiled, step):
    check(step, list_cases.make("bf16", (*list_cases.SHAPES, *list_cases.LARGER)))


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), min_size=1, max_size=5),
    storage=st.sampled_from(list(list_cases.STORAGES)),
    step=st.sampled_from(list_cases.STEPS + list_cases.STOCHASTIC),
    seed=st.integers(0, 50),
)
def test_any_list(shapes, storage, step, seed):
    lists = list_cases.make(storage, tuple(shapes), seed=seed)
    check(step, lists)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("skip", [0.0, 1.0])
def test_rows_have_the_bits_of_the_reference(compiled, rule, skip):
    generator = torch.Generator().manual_seed(3)
    hyper = torch.rand(3, len(HYPER), dtype=torch.float64, generator=generator)
    hyper[:, [HYPER.index(n) for n in ("decoupled", "nesterov", "ascend")]] = torch.eye(3, dtype=torch.float64)
    group = torch.tensor([0, 2, 1, 1, 0, 2])
    steps = torch.tensor([0.0, 1.0, 2.0, 77.0, 123456.0, 2.0**40], dtype=torch.float64)
    mix = torch.tensor([0.3, 0.7, skip], dtype=torch.float64)
    sums = torch.rand(2, 6, 3, dtype=torch.float64, generator=generator)
    sums[0, 1] = sums[1, 2] = 0.0
    ours, theirs = steps.clone(), steps.clone()
    made = _ops.callable_of("descent_rows_")(hyper, group, ours, mix, sums[0], sums[1], RULES[rule])
    want = reference.descent_rows_(hyper, group, theirs, mix, sums[0], sums[1], RULES[rule])
    assert torch.equal(ours, theirs)
    assert torch.equal(ours, steps + (1 - skip))
    assert torch.equal(made.nan_to_num(7.0), want.nan_to_num(7.0))


def steps_of(rule, op_states, numbers, n=12):
    """Weights after n steps of the raw ops, and the gradients that were used."""
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(50, dtype=torch.float64, generator=generator)
    states = [torch.zeros_like(w) for _ in range(op_states)]
    gradients = [torch.randn(50, dtype=torch.float64, generator=generator) for _ in range(n)]
    count = torch.zeros(1, dtype=torch.float64)
    mix = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    start = w.clone()
    for g in gradients:
        sums = reference.sharpness_sums([g], [w], [1], 0.0)
        flipped = sums[:, [2, 1, 0]]
        row = reference.descent_rows_(
            list_cases.hyper(**numbers), torch.zeros(1, dtype=torch.int64), count, mix, sums, flipped, RULES[rule]
        )
        if rule in ("sgd", "lars"):
            reference.descent_sgd_([w], [], None, [], [g], [], states[:1], [], row)
        elif rule == "lamb":
            sums = reference.descent_lamb_moments_([w], None, [], [g], [], [states[0]], [states[1]], row)
            reference.descent_lamb_([w], [], None, [], [states[0]], [states[1]], [], row, sums)
        else:
            largest = [states[2]] if op_states == 3 else []
            reference.descent_adam_(
                [w], [], None, [], [g], [], [states[0]], [states[1]], largest, [], row, rule == "padam"
            )
    return start, gradients, w


def follow(optimizer, start, gradients):
    p = torch.nn.Parameter(start.clone())
    base = optimizer([p])
    for g in gradients:
        p.grad = g.clone()
        base.step()
    return p.detach()


@pytest.mark.parametrize(
    ("rule", "states", "numbers", "optimizer"),
    [
        ("sgd", 0, {"lr": 0.1, "decay": 0.1}, lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1)),
        (
            "sgd",
            1,
            {"lr": 0.1, "beta1": 0.9, "beta2": 0.2, "decay": 0.1},
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.2, weight_decay=0.1),
        ),
        (
            "sgd",
            1,
            {"lr": 0.1, "beta1": 0.9, "nesterov": 1, "ascend": 1},
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, maximize=True),
        ),
        (
            "adam",
            2,
            {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "decay": 0.1},
            lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.9, 0.99), weight_decay=0.1),
        ),
        (
            "adam",
            3,
            {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "decay": 0.1, "decoupled": 1},
            lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.9, 0.99), weight_decay=0.1, amsgrad=True),
        ),
    ],
)
def test_follows_torch(rule, states, numbers, optimizer):
    """fp64: 12 steps within 1e-13 of torch's own optimizer, which forms some sums in another order."""
    start, gradients, w = steps_of(rule, states, numbers)
    torch.testing.assert_close(w, follow(optimizer, start, gradients), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(
    ("partial", "want"),
    [(0.5, (1.0, 1.0, 1.0, 1.0)), (0.25, (0.00562, 0.0562, 0.178, 0.562)), (0.125, (4.2e-4, 0.0133, 0.075, 0.42))],
)
def test_first_step_of_padam(partial, want):
    """The table of the method study for g = 1e-3, 0.1, 1, 10 at lr 1, to its three digits."""
    g = torch.tensor([1e-3, 0.1, 1.0, 10.0], dtype=torch.float64)
    w, m, v, x = (torch.zeros_like(g) for _ in range(4))
    row = list_cases.rows(1, "padam", steps=0.0, lr=1.0, beta1=0.9, beta2=0.999, eps=1e-8, partial=partial)
    reference.descent_adam_([w], [], None, [], [g], [], [m], [v], [x], [], row, True)
    assert (-w).tolist() == pytest.approx(list(want), rel=0.02)


def test_lars_by_its_formula():
    """m = mu m + lr r (g + decay w), w -= m, r = trust |w| / (|g| + decay |w|): fp64, 12 steps."""
    numbers = {"lr": 0.3, "beta1": 0.9, "decay": 0.05, "trust": 0.02, "eps": 0.0}
    start, gradients, w = steps_of("lars", 1, numbers)
    x, m = start.clone(), torch.zeros_like(start)
    for g in gradients:
        r = 0.02 * x.norm() / (g.norm() + 0.05 * x.norm())
        m = 0.9 * m + 0.3 * r * (g + 0.05 * x)
        x = x - m
    torch.testing.assert_close(w, x, rtol=1e-12, atol=1e-14)


def test_lamb_by_its_formula():
    numbers = {"lr": 0.03, "beta1": 0.9, "beta2": 0.99, "decay": 0.05, "trust": 1.0, "eps": 1e-6}
    start, gradients, w = steps_of("lamb", 2, numbers)
    x, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for t, g in enumerate(gradients, 1):
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        u = (m / (1 - 0.9**t)) / ((v / (1 - 0.99**t)).sqrt() + 1e-6) + 0.05 * x
        x = x - 0.03 * x.norm() / u.norm() * u
    torch.testing.assert_close(w, x, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("factor", [1.0, 1e-3, 1e3])
def test_lars_and_lamb_do_not_see_the_scale_of_a_gradient(factor):
    """|step| / |w| = lr trust and lr: 1.0 to 12 digits at lr 1, trust 1, whatever the gradient's scale."""
    w = torch.randn(40, dtype=torch.float64)
    g = factor * torch.randn(40, dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.int64)
    mix = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    g_sums, w_sums = (reference.sharpness_sums([t], [], [0], 0.0) for t in (g, w))
    for rule, op in (("lars", "sgd"), ("lamb", "lamb")):
        new, m, v = w.clone(), torch.zeros_like(w), torch.zeros_like(w)
        numbers = {"lr": 1.0, "beta1": 0.0, "beta2": 0.0, "trust": 1.0, "eps": 0.0}
        count = torch.zeros(1, dtype=torch.float64)
        row = reference.descent_rows_(list_cases.hyper(**numbers), zero, count, mix, g_sums, w_sums, RULES[rule])
        if op == "sgd":
            reference.descent_sgd_([new], [], None, [], [g], [], [], [], row)
        else:
            sums = reference.descent_lamb_moments_([new], None, [], [g], [], [m], [v], row)
            reference.descent_lamb_([new], [], None, [], [m], [v], [], row, sums)
        assert ((new - w).norm() / w.norm()).item() == pytest.approx(1.0, rel=1e-12)


def test_tables_are_those_of_the_functors():
    """Columns by name and in order, in Python and in csrc/math/descent.h."""
    import re
    from pathlib import Path

    text = (Path(__file__).parents[2] / "csrc/math/descent.h").read_text()
    enums = [re.sub(r"//[^\n]*", "", body) for body in re.findall(r"enum Column : int \{(.*?)\};", text, re.DOTALL)]
    names = [tuple(n.strip() for n in body.split(",") if n.strip()) for body in enums]
    assert names == [(*ROW, "columns"), (*HYPER, "columns")]
    flags = dict(re.findall(r"(\w+) = (\d)", re.search(r"enum Flag : int \{(.*?)\}", text)[1]))
    from fastflat._ops.descent import FLAGS

    assert {k: int(v) for k, v in flags.items()} == FLAGS
    assert list(RULES) == re.findall(r"rule_(\w+)", re.search(r"enum DescentRule : int64_t \{(.*?)\}", text)[1])


@pytest.mark.parametrize("step", [s for s in list_cases.STEPS if s.name in ("momentum", "amsgrad", "moments", "lamb")])
def test_opcheck(step):
    lists = list_cases.make("fp32", ((3,), (4, 5)), special=False)
    op = _ops.overload(step.op)
    torch.library.opcheck(op, step.arguments(lists), test_utils=("test_schema", "test_faketensor"))

# SPDX-License-Identifier: Apache-2.0
"""The descent kernels, executed from their .cu source, against the reference: weights and states bit for bit."""

import dataclasses

import pytest
import torch

from fastflat._ops.descent import HYPER, RULES
from fastflat.backends import reference
from tests.ops import list_cases

from .cases import same_bits
from .test_sharpness import MANY, shifted

EVERY = (*list_cases.STEPS, *list_cases.STOCHASTIC)
EACH_OP = [s for s in EVERY if s.name in ("momentum", "amsgrad", "padam", "moments", "lamb")]


def check(emulated, step, lists):
    expected = lists.copy()
    ours, sums = list_cases.run_step(getattr(emulated, step.op), step, lists)
    want, wanted = list_cases.run_step(getattr(reference, step.op), step, expected)
    list_cases.assert_same(ours, want)
    if wanted is not None:
        torch.testing.assert_close(sums, wanted, rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.parametrize("storage", list_cases.STORAGES)
@pytest.mark.parametrize("step", list_cases.STEPS, ids=lambda s: s.name)
def test_step(emulated, storage, step):
    check(emulated, step, list_cases.make(storage))
    check(emulated, step, list_cases.make(storage, ((16387,),), special=False))


@pytest.mark.parametrize("storage", ["bf16", "master bf16"])
@pytest.mark.parametrize("step", list_cases.STOCHASTIC, ids=lambda s: s.name)
def test_step_rounds_bfloat16_by_the_same_draws(emulated, storage, step):
    check(emulated, step, list_cases.make(storage, (*list_cases.SHAPES, (16391,))))


@pytest.mark.parametrize("step", EACH_OP, ids=lambda s: s.name)
@pytest.mark.parametrize("storage", list_cases.STORAGES)
def test_step_over_more_tensors_than_a_launch_takes(emulated, step, storage):
    emulated.module.set_order(7)
    check(emulated, step, list_cases.make(storage, MANY[::2], special=False))
    assert 2 <= emulated.module.take_counts()["launches"] <= 5


@pytest.mark.parametrize("step", [s for s in EVERY if s.op != "descent_rows_"][::3], ids=lambda s: s.name)
@pytest.mark.parametrize("storage", ["fp32", "bf16", "master bf16", "fp64"])
@pytest.mark.parametrize("by", [(1, 1, 1), (0, 1, 3)], ids=str)
def test_step_off_the_16_byte_grid(emulated, step, storage, by):
    lists = list_cases.make(storage, (*list_cases.SHAPES, (16383,)))
    lists.ws, lists.gs, lists.averages = (shifted(t, k) for t, k in zip((lists.ws, lists.gs, lists.averages), by))
    lists.states = [shifted(states, k) for states, k in zip(lists.states, by)]
    check(emulated, step, lists)


def test_unusual_combinations_of_types(emulated):
    """Gradients of both passes in two types and copies in a third; 16-bit weights with fp32 gradients."""
    for of_w, of_g, of_f, of_out in (
        (torch.float32, torch.float32, torch.bfloat16, torch.float16),
        (torch.float32, torch.float32, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.bfloat16, torch.float16, torch.float16),
    ):
        for step in EVERY:
            lists = list_cases.make({torch.bfloat16: "bf16", torch.float16: "fp16"}.get(of_w, "fp32"))
            lists.gs, lists.firsts = [g.to(of_g) for g in lists.gs], [f.to(of_f) for f in lists.firsts]
            lists.outs = [torch.empty_like(w, dtype=of_out) for w in lists.ws]
            check(emulated, dataclasses.replace(step, mixed=step.op != "descent_lamb_"), lists)


def test_a_skipped_step_restores_every_bit(emulated):
    """The payload of a NaN too; moments and averages stay."""
    steps = [s for s in EVERY if s.name in ("skipped", "adam skipped", "skipped, stochastic")]
    steps.append(dataclasses.replace(EACH_OP[-1], name="lamb skipped", mix=(0.0, 1.0, 1.0)))
    for storage, integer in (("fp32", torch.int32), ("bf16", torch.int16), ("fp16", torch.int16)):
        for step in steps:
            lists = list_cases.make(storage, ((1 << 16,),))
            bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32)
            bits = bits << 16 | 0x1234 if integer == torch.int32 else bits.to(integer)
            lists.backup[64 : 64 + bits.numel() * bits.element_size()] = bits.view(torch.uint8)
            before = lists.copy()
            getattr(emulated, step.op)(*step.arguments(lists))
            assert torch.equal(lists.ws[0].view(integer), bits)
            list_cases.assert_same([t for s in lists.states for t in s], [t for s in before.states for t in s])
            list_cases.assert_same(lists.averages, before.averages)


def test_moments_do_not_depend_on_order_or_address(emulated):
    step = next(s for s in EVERY if s.name == "moments")
    for storage in ("fp32", "master bf16", "fp64"):
        lists = list_cases.make(storage, ((33001,), (77,)), special=False)
        again = lists.copy()
        again.ws, again.gs = shifted(again.ws, 1), shifted(again.gs, 3)
        again.states = [shifted(states, 2) for states in again.states]
        sums = emulated.descent_lamb_moments_(*step.arguments(lists))
        emulated.module.set_order(3)
        assert torch.equal(emulated.descent_lamb_moments_(*step.arguments(again)), sums)
        emulated.module.set_order(0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("skip", [0.0, 1.0])
@pytest.mark.parametrize("count", [6, 300])
def test_rows(emulated, rule, skip, count):
    generator = torch.Generator().manual_seed(3)
    hyper = torch.rand(3, len(HYPER), dtype=torch.float64, generator=generator)
    hyper[:, [HYPER.index(n) for n in ("decoupled", "nesterov", "ascend")]] = torch.eye(3, dtype=torch.float64)
    group = torch.randint(3, (count,), generator=generator)
    steps = torch.tensor([0.0, 1.0, 2.0, 77.0, 123456.0, 2.0**40] * (count // 6), dtype=torch.float64)
    mix = torch.tensor([0.3, 0.7, skip], dtype=torch.float64)
    sums = torch.rand(2, count, 3, dtype=torch.float64, generator=generator)
    sums[0, 1] = sums[1, 2] = 0.0
    given = sums if rule == "lars" else (None, None)
    ours, theirs = steps.clone(), steps.clone()
    rows = emulated.descent_rows_(hyper, group, ours, mix, *given, RULES[rule])
    want = reference.descent_rows_(hyper, group, theirs, mix, *sums, RULES[rule])
    assert same_bits(rows, want)
    assert torch.equal(ours, theirs)
    assert torch.equal(ours, steps + (1 - skip))


#: Step, storage, bytes an element: weights from the backup, gradients and states read, weights, copies, states written.
MOVED = (
    ("momentum", "fp32", 20),
    ("averaged", "fp32", 28),
    ("not averaged", "fp32", 20),
    ("first", "fp32", 16),
    ("mixed", "master bf16", 22),
    ("skipped", "master bf16", 10),
    ("adam", "fp32", 28),
    ("amsgrad", "bf16", 32),
    ("lamb without trust", "fp32", 16),
    ("lamb", "master bf16", 26),
)


@pytest.mark.parametrize(("name", "storage", "bytes_each"), MOVED)
def test_bytes_moved(emulated, name, storage, bytes_each):
    step = next(s for s in EVERY if s.name == name)
    lists = list_cases.make(storage, ((40000,),), special=False)
    emulated.module.take_counts()
    getattr(emulated, step.op)(*step.arguments(lists))
    counts = emulated.module.take_counts()
    assert counts["read"] + counts["written"] == bytes_each * 40000

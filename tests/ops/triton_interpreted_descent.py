# SPDX-License-Identifier: Apache-2.0
"""The descent kernels in Triton's interpreter: steps and rows have the reference's bits, LAMB's sums agree to 1e-12.
Not collected by itself: test_triton_interpreter.py runs it in a process of its own."""

import pytest
import torch

from fastflat._ops.descent import FLAGS, HYPER, ROW, RULES
from fastflat.backends import reference
from fastflat.triton_kernels import _launch, _multi, _rows, _updates, descent

from . import comparison, list_cases

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

#: A tensor whose sums take two programs.
LONG = (_multi.STEPS.value * _launch.BLOCK + 5,)


@pytest.fixture(params=["listed", "one by one"])
def way(request, monkeypatch):
    """Launches for all tensors of a form, and those for each that a CUDA graph records."""
    if request.param == "one by one":
        monkeypatch.setattr(_multi, "captured", lambda ts: True)


def check(step, lists):
    expected = lists.copy()
    ours, returned = list_cases.run_step(getattr(descent, step.op), step, lists)
    want, wanted = list_cases.run_step(getattr(reference, step.op), step, expected)
    list_cases.assert_same(ours, want)
    if wanted is not None:
        torch.testing.assert_close(returned, wanted, rtol=1e-12, atol=0, equal_nan=True)


def named(*names):
    return [step for step in list_cases.STEPS if step.name in names]


@pytest.mark.parametrize("storage", list_cases.STORAGES)
@pytest.mark.parametrize("step", list_cases.STEPS, ids=lambda s: s.name)
def test_step(step, storage):
    check(step, list_cases.make(storage))


@pytest.mark.parametrize("storage", ["bf16", "master bf16"])
@pytest.mark.parametrize("step", list_cases.STOCHASTIC, ids=lambda s: s.name)
def test_step_rounds_bfloat16_by_the_same_draws(step, storage):
    check(step, list_cases.make(storage, (*list_cases.SHAPES, (2, 3, 4, 5))))


@pytest.mark.parametrize("storage", ["fp32", "fp64", "master fp16"])
@pytest.mark.parametrize("step", named("averaged", "amsgrad", "moments", "lamb"), ids=lambda s: s.name)
def test_step_by_each_way(way, step, storage):
    check(step, list_cases.make(storage, ((33, 7), (0,), LONG if step.name == "moments" else (1025,)), special=False))


@pytest.mark.parametrize("step", named("mixed", "skipped", "moments"), ids=lambda s: s.name)
def test_64_bit_offsets(step, monkeypatch):
    monkeypatch.setattr(_launch, "_NARROW_LIMIT", 0)
    check(step, list_cases.make("master bf16", ((5,), (1025,)), special=False))


def test_skipped_and_other_rows_in_one_list():
    """Each tensor follows its own row."""
    (step,) = named("averaged")
    lists = list_cases.make("master bf16")
    expected = lists.copy()
    for module, given in ((descent, lists), (reference, expected)):
        *arguments, rows, state = step.arguments(given)
        rows[::2, ROW.index("flags")] = FLAGS["skip"]
        rows[1::3, ROW.index("average")] = 0.0
        module.descent_sgd_(*arguments, rows, state)
    list_cases.assert_same(lists.tensors(), expected.tensors())


@pytest.mark.parametrize(
    ("dtype", "bits", "payload"),
    [
        (torch.float32, torch.int32, 0x7F800001),
        (torch.float16, torch.int16, 0x7C01),
        (torch.bfloat16, torch.int16, 0x7F81),
    ],
)
def test_restoring_keeps_payloads_of_nan(dtype, bits, payload):
    source = torch.full((70,), payload, dtype=bits)
    backup = torch.zeros(320, dtype=torch.uint8)
    backup[: 70 * dtype.itemsize] = source.view(torch.uint8)
    w, g = torch.zeros(70, dtype=dtype), torch.ones(70, dtype=dtype)
    descent.descent_sgd_([w], [], backup, [0], [g], [], [], [], list_cases.rows(1, "sgd", mix=(0.0, 1.0, 1.0)))
    assert torch.equal(w.view(bits), source)


def test_layouts_and_places_in_memory():
    """Strided weights and states, gradients in another order, storage that does not start on 16 bytes."""
    base = torch.randn(2, 3, 4, 12)
    ws = [base[..., ::2], torch.randn(61)[1:], torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)]
    gs = [torch.randn(2, 3, 4, 6), torch.randn(61)[1:], torch.randn(2, 3, 4, 5)]
    means = [torch.randn(6, 4, 3, 2).permute(3, 2, 1, 0), torch.randn(120)[::2], torch.randn(2, 3, 4, 5)]
    squares = [torch.rand(2, 3, 4, 6), torch.rand(61)[1:], torch.rand(2, 3, 4, 5)]
    # Without eps nothing but the mask keeps 0/0 beyond the end out of the sums.
    rows = list_cases.rows(3, "lamb", eps=0.0, lr=0.1, beta2=0.99, decay=0.1, trust=1.0)
    ours = [[w.as_strided(w.shape, w.stride(), w.storage_offset()) for w in ws], [m.clone() for m in means], squares]
    ours[1][1] = means[1]
    theirs = [[torch.empty_strided(t.shape, t.stride()).copy_(t) for t in ts] for ts in ours]
    between = base[..., 1::2].clone()
    both = ((descent, ours), (reference, theirs))
    sums, close = (module.descent_lamb_moments_(w, None, [], gs, [], m, v, rows) for module, (w, m, v) in both)
    torch.testing.assert_close(sums, close, rtol=1e-12, atol=0)
    for module, (w, m, v) in both:
        module.descent_lamb_(w, [], None, [], m, v, [], rows, sums)
    for a, b in zip(ours, theirs, strict=True):
        list_cases.assert_same(a, b)
    assert torch.equal(base[..., 1::2], between)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("skip", [0.0, 1.0])
def test_rows(rule, skip, monkeypatch):
    monkeypatch.setattr(_rows, "_BLOCK", 8)
    generator = torch.Generator().manual_seed(3)
    hyper = torch.rand(3, len(HYPER), dtype=torch.float64, generator=generator)
    hyper[:, [HYPER.index(n) for n in ("decoupled", "nesterov", "ascend")]] = torch.eye(3, dtype=torch.float64)
    hyper[1, HYPER.index("trust")] = 0.0
    group = torch.tensor([0, 2, 1, 1, 0, 2] * 3)
    steps = torch.tensor([0.0, 1.0, 2.0, 77.0, 123456.0, 2.0**40] * 3, dtype=torch.float64)
    mix = torch.tensor([0.3, 0.7, skip], dtype=torch.float64)
    sums = torch.rand(2, 18, 3, dtype=torch.float64, generator=generator)
    sums[0, 1] = sums[1, 2] = 0.0
    given = sums if rule == "lars" else (None, None)
    ours, theirs = steps.clone(), steps.clone()
    made = descent.descent_rows_(hyper, group, ours, mix, *given, RULES[rule])
    want = reference.descent_rows_(hyper, group, theirs, mix, *given, RULES[rule])
    assert torch.equal(ours, steps + (1 - skip))
    assert torch.equal(ours, theirs)
    comparison.assert_same_bits(made, want)


def test_tables_are_those_of_the_ops():
    assert [getattr(_updates, name.upper()).value for name in ROW] == list(range(len(ROW)))
    assert {name: getattr(_updates, name.upper()).value for name in FLAGS} == FLAGS
    assert {name: getattr(_rows, "_" + name.upper()).value for name in RULES} == RULES
    assert _updates.COLUMNS.value == len(ROW)
    assert _rows._HYPER.value == len(HYPER)


def test_empty_lists():
    rows = torch.empty(0, len(ROW), dtype=torch.float64)
    descent.descent_sgd_([], [], None, [], [], [], [], [], rows)
    assert descent.descent_lamb_moments_([], None, [], [], [], [], [], rows).shape == (0, 3)

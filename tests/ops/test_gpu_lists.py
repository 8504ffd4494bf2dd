# SPDX-License-Identifier: Apache-2.0
"""The sharpness and descent families on a GPU, CUDA and Triton, against the reference on the CPU.

Their twins that run without a GPU: tests/emulator (CUDA) and triton_interpreted_sharpness.py, _descent.py (Triton).
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastflat.backends import backend, kernels, reference, unavailable

from . import list_cases

pytestmark = pytest.mark.gpu

SHAPES = (*list_cases.SHAPES, *list_cases.LARGER)
#: More tensors than one launch describes.
MANY = (*SHAPES, *((n,) for n in range(400)))


def shapes(storage: str) -> tuple:
    return MANY if storage in ("fp32", "bf16") else SHAPES


@pytest.fixture(params=["cuda", "triton"])
def ops(request):
    """The raw ops of one GPU backend as callables."""
    reason = unavailable(request.param, "cuda")
    if reason:
        pytest.skip(reason)
    with backend(request.param):
        yield kernels("cuda")


def on(device, value):
    """Tensors, lists of them and whole cases, moved; what is there stays itself."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(on(device, v) for v in value)
    if dataclasses.is_dataclass(value):
        return type(value)(*(on(device, getattr(value, f.name)) for f in dataclasses.fields(value)))
    return value


def check_on(device, ops, op, case, lists):
    """One call of `op` computed on `device`, against the reference on the CPU; again, with the same bits."""
    expected, ours, again = lists.copy(), on(device, lists.copy()), on(device, lists.copy())
    wanted = getattr(reference, op)(*case.arguments(expected))
    returned, repeated = (getattr(ops, op)(*on(device, case.arguments(of))) for of in (ours, again))
    list_cases.assert_same(on("cpu", ours.tensors()), expected.tensors())
    if wanted is not None:
        torch.testing.assert_close(returned.cpu(), wanted, rtol=1e-12, atol=0, equal_nan=True)
        list_cases.assert_same([repeated.cpu()], [returned.cpu()])


@pytest.mark.parametrize("storage", list_cases.STORAGES)
@pytest.mark.parametrize("rise", list_cases.RISES, ids=str)
def test_ascent(ops, storage, rise):
    check_on("cuda", ops, "sharpness_ascent_", rise, list_cases.make(storage, shapes(storage)))


@pytest.mark.parametrize("storage", list_cases.STORAGES)
@pytest.mark.parametrize("step", list_cases.STEPS, ids=lambda s: s.name)
def test_step(ops, storage, step):
    check_on("cuda", ops, step.op, step, list_cases.make(storage))
    check_on("cuda", ops, step.op, step, list_cases.make(storage, shapes(storage), special=False))


@pytest.mark.parametrize("storage", ["bf16", "master bf16"])
@pytest.mark.parametrize("step", list_cases.STOCHASTIC, ids=lambda s: s.name)
def test_step_rounds_bfloat16_by_the_same_draws(ops, storage, step):
    check_on("cuda", ops, step.op, step, list_cases.make(storage, shapes(storage), special=False))


@pytest.mark.parametrize("storage", list_cases.STORAGES)
@pytest.mark.parametrize("kind", [0, 1, 2])
def test_sums(ops, storage, kind):
    lists = list_cases.make(storage, (*MANY, (2**22 + 5,)), special=False)
    others = lists.ws if kind else []
    sums = ops.sharpness_sums(on("cuda", lists.gs), on("cuda", others), [kind], 0.01)
    wanted = reference.sharpness_sums(lists.gs, others, [kind], 0.01)
    torch.testing.assert_close(sums.cpu(), wanted, rtol=1e-12 if kind else 1e-6, atol=1e-12)
    again = ops.sharpness_sums(on("cuda", lists.gs), on("cuda", others), [kind], 0.01)
    assert torch.equal(sums, again)


def test_off_the_16_byte_grid(ops):
    """Weights, gradients and momenta that begin inside a pack, each at another place."""
    step = next(s for s in list_cases.STEPS if s.name == "nesterov")
    for storage in ("fp32", "bf16", "fp64"):
        lists = list_cases.make(storage, ((4099,), (70001,)), special=False)
        expected, ours = lists.copy(), on("cuda", lists)
        for of, by in ((ours.ws, 1), (ours.gs, 3), (ours.states[0], 2)):
            for t, x in enumerate(of):
                of[t] = torch.empty(x.numel() + by, dtype=x.dtype, device="cuda")[by:].copy_(x)
        ops.descent_sgd_(*on("cuda", step.arguments(ours)))
        reference.descent_sgd_(*step.arguments(expected))
        list_cases.assert_same(on("cpu", ours.tensors()), expected.tensors())


def one_step(ops, lists, mix, hyper, group, steps, rho):
    """SGD with momentum around an ascent, every number of it on the device."""
    sums = ops.sharpness_sums(lists.gs, [], [0], 0.0)
    scale = ops.sharpness_scale(sums, rho, 1e-12, False)
    ops.sharpness_ascent_(lists.ws, lists.gs, [], lists.backup, lists.at, scale, [0], 0.0, None)
    rows = ops.descent_rows_(hyper, group, steps, mix, None, None, 0)
    ops.descent_sgd_(lists.ws, [], lists.backup, lists.at, lists.gs, [], lists.states[0], [], rows, None)


def test_cuda_graph_of_a_step(ops):
    """A whole step is captured, which any host synchronisation and any table copied from the host would forbid; each
    replay counts its step and sees the gradients of the moment."""
    lists = list_cases.make("fp32", tuple((n,) for n in (5, 70001, 1025)), special=False)
    count = len(lists.ws)
    numbers = (
        torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64),
        list_cases.hyper(lr=0.1, beta1=0.9),
        torch.zeros(count, dtype=torch.int64),
        torch.zeros(count, dtype=torch.float64),
        torch.full((count,), 0.05, dtype=torch.float64),
    )
    eager, captured = on("cuda", lists.copy()), on("cuda", lists.copy())
    warm, of_eager, of_captured = (on("cuda", [x.clone() for x in numbers]) for _ in range(3))
    one_step(ops, on("cuda", lists.copy()), *warm)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one_step(ops, captured, *of_captured)
    for seed in range(3):
        for of in (eager, captured):
            generator = torch.Generator(device="cuda").manual_seed(seed)
            for g in of.gs:
                g.normal_(generator=generator)
        one_step(ops, eager, *of_eager)
        graph.replay()
        list_cases.assert_same(captured.tensors(), eager.tensors())
        assert of_captured[3].tolist() == [seed + 1.0] * count

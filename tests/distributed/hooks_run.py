# SPDX-License-Identifier: Apache-2.0
"""What every rank does, for test_hooks.py."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastflat as ff
from fastflat.distributed import Compression, compress_gradients, powersgd, shard

METHODS = ("sign", "qsgd", "terngrad", "topk")


def network(dtype=torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 30), nn.Tanh(), nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 3)).to(dtype)


def data(step: int, dtype=torch.float64, size: int = 24):
    """This rank's part."""
    g = torch.Generator().manual_seed(100 * step + dist.get_rank())
    x = torch.randn(size, 7, generator=g)
    return x.to(dtype), x[:, :3].argmax(1)


def gradients(model, step, dtype=torch.float64) -> dict[str, torch.Tensor]:
    x, y = data(step, dtype)
    model.zero_grad()
    nn.functional.cross_entropy(model(x).float() if dtype == torch.bfloat16 else model(x), y).backward()
    module = model.module if isinstance(model, DistributedDataParallel) else model
    return {name: p.grad.clone() for name, p in module.named_parameters()}


def parallel(model, **options):
    """Several buckets, which DDP orders anew after the first pass."""
    return DistributedDataParallel(model, bucket_cap_mb=0.002, **options)


def same_on_all(tensor) -> bool:
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor.contiguous())
    return all(torch.equal(gathered[0], other) for other in gathered)


def one_bucket_is_the_exchange_by_hand(folder):
    world, rank = dist.get_world_size(), dist.get_rank()
    for method in METHODS:
        for feedback in (True, False):
            torch.manual_seed(0)
            local = nn.Linear(50, 40, bias=False)
            model, how = (
                DistributedDataParallel(copy.deepcopy(local)),
                Compression(method, feedback=feedback, share=0.1),
            )
            hook = compress_gradients(model, how, seed=3)
            error = torch.zeros(2000) if feedback else None
            for step in range(4):
                x = torch.randn(8, 50, generator=torch.Generator().manual_seed(10 * step + rank))
                (local(x) - x[:, :40]).square().mean().backward()
                (model(x) - x[:, :40]).square().mean().backward()
                draws = torch.tensor([3 + (rank << 32), step + 1])
                sent = how.encode(local.weight.grad.flatten(), error, draws)
                total = torch.zeros(2000)
                for sender in range(world):
                    parts = [t.clone() for t in sent[:2]]
                    for part in parts:
                        dist.broadcast(part, sender)
                    total += how.decode(type(sent)(*parts, *sent[2:])).flatten()
                assert torch.equal(model.module.weight.grad.flatten(), total * (1 / world)), (method, feedback, step)
                if feedback:
                    assert torch.equal(hook.residual("weight"), error)
                for m in (local, model):
                    m.zero_grad()
            assert hook.bytes_full == 4 * 8000
            assert hook.bytes_sent < hook.bytes_full / 3.8


def nothing_is_lost_where_buckets_are_ordered_anew(folder):
    for method in METHODS:
        local, model = network(), parallel(network())
        hook = compress_gradients(model, method, share=0.1)
        wanted = {name: torch.zeros_like(p) for name, p in local.named_parameters()}
        arrived = {name: torch.zeros_like(p) for name, p in local.named_parameters()}
        for step in range(5):
            for name, g in gradients(local, step).items():
                wanted[name] += g
            for name, g in gradients(model, step).items():
                arrived[name] += g
                assert same_on_all(g)
        for name in wanted:
            left = hook.residual(name).view_as(wanted[name]).clone()
            dist.all_reduce(wanted[name])
            dist.all_reduce(left)
            torch.testing.assert_close(arrived[name] * dist.get_world_size() + left, wanted[name], rtol=0, atol=1e-12)
        assert hook.residual("0.weight").any()


def trains_as_with_whole_gradients(folder):
    losses = {}
    for method in (None, *METHODS):
        model = parallel(network(torch.float32))
        if method:
            compress_gradients(model, method, share=0.1, warm_up=2)
        opt, losses[method] = ff.optim.SGD(model.parameters(), lr=0.5), []
        for step in range(120):
            x, y = data(step, torch.float32)
            loss = nn.functional.cross_entropy(model(x), y)
            opt.zero_grad()
            loss.backward()
            opt.step()
            losses[method].append(loss.item())
    last = {method: sum(found[-20:]) / 20 for method, found in losses.items()}
    assert losses[None][0] > 1
    assert all(loss < last[None] + 0.1 for loss in last.values()), last


def a_stopped_run_goes_on(folder):
    for method in METHODS:
        local, model = network(), parallel(network())
        hook = compress_gradients(model, method, share=0.1)
        wanted, arrived = (torch.zeros(7 * 30, dtype=torch.float64) for _ in range(2))
        for step in range(5):
            if step == 3:
                file = folder / f"{method}-{dist.get_rank()}.pt"
                torch.save(hook.state_dict(), file)
                before, model = hook, parallel(network())
                hook = compress_gradients(model, method, share=0.1)
                hook.load_state_dict(torch.load(file, weights_only=True))
                assert (hook.steps, hook.bytes_sent, hook.bytes_full) == (3, before.bytes_sent, before.bytes_full)
                assert torch.equal(hook.residual("0.weight"), before.residual("0.weight"))
            wanted += gradients(local, step)["0.weight"].flatten()
            arrived += gradients(model, step)["0.weight"].flatten()
        left = hook.residual("0.weight").clone()
        for total in (wanted, left):
            dist.all_reduce(total)
        torch.testing.assert_close(arrived * dist.get_world_size() + left, wanted, rtol=0, atol=1e-12)
    state = hook.state_dict()
    with pytest.raises(ValueError, match="state must be of Compression"):
        hook.load_state_dict({**state, "compression": {}})
    with pytest.raises(ValueError, match="residual 'gone' must be a parameter of the model, got 4 numbers"):
        hook.load_state_dict({**state, "residual": {"gone": torch.zeros(4)}})
    assert all(torch.equal(hook.residual(name), r) for name, r in state["residual"].items())


def first_passes_are_whole_and_sixteen_bits_work(folder):
    for dtype in (torch.float64, torch.bfloat16):
        local, model = network(dtype), parallel(network(dtype))
        hook = compress_gradients(model, "sign", warm_up=1)
        for name, g in gradients(model, 0, dtype).items():
            mean = gradients(local, 0, dtype)[name].double()
            dist.all_reduce(mean)
            tolerance = 1e-12 if dtype == torch.float64 else 0.02
            torch.testing.assert_close(g.double(), mean / dist.get_world_size(), rtol=tolerance, atol=tolerance / 10)
        assert hook.bytes_sent == hook.bytes_full
        found = gradients(model, 1, dtype)
        assert all(g.dtype == dtype for g in found.values())
        assert hook.residual("0.weight").dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        before = hook.residual("0.weight").clone()
        hook.rescale(0.5)
        assert torch.equal(hook.residual("0.weight"), before / 2)


def an_overflow_is_seen_by_all(folder):
    model = parallel(network(torch.float32))
    hook = compress_gradients(model, "sign")
    gradients(model, 0, torch.float32)
    gradients(model, 1, torch.float32)
    before = {name: hook.residual(name).clone() for name in dict(model.module.named_parameters())}
    x, y = data(2, torch.float32)
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    (loss * (torch.inf if dist.get_rank() == 1 else 1.0)).backward()
    assert not any(p.grad.isfinite().all() for p in model.parameters())
    if dist.get_rank() == 1:
        assert all(torch.equal(hook.residual(name), r) for name, r in before.items())
    gradients(model, 3, torch.float32)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def low_rank(folder):
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(40, 30, bias=False))
    state = powersgd(model, 2, start=2)
    for step in range(4):
        model.zero_grad()
        x = torch.randn(16, 40, generator=torch.Generator().manual_seed(step))
        model(x).square().sum().backward()
    values = torch.linalg.svdvals(model.module.weight.grad)
    assert values[2] < 1e-5 * values[0]
    assert values[1] > 1e-3 * values[0]
    assert state.matrix_approximation_rank == 2


def sharded(folder):
    whole, model = network(), shard(network())
    opt = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (whole, model)]
    for step in range(2):
        x, y = data(step)
        for m, o in zip((whole, model), opt, strict=True):
            o.zero_grad()
            nn.functional.cross_entropy(m(x), y).backward()
        for p in whole.parameters():
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()
        for o in opt:
            o.step()
    for p, q in zip(whole.parameters(), model.parameters(), strict=True):
        assert q.to_local().numel() < p.numel()
        torch.testing.assert_close(q.full_tensor(), p)
    assert shard(network(), ["0", "2"])[0].weight.to_local().numel() < 210
    fresh = network()
    with pytest.raises(ValueError, match="blocks must name submodules of the model, got '9'"):
        shard(fresh, ["0", "9"])
    assert type(fresh[0].weight) is nn.Parameter


def bad_input(folder):
    model = DistributedDataParallel(network())
    for call, kind, text in (
        (lambda: compress_gradients(model.module), TypeError, "must be a DistributedDataParallel, got Sequential"),
        (lambda: compress_gradients(model, "zip"), ValueError, "method must be one of sign, qsgd, terngrad, topk"),
        (lambda: compress_gradients(model, Compression(), share=0.1), ValueError, "options must be those of the Comp"),
        (lambda: compress_gradients(model, warm_up=-1), ValueError, "warm_up must be an int from 0 on, got -1"),
        (lambda: powersgd(model, 0), ValueError, "rank must be an int from 1 on, got 0"),
        (lambda: powersgd(model, 1, start=1), ValueError, "start must be an int from 2 on, got 1"),
    ):
        with pytest.raises(kind, match=text):
            call()
    compress_gradients(model)  # nothing was registered before
    with pytest.raises(RuntimeError):
        compress_gradients(model)

# SPDX-License-Identifier: Apache-2.0
"""What every rank does, for test_distributed.py."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from fastflat import optim


def network(dtype=torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def data(step: int, dtype=torch.float64, size: int = 24):
    g = torch.Generator().manual_seed(step)
    return torch.randn(size, 7, generator=g).to(dtype), torch.randint(0, 3, (size,), generator=g)


def mine(x, y):
    rank, world = dist.get_rank(), dist.get_world_size()
    return x[rank::world], y[rank::world]


def all_equal(tensors) -> bool:
    """Whether the tensors have the same bits on all ranks."""
    flat = torch.cat([t.detach().reshape(-1).double() for t in tensors])
    gathered = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, flat)
    return all(torch.equal(gathered[0], other) for other in gathered)


def alone(make, steps: int, dtype=torch.float64) -> nn.Module:
    """The run of one process on whole batches."""
    model = network(dtype)
    opt = make(model.parameters())
    for step in range(steps):
        opt.step(closure(opt, model, *data(step, dtype)))
    return model


def closure(opt, model, x, y):
    def run():
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return run


MAKERS = {
    "sgd": lambda p: optim.SAM(p, lr=0.1, momentum=0.9, weight_decay=1e-3, rho=0.1),
    "adaptive adamw": lambda p: optim.SAM(p, "adamw", lr=0.01, rho=0.5, adaptive=True, average="ema"),
    "lars": lambda p: optim.SAM(p, "lars", lr=1.0, trust_coefficient=0.1, rho=0.1),
    "lamb": lambda p: optim.SAM(p, "lamb", lr=0.01, rho=0.1),
    "gsam": lambda p: optim.GSAM(p, lr=0.1, rho=0.1),
    "gnp": lambda p: optim.GNP(p, lr=0.1, rho=0.1, normed=True),
    "hero": lambda p: optim.HERO(p, lr=0.1, rho=0.1, strength=1.0),
    "rmsprop": lambda p: optim.SAM(p, torch.optim.RMSprop, lr=0.01, rho=0.1),
}


def synchronised(folder: Path) -> None:
    """DDP, both passes synchronised: replicas equal in every bit, the run of one process to 1e-12."""
    for name, make in MAKERS.items():
        for view in (False, True):
            model = DistributedDataParallel(network(), gradient_as_bucket_view=view)
            opt = make(model.parameters())
            for step in range(4):
                opt.step(closure(opt, model, *mine(*data(step))))
            assert all_equal(model.parameters()), name
            for a, b in zip(model.parameters(), alone(make, 4).parameters(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=name)


def each_its_own_ascent(folder: Path) -> None:
    """m-SAM, the first pass under no_sync: perturbations differ, after 100 steps replicas are equal in every bit."""
    for storage in ("backup", "swap"):
        model = DistributedDataParallel(network(torch.float32))
        opt = optim.SAM(model.parameters(), lr=0.05, momentum=0.9, rho=0.1, storage=storage)
        for step in range(100):
            x, y = mine(*data(step, torch.float32))
            with model.no_sync():
                F.cross_entropy(model(x), y).backward()
            opt.first_step(zero_grad=True)
            if step == 3:
                assert not all_equal(model.parameters())
                assert not all_equal([opt.gradient_norm.reshape(1)])
            F.cross_entropy(model(x), y).backward()
            opt.second_step(zero_grad=True)
        assert all_equal(model.parameters()), storage


def one_rank_overflows(folder: Path) -> None:
    """m-SAM under loss scaling: an infinity in the first pass of one rank stops the step of all."""
    model = DistributedDataParallel(network(torch.float32))
    opt = optim.SAM(model.parameters(), lr=0.05, momentum=0.9, rho=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for step in range(4):
        before = [p.detach().clone() for p in model.parameters()]
        x, y = mine(*data(step, torch.float32))
        with model.no_sync():
            scaler.scale(F.cross_entropy(model(x), y)).backward()
        if step == 2 and dist.get_rank() == 1:
            next(model.parameters()).grad[0, 0] = float("inf")
        opt.first_step(zero_grad=True)
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        unchanged = all(torch.equal(a, b.detach()) for a, b in zip(before, model.parameters(), strict=True))
        assert unchanged == (step == 2)
        assert all_equal(model.parameters())


def shard(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model[0], model[4]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(tensors):
    return [t.detach().full_tensor() for t in tensors]


def sharded(folder: Path) -> None:
    """FSDP2, uneven and empty shards: the run of one process, in fp64 to 1e-10 and in fp32 to 1e-6."""
    for name, make in MAKERS.items():
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-6)):
            if dtype == torch.float32 and name == "hero":
                continue  # a finite difference in fp32 is right to 1e-3
            model = shard(network(dtype))
            opt = make(model.parameters())
            for step in range(3):
                opt.step(closure(opt, model, *mine(*data(step, dtype))))
            wanted = alone(make, 3, dtype).parameters()
            for a, b in zip(whole(model.parameters()), wanted, strict=True):
                size = b.detach().abs().max().item()
                torch.testing.assert_close(a, b.detach(), rtol=tolerance, atol=tolerance * size, msg=name)
        assert not opt.is_perturbed


def sharded_restore(folder: Path) -> None:
    """Exact on every shard; storage='swap' is refused with one line."""
    model = shard(network(torch.bfloat16))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt = optim.SAM(model.parameters(), lr=0.1, rho=5.0)
        before = [p._local_tensor.clone() for p in model.parameters()]
        F.cross_entropy(model(mine(*data(0, torch.bfloat16))[0]), mine(*data(0))[1]).backward()
        opt.first_step()
    moved = [not torch.equal(a, p._local_tensor) for a, p in zip(before, model.parameters(), strict=True)]
    assert any(moved)
    opt.restore()
    assert all(torch.equal(a, p._local_tensor) for a, p in zip(before, model.parameters(), strict=True))
    with pytest.raises(ValueError, match="storage 'swap' must have plain parameters, got a DTensor; use 'backup'"):
        optim.SAM(model.parameters(), storage="swap")
    master = optim.SAM(model.parameters(), lr=0.1, rho=0.1, momentum=0.9, storage="master")
    master.step(closure(master, model, *mine(*data(0, torch.bfloat16))))
    for p in model.parameters():
        assert torch.equal(master.state[p]["master"]._local_tensor.to(torch.bfloat16), p._local_tensor)


def trained(steps: int):
    model = shard(network())
    opt = MAKERS["adaptive adamw"](model.parameters())
    for step in range(steps):
        opt.step(closure(opt, model, *mine(*data(step))))
    return model, opt


def saves(folder: Path) -> None:
    """For `loads`, which another number of ranks runs."""
    model, opt = trained(3)
    state = {"model": model.state_dict(), "opt": get_optimizer_state_dict(model, opt)}
    dcp.save(state, checkpoint_id=folder / "checkpoint")
    if dist.get_rank() == 0:
        shapes = {n: {k: v.shape if hasattr(v, "shape") else None for k, v in s.items()}
                  for n, s in opt.state_dict()["state"].items()}  # fmt: skip
        local = {
            n: {k: getattr(v, "_local_tensor", v).clone() for k, v in s.items()}
            for n, s in opt.state_dict()["state"].items()
        }
        assert shapes
        torch.save(local, folder / "plain.pt")


def loads(folder: Path) -> None:
    """A distributed checkpoint of other ranks goes on as one process would; a plain state of theirs is refused."""
    torch.manual_seed(99)
    model = shard(network())
    opt = MAKERS["adaptive adamw"](model.parameters())
    state = {"model": model.state_dict(), "opt": get_optimizer_state_dict(model, opt)}
    dcp.load(state, checkpoint_id=folder / "checkpoint")
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, opt, state["opt"])
    for step in range(3, 6):
        opt.step(closure(opt, model, *mine(*data(step))))
    for a, b in zip(whole(model.parameters()), alone(MAKERS["adaptive adamw"], 6).parameters(), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-9, atol=1e-11)
    before = copy.deepcopy(opt.state_dict())
    plain = {"state": torch.load(folder / "plain.pt", weights_only=True), "param_groups": before["param_groups"]}
    with pytest.raises(ValueError, match=r"torch\.distributed\.checkpoint reshards"):
        opt.load_state_dict(plain)
    for number, values in opt.state_dict()["state"].items():
        assert all(torch.equal(getattr(v, "_local_tensor", v), getattr(before["state"][number][k], "_local_tensor", v))
                   for k, v in values.items())  # fmt: skip

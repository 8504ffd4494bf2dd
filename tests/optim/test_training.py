# SPDX-License-Identifier: Apache-2.0
"""SAM inside real training loops: loss scaling, 16 bits, statistics, random layers, schedulers, resuming, compiling."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastflat as ff
from fastflat import optim

from . import problems


def passes(opt, model, x, y, scaler=None):
    for second in (False, True):
        loss = F.cross_entropy(model(x), y)
        (loss if scaler is None else scaler.scale(loss)).backward()
        if second and scaler is not None:
            scaler.step(opt)
        elif second:
            opt.second_step()
        else:
            opt.first_step(zero_grad=True)
    if scaler is not None:
        scaler.update()
    opt.zero_grad()


# Loss scaling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [
    lambda p: optim.SAM(p, lr=0.1, momentum=0.9, rho=0.1),
    lambda p: optim.SAM(p, "adamw", lr=0.01, rho=0.1, adaptive=True),
    lambda p: optim.SAM(p, torch.optim.RMSprop, lr=0.01, rho=0.1),
    lambda p: optim.SAM(p, "lars", lr=1.0, rho=0.1),
    lambda p: optim.GSAM(p, lr=0.1, rho=0.1),
    lambda p: optim.GNP(p, lr=0.1, rho=0.1, normed=True),
])  # fmt: skip
def test_a_power_of_two_as_scale_changes_no_bit(make):
    results = []
    for scale in (None, 2.0**16):
        model, (x, y) = problems.net().eval(), problems.batch()
        opt = make(model.parameters())
        scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
        for _ in range(4):
            passes(opt, model, x, y, scaler)
        results.append(problems.bits(model))
    assert problems.same(*results)


@pytest.mark.parametrize("broken", [0, 1])
def test_one_overflow_ends_both_passes(broken):
    """An infinity in either pass: weights, momentum and count stay; the scale goes down where the scaler sees it."""
    model, (x, y) = problems.net().eval(), problems.batch()
    opt = optim.SAM(model.parameters(), lr=0.1, momentum=0.9, rho=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    passes(opt, model, x, y, scaler)
    before, state = problems.bits(model), copy.deepcopy(opt.state_dict()["state"])
    for number in range(2):
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        if number == broken:
            model.conv.weight.grad[0, 0, 0, 0] = float("inf")
        if number == 0:
            opt.first_step(zero_grad=True)
            assert broken or problems.same(problems.bits(model), before)
    scaler.step(opt)
    scaler.update()
    assert problems.same(problems.bits(model), before)
    assert not opt.is_perturbed
    for number, values in opt.state_dict()["state"].items():
        assert all(torch.equal(v, state[number][k]) for k, v in values.items())
    assert scaler.get_scale() == (32.0 if broken else 64.0)
    opt.zero_grad()
    passes(opt, model, x, y, scaler)
    assert not problems.same(problems.bits(model), before)


def test_unscaled_by_hand():
    """scaler.unscale_ before step, as for clipping: the scale is not taken away twice."""
    results = []
    for by_hand in (False, True):
        model, (x, y) = problems.net().eval(), problems.batch()
        opt = optim.SAM(model.parameters(), lr=0.1, rho=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        opt.first_step(zero_grad=True)
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        if by_hand:
            scaler.unscale_(opt)
        scaler.step(opt)
        results.append(problems.bits(model))
    assert problems.same(*results)


# Parameters in 16 bits ----------------------------------------------------------------------------------------------


def half_net(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 5)).to(dtype)


def half_batch(dtype):
    g = torch.Generator().manual_seed(0)
    return torch.randn(32, 64, generator=g).to(dtype), torch.randint(0, 5, (32,), generator=g)


def test_lost_perturbation_is_told():
    model, (x, y) = half_net(torch.bfloat16), half_batch(torch.bfloat16)
    opt = optim.SAM(model.parameters(), lr=0.1, rho=0.01)
    with pytest.warns(UserWarning, match=r"of \d+% of the 16-bit weights the perturbation is lost.*storage='master'"):
        passes(opt, model, x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        passes(opt, model, x, y)
        for options in ({"storage": "master"}, {"rounding": "stochastic"}):
            other = half_net(torch.bfloat16)
            passes(optim.SAM(other.parameters(), lr=0.1, rho=0.01, **options), other, x, y)


@pytest.mark.parametrize("base", ["sgd", "adamw", "lamb", "lars"])
def test_master_is_the_fp32_run(base):
    """Weights that are the rounded master; the master takes the step in fp32 of the gradients in bfloat16."""
    model, (x, y) = half_net(torch.bfloat16), half_batch(torch.bfloat16)
    opt = optim.SAM(model.parameters(), base, lr=0.05, rho=0.05, storage="master")
    for _ in range(3):
        before = {p: opt.state[p]["master"].clone() if "master" in opt.state[p] else p.detach().float()
                  for p in model.parameters()}  # fmt: skip
        F.cross_entropy(model(x), y).backward()
        g = {p: p.grad.float() for p in model.parameters()}
        norm = torch.stack([v.norm() for v in g.values()]).norm()
        opt.first_step(zero_grad=True)
        for p in model.parameters():
            expected = (before[p] + 0.05 / norm * g[p]).to(torch.bfloat16)
            assert (p.detach() != expected).float().mean() < 1e-3  # ties of the rounded norm
            assert torch.equal(opt.state[p]["master"], before[p])
        F.cross_entropy(model(x), y).backward()
        opt.second_step(zero_grad=True)
        for p in model.parameters():
            assert torch.equal(p.detach(), opt.state[p]["master"].to(torch.bfloat16))
            assert not torch.equal(opt.state[p]["master"], before[p])


def test_master_follows_a_load_of_the_model():
    model, (x, y) = half_net(torch.bfloat16), half_batch(torch.bfloat16)
    opt = optim.SAM(model.parameters(), lr=0.1, rho=0.05, storage="master")
    passes(opt, model, x, y)
    other = {k: torch.randn_like(v) for k, v in model.state_dict().items()}
    model.load_state_dict(other)
    F.cross_entropy(model(x), y).backward()
    opt.first_step(zero_grad=True)
    for name, p in model.named_parameters():
        assert torch.equal(opt.state[p]["master"], other[name].float())


def test_stochastic_rounding_keeps_the_perturbation():
    """bfloat16, 10^5 weights: the projection of what moved on e is 0.9 to 1.1 of it, to nearest less than a half."""
    shares = {}
    for rounding in ("nearest", "stochastic"):
        torch.manual_seed(0)
        w = nn.Parameter((torch.randn(100_000) * 0.02).to(torch.bfloat16))
        w.grad = torch.randn(100_000).to(torch.bfloat16)
        e = 0.005 * w.grad.double() / w.grad.double().norm()
        opt = optim.SAM([w], lr=0.1, rho=0.005, rounding=rounding)
        before = w.detach().double()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opt.first_step()
        moved = w.detach().double() - before
        shares[rounding] = (moved @ e / (e @ e)).item()
    assert 0.9 < shares["stochastic"] < 1.1
    assert shares["nearest"] < 0.5


# Statistics and random layers ---------------------------------------------------------------------------------------


class Counting(nn.Module):
    """A norm of one's own: a running mean and a count."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * x.detach().mean())
            self.count += 1
        return x - self.mean


def test_statistics_come_from_the_first_pass():
    x, y = problems.batch()
    seen = []
    for sam in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(Counting(), problems.Net())
        model[1].norm.momentum = None  # cumulative
        opt = optim.SAM(model, lr=0.0, rho=0.5) if sam else optim.SGD(model.parameters(), lr=0.0)
        for _ in range(3):
            opt.step(problems.closure_of(opt, model, x, y))
        seen.append({k: v.clone() for k, v in model.named_buffers()})
    assert set(seen[0]) == {
        "0.mean",
        "0.count",
        "1.norm.running_mean",
        "1.norm.running_var",
        "1.norm.num_batches_tracked",
    }
    for name, value in seen[0].items():
        assert torch.equal(value, seen[1][name]), name


def test_random_layers_are_replayed():
    """Dropout and a noisy quantizer draw the same numbers in both passes, and other ones in the next step."""
    spec = ff.QuantSpec.lsq(bits=4, axis=0)
    torch.manual_seed(0)
    model = ff.prepare(problems.Net(), weights=spec.replace(noise="uniform"), activations=None)
    x, y = problems.batch()
    model.train()
    drawn = []
    model.drop.register_forward_hook(lambda m, i, o: drawn.append((o == 0).clone()) if m.training else None)
    opt = optim.SAM(ff.param_groups(model), lr=0.0, rho=0.0, model=model)
    losses = []

    def closure():
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        losses.append(loss.item())
        return loss

    for _ in range(2):
        opt.step(closure)
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[2], drawn[3])
    assert not torch.equal(drawn[0], drawn[2])
    assert losses[0] == losses[1] != losses[2] == losses[3]
    with torch.no_grad():
        after = torch.rand(3)
    assert not torch.equal(after, torch.rand(3))


def test_scales_are_neither_perturbed_nor_decayed():
    spec = ff.QuantSpec.lsq(bits=4, axis=0)
    model = ff.prepare(problems.net(), weights=spec, activations=None)
    x, y = problems.batch()
    opt = optim.SAM(ff.param_groups(model, weight_decay=0.1), lr=0.1, rho=0.5)
    scales = [p for g in opt.param_groups if g["name"] == "scales" for p in g["params"]]
    assert scales
    assert all(g["weight_decay"] == 0 and g["rho"] == 0 for g in opt.param_groups if g["name"] == "scales")
    F.cross_entropy(model(x), y).backward()
    before = [s.detach().clone() for s in scales]
    norm = torch.stack([p.grad.double().norm() for g in opt.param_groups if g["name"] != "scales"
                        for p in g["params"] if p.grad is not None]).norm()  # fmt: skip
    opt.first_step(zero_grad=True)
    assert all(torch.equal(a, b) for a, b in zip(scales, before, strict=True))
    assert opt.gradient_norm.item() == pytest.approx(norm.item(), rel=1e-6)


# The loop around it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base_optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_popular_loop_runs_unchanged(base_optimizer):
    model, (x, y) = problems.net(), problems.batch()
    optimizer = optim.SAM(model.parameters(), base_optimizer, rho=0.05, adaptive=False, lr=0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(20):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.first_step(zero_grad=True)
            F.cross_entropy(model(x), y).backward()
            optimizer.second_step(zero_grad=True)
            scheduler.step()
            losses.append(loss.item())
    assert optimizer.param_groups[0]["lr"] < 1e-6
    assert losses[-1] < losses[0]


def test_gradients_that_are_there_are_told_once():
    model, (x, y) = problems.net(), problems.batch()
    opt = optim.SAM(model.parameters(), lr=0.1)
    closure = problems.closure_of(opt, model, x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(closure)
        opt.step(closure)
    F.cross_entropy(model(x), y).backward()
    with pytest.warns(UserWarning, match=r"drops the gradients that are there.*leave out the backward\(\) before it"):
        opt.step(closure)


def test_rho_and_lr_change_at_any_time():
    """A schedule of both through the groups, lr as a tensor too: each step is that of a new optimizer (SGD, fp64)."""
    a = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    rate = torch.tensor(0.5, dtype=torch.float64)
    opt = optim.SAM([a], lr=rate, rho=0.1)
    for step in range(4):
        opt.param_groups[0]["rho"] = 0.1 * (step + 1)
        rate.fill_(0.5 / (step + 1))
        w = a.detach().clone()
        g = 3 * w
        want = w - rate * 3 * (w + 0.1 * (step + 1) * g / g.norm())
        for second in (False, True):
            a.grad = 3 * a.detach()
            opt.second_step() if second else opt.first_step(zero_grad=True)
        torch.testing.assert_close(a.detach(), want, rtol=1e-14, atol=1e-14)
    opt.param_groups[0]["rho"] = float("nan")
    a.grad = torch.ones_like(a)
    with pytest.raises(ValueError, match="rho must be a finite number of at least 0, got nan"):
        opt.first_step()


RESUMED = {
    "sgd": lambda p: optim.SAM(p, lr=0.1, momentum=0.9, rho=0.1, average="mean", average_every=2),
    "amsgrad": lambda p: optim.SAM(p, "adam", amsgrad=True, lr=0.01, rho=0.1, adaptive=True),
    "lamb": lambda p: optim.SAM(p, "lamb", lr=0.01, rho=0.1, average="ema"),
    "torch": lambda p: optim.SAM(p, torch.optim.RMSprop, lr=0.01, momentum=0.9, rho=0.1),
    "gsam": lambda p: optim.GSAM(p, "adamw", lr=0.01, rho=0.1),
    "gadamx": lambda p: optim.GadamX(p, lr=0.01),
}


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_run_is_the_uninterrupted_one(name, dtype):
    """Bit for bit, through torch.save and a load of weights alone: momentum, moments, masters, averages, counts."""
    make = RESUMED[name]
    if dtype == torch.bfloat16 and name != "torch":
        half = {"storage": "master"} if name not in ("gadamx",) else {}
        make = lambda p: RESUMED[name](p) if not half else _with_master(name, p)  # noqa: E731
    (x, y), runs = half_batch(dtype), []
    for interrupted in (False, True):
        model = half_net(dtype)
        opt = make(model.parameters())
        for step in range(6):
            if interrupted and step == 3:
                file = io.BytesIO()
                torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
                file.seek(0)
                saved = torch.load(file, weights_only=True)
                model = half_net(dtype)
                opt = make(model.parameters())
                model.load_state_dict(saved["model"])
                opt.load_state_dict(saved["opt"])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                opt.step(problems.closure_of(opt, model, x, y))
        runs.append((problems.bits(model), opt.state_dict()["state"]))
    assert problems.same(runs[0][0], runs[1][0])
    for number, values in runs[0][1].items():
        for key, value in values.items():
            assert torch.equal(value, runs[1][1][number][key]), key
            assert value.dtype == runs[1][1][number][key].dtype


def _with_master(name, p):
    options = {"rho": 0.1, "lr": 0.01, "storage": "master"}
    kinds = {"sgd": ("sgd", {"momentum": 0.9, "average": "mean"}), "amsgrad": ("adam", {"amsgrad": True}),
             "lamb": ("lamb", {"average": "ema"}), "gsam": ("adamw", {})}  # fmt: skip
    base, more = kinds[name]
    cls = optim.GSAM if name == "gsam" else optim.SAM
    return cls(p, base, **options, **more)


def test_loads_a_state_of_torch():
    """Momentum of torch.optim.SGD goes on in the fused base."""
    model, (x, y) = problems.net(dtype=torch.float64).eval(), problems.batch(dtype=torch.float64)
    old = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        old.step(problems.closure_of(old, model, x, y))
    other = copy.deepcopy(model)
    new = optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    new.load_state_dict({"state": old.state_dict()["state"], "param_groups": new.state_dict()["param_groups"]})
    old.step(problems.closure_of(old, model, x, y))
    new.step(problems.closure_of(new, other, x, y))
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_load_refuses_another_shape():
    opt = optim.SAM([nn.Parameter(torch.ones(3))], momentum=0.9, lr=0.1)
    saved = {"state": {0: {"momentum_buffer": torch.ones(4)}}, "param_groups": opt.state_dict()["param_groups"]}
    with pytest.raises(ValueError, match=r"momentum_buffer of parameter 0 must be \[3\], got \[4\]"):
        opt.load_state_dict(saved)
    groups = [{**saved["param_groups"][0], "params": [0, 1]}]
    with pytest.raises(ValueError, match=r"groups must hold \[1\] parameters, got \[2\]"):
        opt.load_state_dict({"state": {}, "param_groups": groups})


def test_copies_and_pickles():
    model, (x, y) = problems.net(), problems.batch()
    opt = optim.SAM(model.parameters(), lr=0.1, momentum=0.9)
    opt.step(problems.closure_of(opt, model, x, y))
    pairs = [(model, opt), copy.deepcopy((model, opt)), pickle.loads(pickle.dumps((model, opt)))]
    for m, o in pairs:
        torch.manual_seed(1)
        o.step(problems.closure_of(o, m, x, y))
    assert all(problems.same(problems.bits(model), problems.bits(m)) for m, _ in pairs[1:])


@pytest.mark.parametrize("storage", ["backup", "swap"])
def test_compiled_model(storage):
    """One graph for both passes (the guards hold), and the eager result (fp64, 1e-12)."""
    (x, y), runs = problems.batch(dtype=torch.float64), []
    torch._dynamo.reset()
    for compiled in (False, True):
        model = problems.net(dtype=torch.float64).eval()
        called = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        opt = optim.SAM(model.parameters(), lr=0.1, rho=0.1, storage=storage)
        torch._dynamo.utils.counters.clear()
        for _ in range(3):
            opt.step(problems.closure_of(opt, called, x, y))
        if compiled:
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        runs.append(list(model.parameters()))
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# SAQ ----------------------------------------------------------------------------------------------------------------


def quantized(bits=4):
    torch.manual_seed(0)
    spec = ff.QuantSpec.lsq(bits=bits, axis=0)
    model = ff.prepare(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), weights=spec, activations=None)
    x, y = torch.randn(20, 6), torch.randint(0, 3, (20,))
    return model.train(), x, y


@pytest.mark.parametrize("case", [1, 2, 3])
def test_saq_perturbs_where_it_says(case):
    model, x, y = quantized()
    opt = optim.SAQ(model, lr=0.1, rho=0.3, case=case)
    layer = model[0]
    w, q = layer.weight.detach().clone(), layer.weight_quantizer(layer.weight).detach()
    F.cross_entropy(model(x), y).backward()
    opt.first_step(zero_grad=True)
    seen = []
    handle = layer.weight_quantizer.register_forward_hook(lambda m, i, o: seen.append(o.detach().clone()))
    loss = F.cross_entropy(model(x), y)
    handle.remove()
    if case == 3:
        assert torch.equal(layer.weight.detach(), w)
        assert 0 < (seen[0] - q).norm() <= 0.3
    else:
        assert not torch.equal(layer.weight.detach(), w)
    loss.backward()
    opt.second_step()
    assert not opt.is_perturbed
    assert torch.equal(layer.weight_quantizer(layer.weight), layer.weight_quantizer(layer.weight))


def test_saq_perturbation_has_length_rho():
    """e over quantized weights and biases together: |e| = rho to 1e-5, in the direction of the gradients there."""
    model, x, y = quantized()
    opt = optim.SAQ(model, lr=0.1, rho=0.3)
    outputs = {}
    for i in (0, 2):
        model[i].weight_quantizer.register_forward_hook(lambda m, _, o, i=i: outputs.__setitem__(i, o))
    before = {i: model[i].bias.detach().clone() for i in (0, 2)}
    F.cross_entropy(model(x), y).backward()
    first = {i: (outputs[i].detach().clone(), outputs[i].grad.clone(), model[i].bias.grad.clone()) for i in (0, 2)}
    opt.first_step(zero_grad=True)
    model(x)
    e = [outputs[i].detach() - first[i][0] for i in (0, 2)] + [model[i].bias.detach() - before[i] for i in (0, 2)]
    g = [first[i][1] for i in (0, 2)] + [first[i][2] for i in (0, 2)]
    cosine = sum((a * b).sum() for a, b in zip(e, g, strict=True))
    cosine = cosine / torch.stack([t.norm() for t in e]).norm() / torch.stack([t.norm() for t in g]).norm()
    assert cosine.item() == pytest.approx(1.0, abs=1e-5)
    assert torch.stack([t.norm() for t in e]).norm().item() == pytest.approx(0.3, rel=1e-5)
    opt.restore()


def test_saq_at_radius_zero_is_the_base():
    runs = []
    for make in (lambda m: optim.SAQ(m, lr=0.1, rho=0.0), lambda m: optim.SGD(m.parameters(), lr=0.1)):
        model, x, y = quantized()
        opt = make(model)
        for _ in range(3):
            opt.step(problems.closure_of(opt, model, x, y))
        runs.append(problems.bits(model))
    assert problems.same(*runs)


def test_saq_bad_input():
    model = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="quantizers must be given where params is no model with quantized weights"):
        optim.SAQ(model)
    with pytest.raises(ValueError, match="case must be 1, 2 or 3, got 4"):
        optim.SAQ(model, case=4)
    other, _x, _y = quantized()
    with pytest.raises(ValueError, match="quantizers must belong to parameters of the optimizer"):
        optim.SAQ(model.parameters(), quantizers=[(other[0].weight_quantizer, other[0].weight)])

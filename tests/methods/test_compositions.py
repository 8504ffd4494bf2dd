# SPDX-License-Identifier: Apache-2.0
"""Eight ways of putting methods together in which ascent methods commonly break, for every optimizer that ascends."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastflat as ff
from fastflat import methods, optim
from fastflat.curvature import Hessian

MAKERS = {
    "sam": lambda m, **o: methods.SAM(m, rho=0.1, **o),
    "asam": lambda m, **o: methods.SAM(m, rho=0.5, adaptive=True, eta=0.01, **o),
    "linf": lambda m, **o: methods.SAM(m, rho=1e-3, metric="linf", **o),
    "gsam": lambda m, **o: optim.GSAM(m, rho=0.1, **o),
    "gnp": lambda m, **o: methods.GNP(m, rho=0.1, alpha=0.8, **o),
    "hero": lambda m, **o: methods.HERO(m, rho=0.5, **o),
    "exact hero": lambda m, **o: methods.ExactHERO(m, rho=0.5, strength=0.5, **o),
    "m-sam": lambda m, **o: methods.MSAM(m, rho=0.1, parts=2, **o),
    "step length": lambda m, **o: methods.StepLengthSAM(m, rho=0.1, **o),
    "saq": lambda m, **o: optim.SAQ(m, rho=0.1, **o),
}
SCALED = [name for name in MAKERS if name not in ("exact hero", "m-sam")]  # these refuse, or have no two passes by hand


class Mean(nn.Module):
    """A normalisation layer that a user wrote: a running mean of its own."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))

    def forward(self, x):
        if self.training:
            self.mean.lerp_(x.detach().mean((0, 2, 3)), 0.1)
        return x - self.mean[:, None, None]


class Net(nn.Module):
    """Norm layers, dropout, a weight that two layers share, one that is frozen, one that nothing reads."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm, self.mean = nn.BatchNorm2d(4), Mean(4)
        self.drop = nn.Dropout(0.3)
        self.inner, self.again = nn.Linear(36, 36), nn.Linear(36, 36)
        self.again.weight = self.inner.weight
        self.head = nn.Linear(36, 5)
        self.frozen = nn.Parameter(torch.ones(36), requires_grad=False)
        self.unread = nn.Parameter(torch.ones(3))

    def forward(self, x):
        x = F.max_pool2d(self.mean(self.norm(self.conv(x))).relu(), 2).flatten(1)
        x = self.again(self.inner(self.drop(x)).relu()).relu()
        return self.head(x * self.frozen)


def network(name: str = "", quantized: bool = False) -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    if quantized or name == "saq":
        lsq = ff.QuantSpec.lsq
        net = ff.prepare(net, weights=lsq(bits=4, axis=0), activations=None, skip=("inner", "again"))
    return net


def batch(seed: int = 0, size: int = 12):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(size, 1, 8, 8, generator=g), torch.randint(0, 5, (size,), generator=g)


def closure_of(opt, model, x, y, set_to_none=True):
    def closure():
        opt.zero_grad(set_to_none=set_to_none)
        own = getattr(opt, "own", lambda rows: rows)
        loss = F.cross_entropy(model(own(x)), own(y))
        getattr(opt, "penalized", lambda value: value)(loss).backward()
        return loss

    return closure


def by_hand(opt, model, x, y, scaler=None, after=lambda number: None):
    """A step in its single calls: two passes, three of HERO."""
    ascents = ["first_step", "middle_step"] if isinstance(opt, optim.HERO) else ["first_step"]
    for number, ascent in enumerate([*ascents, None]):
        loss = F.cross_entropy(model(x), y)
        (scaler.scale(loss) if scaler else loss).backward()
        after(number)
        if ascent:
            getattr(opt, ascent)(zero_grad=True)
    scaler.step(opt) if scaler else opt.second_step()


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", MAKERS)
def test_1_on_quantized_networks_both_passes_see_one_noise(name):
    torch.manual_seed(0)
    spec = ff.QuantSpec.lsq(bits=4, axis=0).replace(noise="uniform")
    model = ff.prepare(nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), weights=spec, activations=None)
    layer = next(m for m in model.modules() if hasattr(m, "weight_quantizer"))
    seen = []
    layer.weight_quantizer.register_forward_hook(lambda m, i, out: seen.append(out.detach().clone()))
    x, y = batch()
    opt = MAKERS[name](model, lr=0.0)
    for group in opt.param_groups:
        # Nothing moves: what differs is noise. At 0 m-SAM would make one pass.
        group["rho"] = 1e-20 if name == "m-sam" else 0.0
    for _ in range(2):
        opt.step(closure_of(opt, model, x, y))
    passes = {"hero": 3}.get(name, 2)
    steps = list(zip(*[iter(seen)] * passes, strict=True))
    assert all(torch.equal(first, w) for first, *others in steps for w in others)
    assert not any(torch.equal(a[0], b[0]) for a, b in itertools.pairwise(steps))


def test_1_cases_of_saq_perturb_other_weights():
    x, y = batch()
    ends = []
    for case in (1, 2, 3):
        model = network(quantized=True).eval()
        for quantizer in (m.weight_quantizer for m in model.modules() if hasattr(m, "weight_quantizer")):
            quantizer.scale.data.mul_(0.2)  # some weights lie beyond the grid: the cases differ there
        opt = optim.SAQ(model, rho=2.0, case=case, lr=0.1)
        opt.step(closure_of(opt, model, x, y))
        ends.append(weights(model))
    assert not any(same(a, b) for a, b in ((ends[0], ends[1]), (ends[1], ends[2]), (ends[0], ends[2])))


def test_2_products_with_the_hessian_pass_through_fake_quantization():
    """``H v = m * (H(Q(w)) (m * v))``, m the mask of the weights within the grid."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    model = ff.prepare(copy.deepcopy(plain), weights=ff.QuantSpec.lsq(bits=3), activations=None)
    for quantizer in (m.weight_quantizer for m in model.modules() if hasattr(m, "weight_quantizer")):
        quantizer.scale.data.mul_(0.5)  # some weights lie beyond the grid
    x, y = batch()
    x = x.double()
    model.eval()
    masks = {}
    for (path, layer), (_, target) in zip(
        [(n, m) for n, m in model.named_modules() if hasattr(m, "weight_quantizer")],
        [(n, m) for n, m in plain.named_modules() if isinstance(m, nn.Linear)],
        strict=True,
    ):
        w = layer.weight.detach().requires_grad_()
        rounded = layer.weight_quantizer(w)
        (masks[f"{path}.weight"],) = torch.autograd.grad(rounded.sum(), w)
        with torch.no_grad():
            target.weight.copy_(rounded)
            target.bias.copy_(layer.bias)
    chosen = [n for n, _ in model.named_parameters() if n.endswith(("weight", "bias"))]
    ours = Hessian(model, F.cross_entropy, [(x, y)], params=chosen)
    theirs = Hessian(plain, F.cross_entropy, [(x, y)])
    assert ours.shape == theirs.shape
    m = torch.ones(ours.shape[0], dtype=torch.float64)
    for block, at in ours.blocks.items():
        if block in masks:
            m[at] = masks[block].flatten()
    assert 0 < m.mean() < 1
    v = torch.randn(3, ours.shape[0], dtype=torch.float64)
    torch.testing.assert_close((ours @ v.T).T, m * (theirs @ (m * v).T).T, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", MAKERS)
def test_2_ascent_methods_train_quantized_networks(name):
    model, (x, y) = network(quantized=True), batch()
    opt = MAKERS[name](model, lr=0.05, momentum=0.9)
    losses = [float(opt.step(closure_of(opt, model, x, y)).detach()) for _ in range(12)]
    assert min(losses[-3:]) < 0.8 * losses[0]


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("broken", [None, 0, 1])
def test_3_mixed_precision(name, broken):
    """A power of two as scale changes no bit; an infinity in either pass leaves every weight where it was."""
    x, y = batch()
    ends = []
    for scale in (1.0, 2.0**10):
        model = network(name).eval()
        opt = MAKERS[name](model, lr=0.1, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        before = weights(model)

        def spoil(number, model=model):
            if number == broken:
                model.conv.bias.grad[0] = float("inf")

        by_hand(opt, model, x, y, scaler, spoil)
        scaler.update()
        assert not opt.is_perturbed
        ends.append(weights(model))
        assert all(bool(w.isfinite().all()) for w in ends[-1].values())
        assert (broken == 1 and name != "hero") == (scaler.get_scale() < scale)
        assert same(before, ends[-1]) == (broken is not None)
    assert same(*ends)


@pytest.mark.parametrize("name", SCALED)
def test_3_gradients_that_were_unscaled_by_hand(name):
    """As for clipping: the same step, or, where gradients of two passes add up, an error and the weights as before."""
    (x, y), ends = batch(), []
    for hand in (False, True):
        model = network(name).eval()
        opt = MAKERS[name](model, lr=0.1, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        before = weights(model)

        def unscale(number, model=model, opt=opt, scaler=scaler, hand=hand):
            if hand and number == (2 if name == "hero" else 1):
                scaler.unscale_(opt)

        if hand and name in ("gsam", "gnp", "hero"):
            with pytest.raises(RuntimeError, match="gradients must come scaled"):
                by_hand(opt, model, x, y, scaler, unscale)
            assert same(before, weights(model))
            return
        by_hand(opt, model, x, y, scaler, unscale)
        ends.append(weights(model))
    assert same(*ends)


def test_3_those_that_cannot_take_a_scale_say_so():
    model, (x, y) = network().eval(), batch()
    opt = MAKERS["exact hero"](model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = weights(model)
    scaler.scale(F.cross_entropy(model(x), y)).backward()
    opt.first_step(zero_grad=True)
    scaler.scale(opt.penalized(F.cross_entropy(model(x), y))).backward()
    with pytest.raises(RuntimeError, match="must step without a GradScaler"):
        scaler.step(opt)
    assert same(before, weights(model))


@pytest.mark.parametrize("name", MAKERS)
def test_4_frozen_unread_and_tied_weights(name):
    """Frozen and unread weights stay, a shared one moves as the same weight in a model that calls it twice."""
    model, (x, y) = network(name), batch()
    before = weights(model)
    opt = MAKERS[name](model, lr=0.1)
    opt.step(closure_of(opt, model, x, y))
    after = weights(model)
    assert torch.equal(before["frozen"], after["frozen"])
    assert torch.equal(before["unread"], after["unread"])
    assert model.inner.weight is model.again.weight
    assert not torch.equal(before["inner.weight"], after["inner.weight"])
    assert sum(p is model.inner.weight for group in opt.param_groups for p in group["params"]) == 1


@pytest.mark.parametrize("name", SCALED)
def test_4_no_second_gradient(name):
    """A weight without a gradient in the second pass comes back and takes no step."""
    model, (x, y) = network(name).eval(), batch()
    before = weights(model)
    opt = MAKERS[name](model, lr=0.1)
    last = 2 if name == "hero" else 1

    def drop(number):
        if number == last:
            assert name in ("hero", "saq") or not torch.equal(model.head.bias, before["head.bias"])
            model.head.bias.grad = None

    by_hand(opt, model, x, y, after=drop)
    after = weights(model)
    assert torch.equal(after["head.bias"], before["head.bias"])
    assert not torch.equal(after["head.weight"], before["head.weight"])


def test_4_sparse_gradients_are_refused():
    for name, make in MAKERS.items():
        if name == "saq":
            continue
        table = nn.Embedding(5, 3, sparse=True)
        opt = make(table)
        before = table.weight.detach().clone()
        table(torch.tensor([1, 2])).sum().backward()
        with pytest.raises((RuntimeError, ValueError, TypeError), match=r"sparse|dense"):
            opt.first_step()
        assert torch.equal(before, table.weight)


@pytest.mark.parametrize("name", MAKERS)
def test_5_buffers_and_random_layers(name):
    """Statistics, those of a user's layer included, move once a pass over the data; dropout is the same in both."""
    x, y = batch()
    model, plain = network(name), network(name)
    drawn = []
    model.drop.register_forward_hook(lambda m, i, out: drawn.append(((i[0] != 0).detach(), (out != 0).detach())))
    opt = MAKERS[name](model, lr=0.0)
    opt.step(closure_of(opt, model, x, y))
    parts = getattr(opt, "parts", 1)
    for part in x.tensor_split(parts):
        plain(part)
    assert len(drawn) == (3 if name == "hero" else 2) * parts
    both = drawn[0][0] & drawn[1][0]  # where ReLU gives a 0 there is nothing to drop
    assert both.float().mean() > 0.2
    assert torch.equal(drawn[0][1] & both, drawn[1][1] & both)
    expected = dict(plain.named_buffers())
    for key, value in model.named_buffers():
        if "mean" in key or "norm" in key:
            torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-7, msg=key)


@pytest.mark.parametrize("name", MAKERS)
def test_6_gradients_set_to_none_or_to_zero(name):
    x, y = batch()
    ends = []
    for to_none in (True, False):
        model = network(name)
        opt = MAKERS[name](model, lr=0.1, momentum=0.9)
        torch.manual_seed(1)
        for _ in range(3):
            opt.step(closure_of(opt, model, x, y, to_none))
        ends.append(weights(model))
    moved = {k for k in ends[0] if not torch.equal(ends[0][k], ends[1][k])}
    assert moved <= {"unread"}


def test_7_accumulated_micro_batches_and_one_batch_are_two_methods():
    """m-SAM is the mean of each part's second gradient; SAM ascends along that of the whole batch."""
    x, y = batch()
    ends = {}
    for kind in ("parts", "accumulated", "whole"):
        model = network().eval()
        opt = methods.MSAM(model, rho=0.5, lr=0.1, parts=2) if kind == "parts" else methods.SAM(model, rho=0.5, lr=0.1)
        if kind == "accumulated":
            for number, (part, labels) in enumerate(zip(x.tensor_split(2), y.tensor_split(2), strict=True)):
                F.cross_entropy(model(part), labels).backward()
                opt.first_step(zero_grad=True)
                (F.cross_entropy(model(part), labels) / 2).backward()
                opt.second_step() if number else opt.accumulate()
        else:
            opt.step(closure_of(opt, model, x, y))
        ends[kind] = weights(model)
    for key, value in ends["parts"].items():
        torch.testing.assert_close(value, ends["accumulated"][key], rtol=1e-5, atol=1e-6)
    assert (ends["parts"]["head.weight"] - ends["whole"]["head.weight"]).abs().max() > 1e-4


@pytest.mark.parametrize("name", MAKERS)
def test_8_an_exception_between_the_passes_restores(name):
    model, (x, y) = network(name), batch()
    opt = MAKERS[name](model, lr=0.1)
    before, calls = weights(model), 0
    inner = closure_of(opt, model, x, y)

    def closure():
        nonlocal calls
        calls += 1
        loss = inner()
        if calls == 2:
            raise KeyboardInterrupt
        return loss

    with pytest.raises(KeyboardInterrupt):
        opt.step(closure)
    assert same(before, weights(model))
    assert not opt.is_perturbed
    inner()
    with pytest.raises(RuntimeError, match="a reason"), opt.perturbed():
        raise RuntimeError("a reason")
    assert same(before, weights(model))

# SPDX-License-Identifier: Apache-2.0
"""What a user does on a GPU, beside the same on the CPU: training, curvature, methods, compiled and captured steps."""

from __future__ import annotations

import copy
import importlib
import json
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastflat as ff
from fastflat import curvature, optim
from fastflat.backends import unavailable

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
lsq = ff.QuantSpec.lsq


@pytest.fixture(autouse=True)
def exact_products():
    """No TensorFloat-32: the CPU is what the GPU is compared with."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(params=["cuda", "triton"])
def kernels(request, monkeypatch):
    """What computes on tensors of a GPU, whose first choice would be CUDA."""
    reason = unavailable(request.param, "cuda")
    if reason:
        pytest.skip(reason)
    backends = importlib.import_module("fastflat.backends")  # fastflat.backends is the function
    chosen = backends._choose, backends._kernels
    monkeypatch.setitem(backends._ORDER, "cuda", (request.param, "triton"))
    for choice in chosen:
        choice.cache_clear()
    yield
    monkeypatch.undo()
    for choice in chosen:
        choice.cache_clear()


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    first = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)
    last = nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 33), nn.ReLU(), nn.Linear(33, 5)
    return nn.Sequential(*first, *last)


def images(n: int = 64, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A bright bar at one of five places."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 5, (n,), generator=g)
    x = 0.3 * torch.randn(n, 1, 8, 8, generator=g)
    for image, label in zip(x, y):
        image[0, label : label + 3] += 1.0
    return x, y


def quantized(weights: ff.QuantSpec, activations: ff.QuantSpec, **options) -> nn.Module:
    model = ff.prepare(network(), weights=weights, activations=activations, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ff.calibrate(model, [images()[0]])
    return model


def fit(model: nn.Module, opt: torch.optim.Optimizer, x, y, steps: int) -> list[float]:
    def closure():
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return [opt.step(closure).item() for _ in range(steps)]


OPTIMIZERS = {
    "sgd": lambda m: optim.SGD(m.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda m: optim.Adam(m.parameters(), lr=0.01, eps=1e-3),
    "adamw": lambda m: optim.AdamW(m.parameters(), lr=0.01, eps=1e-3, weight_decay=0.1),
    "adamw, 8 bits": lambda m: optim.AdamW8bit(m.parameters(), lr=0.01, eps=1e-3),
    "padam": lambda m: optim.Padam(m.parameters(), lr=0.05, eps=1e-3),
    "lars": lambda m: optim.LARS(m.parameters(), lr=1.0, momentum=0.9),
    "lamb": lambda m: optim.LAMB(m.parameters(), lr=0.01, eps=1e-3),
    "gadam": lambda m: optim.Gadam(m.parameters(), lr=0.01, eps=1e-3),
    "gadamx": lambda m: optim.GadamX(m.parameters(), lr=0.01, eps=1e-3),
    "sam": lambda m: optim.SAM(m, lr=0.05, momentum=0.9, rho=0.05),
    "asam": lambda m: optim.SAM(m, lr=0.05, rho=0.5, adaptive=True),
    "sam on adamw": lambda m: optim.SAM(m, "adamw", lr=0.01, rho=0.05, eps=1e-3),
    "sam on torch's": lambda m: optim.SAM(m, torch.optim.RMSprop, lr=0.001, rho=0.05, eps=1e-3),
    "gsam": lambda m: optim.GSAM(m, lr=0.05, rho=0.05),
    "gnp": lambda m: optim.GNP(m, lr=0.05, rho=0.05),
    "hero": lambda m: optim.HERO(m, lr=0.05, rho=0.05),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(kernels, name):
    """The same weights after some steps; an average of the weights where there is one."""
    found = []
    for device in ("cpu", DEVICE):
        model, (x, y) = network().to(device), images()
        losses = fit(model, OPTIMIZERS[name](model), x.to(device), y.to(device), 6)
        assert losses[-1] < losses[0]
        found.append([p.detach().cpu() for p in model.parameters()])
    for want, got in zip(*found):
        torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("storage", ["grad", "master"])
def test_loss_scaling(kernels, storage):
    """An overflow on the GPU changes nothing and halves the scale; then training goes on, in fp16 too."""
    dtype = torch.float16 if storage == "master" else torch.float32
    model, (x, y) = network().eval().to(DEVICE, dtype), images()
    x, y = x.to(DEVICE, dtype), y.to(DEVICE)
    options = {"storage": "master"} if storage == "master" else {}
    opt = optim.SAM(model.parameters(), lr=0.05, momentum=0.9, rho=0.05, **options)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=64.0)
    losses = []
    for number in range(8):
        before = [p.detach().clone() for p in model.parameters()]
        for second in (False, True):
            loss = F.cross_entropy(model(x).float(), y)
            scaler.scale(loss).backward()
            if number == 3 and second:
                model[0].weight.grad[0, 0, 0, 0] = float("inf")
            scaler.step(opt) if second else opt.first_step(zero_grad=True)
        scaler.update()
        opt.zero_grad()
        losses.append(float(loss))
        same = all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
        assert same == (number == 3)
    assert scaler.get_scale() == 32.0
    assert losses[-1] < losses[0]


SPECS = {
    "lsq": (lsq(bits=4, axis=0), lsq(bits=4)),
    "two bits": (lsq(bits=2, axis=0), lsq(bits=3)),
    "affine": (lsq(bits=4, axis=0, signed=False).replace(symmetric=False),) * 2,
    "reciprocal": (lsq(bits=4, axis=0).replace(arithmetic="reciprocal"), lsq(bits=8)),
    "ewgs": (lsq(bits=4, axis=0).replace(estimator="ewgs"), lsq(bits=4).replace(estimator="pact", signed=False)),
    "noise": (lsq(bits=4, axis=0).replace(noise="uniform"), lsq(bits=4).replace(noise="normal")),
    "chance": (lsq(bits=4, axis=0).replace(rounding="stochastic"), lsq(bits=4)),
    "floats": (lsq(bits=4, axis=0).replace(format="e2m1"), lsq(bits=8).replace(format="e4m3")),
}


@pytest.mark.parametrize("name", SPECS)
def test_quantized_training(kernels, name):
    """The first gradients are the CPU's; the loss falls; a step in bf16 autocast and one in channels_last work."""
    weights, activations = SPECS[name]
    if activations.axis is not None:
        activations = activations.replace(axis=None)
    model, (x, y) = quantized(weights, activations), images()
    there, xd, yd = copy.deepcopy(model).to(DEVICE), x.to(DEVICE), y.to(DEVICE)
    if name not in ("noise", "chance"):  # whose draws come from the device's generator
        gradients = []
        for net, a, b in ((model, x, y), (there, xd, yd)):
            loss = F.cross_entropy(net(a), b)
            gradients.append([loss, *torch.autograd.grad(loss, [p for p in net.parameters() if p.requires_grad])])
        # a sum in another order moves a value that lies at a tie to the next code
        for want, got in zip(*gradients):
            assert float((got.cpu() - want).norm()) <= 0.1 * float(want.norm()) + 1e-4
    opt = optim.SAM(there, lr=0.05, momentum=0.9, rho=0.02)
    losses = fit(there, opt, xd, yd, 30)
    assert sum(losses[-3:]) < 0.6 * 3 * losses[0]
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = F.cross_entropy(there.to(memory_format=torch.channels_last)(xd), yd)
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in there.parameters() if p.grad is not None)


def test_dynamic_and_mixed(kernels):
    """Scales from the data, blocks of a shared exponent, and a mixture of widths."""
    x = torch.randn(67, 128, device=DEVICE, requires_grad=True)
    for spec in (ff.QuantSpec(bits=4, axis=0, mask="none"), ff.QuantSpec.mx("e4m3", "floor"), ff.QuantSpec.nvfp4()):
        y, scale = ff.fake_quantize_dynamic(x, spec=spec)
        (g,) = torch.autograd.grad(y.square().sum(), x)
        xc = x.detach().cpu().requires_grad_()
        yc, expected = ff.fake_quantize_dynamic(xc, spec=spec)
        (gc,) = torch.autograd.grad(yc.square().sum(), xc)
        assert torch.equal(y.cpu(), yc)
        assert torch.equal(scale.cpu(), expected)
        torch.testing.assert_close(g.cpu(), gc, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("operator", "options"), [("Hessian", {}), ("GGN", {}), ("Fisher", {"kind": "empirical"})], ids=lambda v: str(v)
)
@pytest.mark.parametrize("kind", ["plain", "quantized"])
def test_products(kernels, operator, options, kind):
    """Of the Fisher matrix without draws, which come from the device's generator."""
    model = network() if kind == "plain" else quantized(*SPECS["lsq"])
    found = []
    for device, dtype in (("cpu", torch.float64), (DEVICE, torch.float64), (DEVICE, torch.float32)):
        x, y = images()
        net = copy.deepcopy(model).eval().to(device, dtype)
        op = getattr(curvature, operator)(net, F.cross_entropy, [(x.to(device, dtype), y.to(device))], **options)
        V = torch.randn(op.shape[0], 5, generator=torch.Generator().manual_seed(1))
        found.append((op @ V.to(device, dtype)).cpu().double())
    want, exact, single = found
    assert float((exact - want).norm()) <= 1e-9 * float(want.norm())
    if kind == "plain":  # of a quantized network, fp32 rounds some values to another code
        assert float((single - want).norm()) <= 1e-3 * float(want.norm())


def test_estimates(kernels):
    model, (x, y) = quantized(*SPECS["lsq"]).eval().to(DEVICE), images()
    H = curvature.Hessian(model, F.cross_entropy, [(x.to(DEVICE), y.to(DEVICE))])
    dense = (H @ torch.eye(H.shape[0], device=DEVICE)).double().cpu()
    dense = (dense + dense.t()) / 2
    trace = H.trace(rtol=0.05)
    assert abs(trace.value - float(dense.trace())) <= 5 * trace.stderr + 1e-3 * abs(float(dense.trace()))
    top = H.eigenvalues(2, tol=1e-3).value
    torch.testing.assert_close(top.double().cpu(), torch.linalg.eigvalsh(dense).flip(0)[:2], rtol=2e-2, atol=1e-4)
    layers = H.layer_traces(rtol=0.2)
    for name, estimate in layers.items():
        where = H.blocks[name]
        exact = float(dense[where, where].trace())
        assert abs(estimate.value - exact) <= 6 * estimate.stderr + 0.02 * abs(exact) + 1e-4
    density = H.density(steps=16, probes=2)
    assert bool(torch.as_tensor(density.evaluate(density.grid(50)).value).isfinite().all())


def test_hessians_of_inputs(kernels):
    found = []
    for device in ("cpu", DEVICE):
        net, (x, y) = network().double().eval().to(device), images(8)
        op = curvature.InputHessian(net, F.cross_entropy, x.double().to(device), y.to(device))
        found.append(op.solve(-op.gradients(), damping=0.5, tol=1e-10).value.cpu())
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-9)


def test_differentiable_products(kernels):
    """A penalty on a product with the Hessian, whose gradient takes a third derivative through quantizers."""
    found = []
    for device in ("cpu", DEVICE):
        net, (x, y) = quantized(*SPECS["lsq"]).double().eval().to(device), images(16)
        params = dict(net.named_parameters())
        x, y = x.double().to(device), y.to(device)
        g = torch.Generator().manual_seed(2)
        V = {k: torch.randn(p.shape, generator=g, dtype=torch.float64).to(device) for k, p in params.items()}

        def loss(values, net=net, x=x, y=y):
            return torch.nn.functional.cross_entropy(torch.func.functional_call(net, values, (x,)), y)

        products = curvature.hvp(loss, params, V, create_graph=True)
        penalty = sum(p.square().sum() for p in products.values())
        grads = torch.autograd.grad(penalty, list(params.values()), allow_unused=True)
        found.append([torch.zeros(1) if t is None else t.cpu() for t in grads])
    for want, got in zip(*found):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7 * float(want.abs().max()) + 1e-12)


def test_compiled_step(kernels):
    """torch.compile takes forward and backward of a quantized network in one graph each."""
    model = quantized(*SPECS["lsq"]).to(DEVICE)
    x, y = (t.to(DEVICE) for t in images())
    compiled = torch.compile(lambda a, b: F.cross_entropy(model(a), b), fullgraph=True)
    wanted = F.cross_entropy(model(x), y)
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(wanted, parameters)
    loss = compiled(x, y)
    found = torch.autograd.grad(loss, parameters)
    torch.testing.assert_close(loss, wanted, rtol=2e-2, atol=1e-3)
    for want, got in zip(expected, found):
        assert float((got - want).norm()) <= 0.1 * float(want.norm()) + 1e-4


def test_captured_step(kernels):
    """A whole SAM step of a quantized network as a CUDA graph: its replays train as the eager steps do."""
    x, y = (t.to(DEVICE) for t in images())
    found = []
    for captured in (False, True):
        model = quantized(*SPECS["lsq"]).to(DEVICE)
        opt = optim.SAM(model, lr=0.05, momentum=0.9, rho=0.02)

        def step(model=model, opt=opt):
            F.cross_entropy(model(x), y).backward()
            opt.first_step(zero_grad=False)
            for p in model.parameters():
                if p.grad is not None:
                    p.grad.zero_()
            F.cross_entropy(model(x), y).backward()
            opt.second_step()
            for p in model.parameters():
                if p.grad is not None:
                    p.grad.zero_()

        if captured:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            for _ in range(5):
                graph.replay()
        else:
            for _ in range(8):
                step()
        with torch.no_grad():
            found.append(float(F.cross_entropy(model(x), y)))
    assert found[1] == pytest.approx(found[0], rel=0.05)


def test_train_command(kernels, train, tmp_path):
    """The command on a GPU learns what it learns on a CPU."""
    options = "--device", DEVICE, "--optimizer", "sam", "--skip", "first"
    code, _, err = train(*options, "--epochs", 3, "--out", tmp_path / "run")
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["test_accuracy"] > 0.9


def test_exported_from_a_gpu(tmp_path):
    """The integer codes of a network do not depend on where it is, and its outputs hardly."""
    model = quantized(*SPECS["lsq"]).eval()
    x = images(8)[0]
    codes = [ff.quant.export_codes(net) for net in (model, copy.deepcopy(model).to(DEVICE))]
    assert list(codes[0]) == list(codes[1])
    for one, two in zip(codes[0].values(), codes[1].values()):
        assert torch.equal(one.codes.cpu(), two.codes.cpu())
        assert torch.equal(one.scale.cpu(), two.scale.cpu())
    assert torch.allclose(copy.deepcopy(model).to(DEVICE)(x.to(DEVICE)).cpu(), model(x), atol=0.1)

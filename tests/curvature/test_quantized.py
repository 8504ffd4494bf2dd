# SPDX-License-Identifier: Apache-2.0
"""Quantized networks: against double backward, symmetry, and the frozen-residual surrogate."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import fastflat as ff

from .problems import by_engine, dense, squares

lsq = ff.QuantSpec.lsq
SPECS = {
    "lsq": lsq(bits=4),
    "lsq, channels": lsq(bits=3, axis=0),
    "ste": lsq(bits=4, axis=0).replace(estimator="ste", grad_scale="none"),
    "groups": lsq(bits=4).replace(group=2),
    "affine": lsq(bits=4, signed=False).replace(symmetric=False),
    "affine, channels": lsq(bits=4, axis=0, signed=False).replace(symmetric=False),
    "reciprocal": lsq(bits=4).replace(arithmetic="reciprocal"),
    "log2 scale": lsq(bits=4).replace(scale_is="log2"),
    "own factor": lsq(bits=4).replace(grad_scale=0.5),
    "pact": lsq(bits=4, signed=False).replace(estimator="pact"),
    "ewgs": lsq(bits=4).replace(estimator="ewgs"),
    "uniform noise": lsq(bits=4).replace(noise="uniform"),
    "normal noise": lsq(bits=4, axis=0).replace(noise="normal"),
    "temper": lsq(bits=4).replace(noise="temper"),
    "bypass": lsq(bits=4).replace(noise="bypass"),
    "stochastic": lsq(bits=4).replace(rounding="stochastic"),
    "e4m3": lsq(bits=8).replace(format="e4m3"),
    "e2m1, groups": lsq(bits=4).replace(format="e2m1", group=2),
    "ternary": lsq(bits=2).replace(format="ternary"),
}


def quantized(spec, *, weights=True, activations=True, fuse=False, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2), nn.SiLU(), nn.Linear(2, 2)).double()
    per_tensor = spec.replace(axis=None, group=None)
    model = ff.prepare(
        model, weights=spec if weights else None, activations=per_tensor if activations else None, fuse_weights=fuse
    )
    x = torch.randn(6, 4, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ff.calibrate(model, [x.abs()])
    return model, x


@pytest.mark.parametrize("name", SPECS)
def test_hessian_of_a_quantized_network(name):
    model, x = quantized(SPECS[name])
    params = {k: p.detach() for k, p in model.named_parameters()}
    loss = squares(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.manual_seed(1)
        ours = by_engine(loss, params)
    scale = float(ours.abs().max())
    if SPECS[name].estimator != "ewgs":  # which is no gradient of anything; its double backward is not even linear
        torch.manual_seed(1)
        torch.testing.assert_close(ours, dense(loss, params), rtol=1e-10, atol=1e-10 * scale)
    torch.testing.assert_close(ours, ours.t(), rtol=0, atol=1e-12 * scale)


def test_weights_fused_into_one_call():
    model, x = quantized(SPECS["lsq, channels"], fuse=True)
    params = {k: p.detach() for k, p in model.named_parameters()}
    close(by_engine(squares(model, x), params), dense(squares(model, x), params))


def _binarized(p, x):
    return torch.tanh(x @ ff.binarize(p["w"], axis=0).t())


def _liq(p, x):
    return torch.tanh(x @ ff.liq_quantize(p["w"], p["clip"], bits=3, axis=0).t())


def _planes(p, x):
    w = ff.bitplane(p["p"], p["q"], p["m"], p["scale"], torch.tensor(1.5, dtype=torch.float64))
    return torch.tanh(x @ w.t())


def _mixture(p, x):
    w = ff.mixquant(p["w"], p["scales"], torch.softmax(p["logits"], 0), bits=[2, 4, 8], spec=SPECS["lsq"])
    return torch.tanh(x @ w.t())


def _dynamic(p, x):
    spec = SPECS["lsq"].replace(estimator="ste", grad_scale="none")
    return torch.tanh(x @ ff.fake_quantize_dynamic(p["w"], spec=spec)[0].t())


def _dynamic_minifloat(p, x):
    spec = SPECS["e4m3"].replace(estimator="ste", grad_scale="none")
    return torch.tanh(x @ ff.fake_quantize_dynamic(p["w"], spec=spec)[0].t())


def _random(*shape):
    return torch.randn(shape, dtype=torch.float64)


FAMILIES = {
    "binarize": (_binarized, {"w": (3, 4)}),
    "liq": (_liq, {"w": (3, 4), "clip": ()}),
    "bitplane": (_planes, {"p": (3, 3, 4), "q": (3, 3, 4), "m": (3,), "scale": ()}),
    "mixquant": (_mixture, {"w": (3, 4), "scales": (3,), "logits": (3,)}),
    "dynamic": (_dynamic, {"w": (3, 4)}),
    "dynamic e4m3": (_dynamic_minifloat, {"w": (3, 4)}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families(name):
    torch.manual_seed(3)
    function, shapes = FAMILIES[name]
    params = {
        k: _random(*s).abs() + 0.1 if k in ("clip", "scale", "scales") else _random(*s) for k, s in shapes.items()
    }
    x = _random(5, 4)

    def loss(p):
        return function(p, x).exp().square().mean()

    close(by_engine(loss, params), dense(loss, params))


def close(ours, theirs):
    scale = float(theirs.abs().max())
    assert scale > 1e-4
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10 * scale)
    torch.testing.assert_close(ours, ours.t(), rtol=0, atol=1e-12 * scale)


LAYERS = {
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Tanh(), nn.Conv2d(3, 2, 2)),
        (3, 2, 4, 4),
    ),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 2), nn.Tanh(), nn.ConvTranspose2d(3, 1, 2)),
        (2, 2, 3, 3),
    ),
    "attention": (lambda: nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True), (2, 3, 4)),
    "lstm": (lambda: First(nn.LSTM(3, 3)), (4, 2, 3)),
    "gru": (lambda: First(nn.GRU(3, 3, bidirectional=True)), (4, 2, 3)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(5, 4), nn.Tanh(), nn.Linear(4, 2)), None),
}


class First(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_that_prepare_knows(name, quantize):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    x = torch.tensor([[0, 1, 2], [2, 4, 0]]) if shape is None else _random(*shape)
    model = make().double()
    if quantize:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = ff.prepare(model, weights=SPECS["lsq, channels"], activations=SPECS["lsq"])
            ff.calibrate(model, [x])
    params = {k: p.detach() for k, p in model.named_parameters()}
    loss = squares(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = by_engine(loss, params)
    close(ours, dense(loss, params))


@pytest.mark.parametrize("name", ["float", "lsq, channels", "affine", "groups", "pact", "ternary"])
def test_products_that_are_differentiated_again(name):
    # The third derivative of the frozen function is symmetric too: D(v'Hv)[u] = D(v'Hu)[v].
    if name == "float":
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        x = torch.randn(6, 4, dtype=torch.float64)
    else:
        model, x = quantized(SPECS[name])
    params, loss = dict(model.named_parameters()), squares(model, x)
    u, v = ({k: torch.randn_like(p) for k, p in params.items()} for _ in range(2))

    def form(a, b):
        products = ff.curvature.hvp(loss, params, b, create_graph=True)
        plain = ff.curvature.hvp(loss, params, b)
        for k in params:
            torch.testing.assert_close(products[k].detach(), plain[k], rtol=1e-9, atol=1e-9)
        return sum((products[k] * a[k]).sum() for k in params)

    def along(value, direction):
        found = torch.autograd.grad(value, list(params.values()), allow_unused=True)
        return sum((f * direction[k]).sum() for k, f in zip(params, found, strict=True) if f is not None)

    one, two = along(form(v, v), u), along(form(v, u), v)
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9 * float(abs(one)))
    assert float(abs(one)) > 1e-6
    assert all(p.grad is None for p in params.values())
    if name == "float":
        moved = [
            sum(
                (h * v[k]).sum()
                for k, h in ff.curvature.hvp(loss, {k: p + t * u[k] for k, p in params.items()}, v).items()
            )
            for t in (1e-5, -1e-5)
        ]
        torch.testing.assert_close((moved[0] - moved[1]) / 2e-5, one.detach(), rtol=1e-6, atol=1e-8)


def test_differentiable_products_of_several_vectors_and_what_is_refused():
    model, x = quantized(SPECS["lsq"])
    params = {k: p.detach() for k, p in model.named_parameters()}
    loss = squares(model, x)
    v = {k: torch.randn(3, *p.shape, dtype=p.dtype) for k, p in params.items()}
    many = ff.curvature.hvp(loss, params, v, create_graph=True)
    for k, h in ff.curvature.hvp(loss, params, v).items():
        torch.testing.assert_close(many[k].detach(), h, rtol=1e-9, atol=1e-9)
        assert many[k].requires_grad
    none = ff.curvature.hvp(loss, params, {k: t[:0] for k, t in v.items()}, create_graph=True)
    assert all(none[k].shape == (0, *p.shape) for k, p in params.items())
    with pytest.raises(ValueError, match="create_graph must come with method='auto' or 'double_backward' alone"):
        ff.curvature.hvp(loss, params, v, create_graph=True, method="finite_difference")
    with pytest.raises(ValueError, match=r"tangents must have shape"):
        ff.curvature.hvp(loss, params, {k: t[..., None] for k, t in v.items()}, create_graph=True)

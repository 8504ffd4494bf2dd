# SPDX-License-Identifier: Apache-2.0
"""BiTAT: "BiTAT: Neural Network Binarization with Task-dependent Aggregated Transformation", Park, Yoon, Zhang, Zhang,
Hwang and Eldar, 2022, arXiv 2207.01394.

Weights and activations of one bit. Layers are binarised from the first to the last, each in coordinates in which its
inputs are uncorrelated, and by how much each coordinate matters to the loss. For a layer of weight W [O, I], with rows
x [I] of its (already binary) inputs, m their mean, and g [O] the gradient of the loss with respect to its output::

    S      = E (x - m)(x - m)' = V diag(l) V'                   W^ = W V
    E |dW (x - m)|^2 = sum_ok l_k dW^_ok^2                      an identity
    h_ok   = E g_o^2 (V'(x - m))_k^2                            Fisher's diagonal in that basis; l_k for g = 1
    b      = sign(W^),  alpha_o = sum_k h_ok |W^_ok| / sum_k h_ok
    y      = (alpha b V') x + bias,   x = s sign(input - t)     t by channel, s one number, both trained

alpha is the least ``sum_k h_ok (W^_ok - alpha b_ok)^2``. Before that W is fitted to what the float layer gives, from
the binary inputs (least squares, with a small ridge), and afterwards the bias takes the mean that is left. Then batch
norms are estimated again, the next layer sees its inputs through the binarised prefix, and at the end (or after each
layer, ``tune``) W^, bias, t and s are trained straight through the signs, V and h staying as they are.

Our reading. The abstract names the steps: correlations of the inputs and an importance vector, an orthonormal
transform of each layer's weights, quantization by importance, layers bottom to top. The equations are ours. ``blocks``
quantizes by groups of coordinates: a scale for each range of eigenvalues. S and h are of centred inputs, since a bias
takes the mean.

A rotated weight is no longer one bit in the layer's own coordinates: V is kept and applied to the signs, an exact
orthonormal layer of I^2 numbers. ``rotate=False`` has V = 1, and so an ordinary binary layer; ``sweeps`` then uses the
correlations as a metric alone: signs flip, one coordinate after another, where that lowers ``E |dW (x - m)|^2``.

```python
import torch
import fastflat as ff

model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 32), torch.nn.ReLU(),
                            torch.nn.Linear(32, 3))
x, y = torch.randn(64, 8), torch.randint(3, (64,))
loss = torch.nn.functional.cross_entropy
ff.methods.binarize_layers(model, [(x, y)], loss, skip=("0", "4"))  # trained before; first and last stay in floats
opt = torch.optim.Adam(model.parameters(), lr=1e-3)
for _ in range(3):
    opt.zero_grad()
    loss(model(x), y).backward()
    opt.step()
```
"""

from __future__ import annotations

import copy
import fnmatch
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastflat import _checks
from fastflat._ops import compute_dtype
from fastflat._spec import QuantSpec
from fastflat.functional import binarize, fake_quantize
from fastflat.methods import lab
from fastflat.methods._contract import Arm, Check, Claim, Experiment, Figure, Method, Settings
from fastflat.methods.lab.networks import ConvNet, ends
from fastflat.optim import SGD

__all__ = ["METHOD", "BinaryLayer", "binarize_layers"]

_OP = "binarize_layers"
_KINDS = (nn.Linear, nn.Conv2d)
_BIT = QuantSpec(format="binary", estimator="lsq", grad_scale="lsq")
#: Ridge of the fit to the float layer, in mean eigenvalues of S.
_RIDGE = 1e-3


class BinaryLayer(nn.Module):
    """A linear layer or 2-d convolution (grouped and depthwise too) with weights, and inputs, of one bit.

    ``y = layer(s sign(x - t), (alpha sign(W^)) V') + bias``, with shapes of the layer that it replaces.

    Args:
        layer: ``nn.Linear`` or ``nn.Conv2d``; its weight gives W^.
        basis: V ``[groups, I, I]``, orthonormal columns; None is the identity.
        importance: h ``[O, I]``, at least 0; None is 1.
        blocks: scales for each output, over equal ranges of coordinates; must divide I.
        activations: whether inputs are binary; t = 0 and s = 1 at first.

    Attributes:
        weight: W^ ``[O, I]``, I the inputs of one output (of its group).
        bias: ``[O]``.
        threshold, scale: t, ``[in]``, and s, ``[]``; None where inputs stay.
    """

    def __init__(
        self,
        layer: nn.Module,
        basis: Tensor | None = None,
        importance: Tensor | None = None,
        *,
        blocks: int = 1,
        activations: bool = True,
    ) -> None:
        super().__init__()
        if type(layer) not in _KINDS:
            _checks.fail("BinaryLayer", "layer", "be an nn.Linear or nn.Conv2d", type(layer))
        w = layer.weight.detach()
        self.shape, self.groups = tuple(w.shape), getattr(layer, "groups", 1)
        rows = w.flatten(1)
        if isinstance(blocks, bool) or not isinstance(blocks, int) or blocks < 1 or rows.shape[1] % blocks:
            _checks.fail("BinaryLayer", "blocks", f"divide the {rows.shape[1]} inputs of an output", repr(blocks))
        size = rows.shape[1]
        for name, value, shape in (
            ("basis", basis, [self.groups, size, size]),
            ("importance", importance, list(rows.shape)),
        ):
            if value is not None and list(value.shape) != shape:
                _checks.fail("BinaryLayer", name, f"have shape {shape}", list(value.shape))
            self.register_buffer(name, None if value is None else value.detach().clone())
        self.group = size // blocks if blocks > 1 else None
        self.options = _options(layer)
        self.weight = nn.Parameter(self._rotated(rows, back=False).clone())
        bias = torch.zeros(self.shape[0], device=w.device, dtype=w.dtype)
        self.bias = nn.Parameter(bias if layer.bias is None else layer.bias.detach().clone())
        self.channels = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features
        self.register_parameter("threshold", None)
        self.register_parameter("scale", None)
        if activations:
            self.threshold = nn.Parameter(torch.zeros(self.channels, device=w.device, dtype=w.dtype))
            compute = compute_dtype(w.dtype)
            self.scale = nn.Parameter(torch.ones((), device=w.device, dtype=compute))

    def _rotated(self, rows: Tensor, back: bool) -> Tensor:
        """``W V``, or ``W^ V'`` back, by group."""
        if self.basis is None:
            return rows
        basis = self.basis.to(rows.dtype)
        by_group = rows.view(self.groups, -1, rows.shape[1]) @ (basis.transpose(1, 2) if back else basis)
        return by_group.reshape(rows.shape)

    def binary_weight(self) -> Tensor:
        """What the layer multiplies with, in the shape of the layer that it replaces."""
        axis = None if self.group else 0
        signs = binarize(self.weight, self.importance, axis=axis, group=self.group)
        return self._rotated(signs, back=True).view(self.shape)

    def binary_input(self, x: Tensor) -> Tensor:
        """``s sign(x - t)``, or x where inputs stay."""
        if self.threshold is None:
            return x
        threshold = self.threshold if len(self.shape) == 2 else self.threshold[:, None, None]
        return fake_quantize(x - threshold, self.scale, spec=_BIT)

    def forward(self, x: Tensor) -> Tensor:
        x, w = self.binary_input(x), self.binary_weight()
        w = w if torch.is_autocast_enabled(x.device.type) else w.to(x.dtype)
        if not self.options:
            return F.linear(x, w, self.bias)
        return F.conv2d(_padded(x, self.options), w, self.bias, groups=self.groups, **self.options["convolution"])

    def extra_repr(self) -> str:
        ends_ = "1-bit inputs" if self.threshold is not None else "inputs as they are"
        return f"{list(self.shape)}, {'rotated, ' if self.basis is not None else ''}{ends_}"


def _options(layer: nn.Module) -> dict[str, Any]:
    """How a convolution walks; empty for a linear layer."""
    if not isinstance(layer, nn.Conv2d):
        return {}
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    steps = {"stride": layer.stride, "dilation": layer.dilation}
    sides = layer._reversed_padding_repeated_twice
    return {"convolution": steps, "kernel": layer.kernel_size, "sides": sides, "mode": mode}


def _padded(x: Tensor, options: dict[str, Any]) -> Tensor:
    return F.pad(x, options["sides"], mode=options["mode"]) if any(options["sides"]) else x


def _rows(x: Tensor, options: dict[str, Any], groups: int) -> Tensor:
    """The inputs that meet a row of the weight: ``[groups, N, I]``."""
    if not options:
        return x.reshape(1, -1, x.shape[-1])
    patches = F.unfold(_padded(x, options), options["kernel"], **options["convolution"])
    return patches.view(len(x), groups, -1, patches.shape[-1]).permute(1, 0, 3, 2).flatten(1, 2)


def _columns(y: Tensor, options: dict[str, Any], groups: int) -> Tensor:
    """Outputs or their gradients, as :func:`_rows`: ``[groups, N, O / groups]``."""
    if not options:
        return y.reshape(1, -1, y.shape[-1])
    return y.view(len(y), groups, y.shape[1] // groups, -1).permute(1, 0, 3, 2).flatten(1, 2)


def decorrelate(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(mean ``[G, 1, I]``, l ``[G, I]`` ascending, V ``[G, I, I]``) of rows ``[G, N, I]``: ``S = V diag(l) V'``."""
    mean = rows.mean(1, keepdim=True)
    off = rows - mean
    values, basis = torch.linalg.eigh(off.transpose(1, 2) @ off / rows.shape[1])
    return mean, values.clamp_min(0), basis


def _refit(rows: Tensor, wanted: Tensor) -> Tensor:
    """The weight ``[O, I]`` of least squares from rows ``[G, N, I]`` to outputs ``[G, N, O/G]``, means apart."""
    off, y = rows - rows.mean(1, keepdim=True), wanted - wanted.mean(1, keepdim=True)
    s = off.transpose(1, 2) @ off
    ridge = _RIDGE * s.diagonal(dim1=1, dim2=2).mean(1)[:, None, None].clamp_min(torch.finfo(s.dtype).tiny)
    s = s + ridge * torch.eye(s.shape[1], device=s.device, dtype=s.dtype)
    return torch.linalg.solve(s, off.transpose(1, 2) @ y).transpose(1, 2).flatten(0, 1)


def _descended(w: Tensor, q: Tensor, s: Tensor, sweeps: int) -> Tensor:
    """q ``[G, R, I]`` with signs flipped where, one after another, that lowers ``(w - q) S (w - q)'`` of its row."""
    q, left = q.clone(), (w - q) @ s
    for k in list(range(w.shape[2])) * sweeps:
        d = 2 * q[..., k]
        rise = 2 * d * left[..., k] + d * d * s[:, k, k, None]
        d = torch.where(rise < 0, d, torch.zeros_like(d))
        q[..., k] -= d
        left += d[..., None] * s[:, None, k]
    return q


def binarize_layers(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss_fn: Callable[[Any, Any], Tensor],
    *,
    skip: Sequence[str] = (),
    activations: bool = True,
    rotate: bool = True,
    weighted: bool = True,
    match: bool = True,
    progressive: bool = True,
    blocks: int = 1,
    sweeps: int = 0,
    tune: Callable[[nn.Module, str], Any] | None = None,
) -> nn.Module:
    """Replaces the linear layers and 2-d convolutions of a trained model by :class:`BinaryLayer`, in place, in the
    order in which the forward pass calls them.

    Args:
        model: in floats. Make the optimizer afterwards: parameters are new.
        batches: (inputs, targets), a few hundred examples; kept while this runs.
        loss_fn: of (outputs, targets).
        skip: ``fnmatch`` patterns of layers that stay, usually the first and the last.
        activations: binary inputs too. The thresholds begin at the channels' means.
        rotate: the transform V; else V = 1.
        weighted: importance h by the loss; else 1.
        match: fit the weight to the float layer's outputs first.
        progressive: each layer sees its inputs through the layers before it as they are by then; else clean ones.
        blocks: scales for each output, over ranges of coordinates; the largest divisor of I that is no more is taken.
        sweeps: over the coordinates of each layer, to flip signs by the inputs' correlations; with ``rotate=False``,
            for in the basis V no flip lowers the error.
        tune: called with (model, name) after each layer, to train a little before the next.

    Returns:
        The model, in the mode in which it was. Batch norms have statistics of ``batches``.

    Raises:
        ValueError: no layer to binarise, a pattern that matches none, a layer that is called twice, no batch; the model
            is as before.
    """
    batches = [(x, y) for x, y in batches]
    if not batches:
        _checks.fail(_OP, "batches", "hold inputs and targets", "none")
    if isinstance(blocks, bool) or not isinstance(blocks, int) or blocks < 1:
        _checks.fail(_OP, "blocks", "be a positive int", repr(blocks))
    if isinstance(sweeps, bool) or not isinstance(sweeps, int) or sweeps < 0 or (sweeps and rotate):
        _checks.fail(_OP, "sweeps", "be an int of at least 0, and 0 unless rotate=False", repr(sweeps))
    if isinstance(skip, str):
        _checks.fail(_OP, "skip", "be a sequence of patterns", repr(skip), f"; write skip=({skip!r},)")
    training, teacher = model.training, copy.deepcopy(model).eval()
    names = _order(teacher, batches[0][0], skip)
    flags = {"activations": activations, "rotate": rotate, "weighted": weighted, "match": match}
    flags |= {"blocks": blocks, "sweeps": sweeps}
    try:
        model.eval()
        for name in names:
            seen = _collected(model if progressive else teacher, name, batches, loss_fn)
            wanted = [out for _, out, _ in (_collected(teacher, name, batches, None) if progressive else seen)]
            made = _made(model.get_submodule(name), seen, wanted, **flags)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, made)
            torch.optim.swa_utils.update_bn(batches, model)
            if tune is not None:
                tune(model.train(), name)
            model.eval()
    finally:
        model.train(training)
    return model


def _order(model: nn.Module, x: Tensor, skip: Sequence[str]) -> list[str]:
    """Names of the layers to binarise, in the order of their calls."""
    named = [name for name, m in model.named_modules() if type(m) in _KINDS and name]
    for pattern in skip:
        if not fnmatch.filter(named, pattern):
            _checks.fail(_OP, "skip", "match the name of a linear layer or 2-d convolution", repr(pattern))
    wanted = [name for name in named if not any(fnmatch.fnmatchcase(name, p) for p in skip)]
    if not wanted:
        _checks.fail(_OP, "model", "hold linear layers or 2-d convolutions that are not skipped", "none")
    called: list[str] = []
    handles = [model.get_submodule(n).register_forward_hook(lambda *_, name=n: called.append(name)) for n in wanted]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    twice = [name for name in called if called.count(name) > 1]
    if twice:
        _checks.fail(_OP, "model", "call each layer once", f"two calls of {twice[0]}", "; skip it")
    if not called:
        _checks.fail(_OP, "model", "call its layers", "no call")
    return called


def _collected(
    model: nn.Module, name: str, batches: list[tuple[Tensor, Tensor]], loss_fn: Callable[[Any, Any], Tensor] | None
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Input, output and (with a loss) the output's gradient of a layer, batch by batch, in evaluation mode."""
    found, kept = [], []

    def keep(_module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        # The graph begins here; copies, for what follows may write in place.
        kept[:] = inputs[0].detach().clone(), out.detach().clone().requires_grad_(loss_fn is not None)
        return kept[1].clone()

    handle = model.get_submodule(name).register_forward_hook(keep)
    try:
        for x, y in batches:
            with torch.set_grad_enabled(loss_fn is not None):
                scores = model(x)
                inputs, out = kept
                grad = None
                if loss_fn is not None:
                    (grad,) = torch.autograd.grad(loss_fn(scores, y), out, allow_unused=True, materialize_grads=True)
            found.append((inputs, out.detach(), grad))
    finally:
        handle.remove()
    return found


@torch.no_grad()
def _made(
    layer: nn.Module,
    seen: list[tuple[Tensor, Tensor, Tensor]],
    wanted: list[Tensor],
    *,
    activations: bool,
    rotate: bool,
    weighted: bool,
    match: bool,
    blocks: int,
    sweeps: int,
) -> BinaryLayer:
    """The binary form of a layer, from what reaches it and what it ought to give."""
    layer = copy.deepcopy(layer)
    options, groups = _options(layer), getattr(layer, "groups", 1)
    x, y = torch.cat([i for i, _, _ in seen]), torch.cat(wanted)
    compute = compute_dtype(layer.weight.dtype)
    plain = BinaryLayer(layer, activations=activations)
    if activations:
        axes = [0, 2, 3] if options and x.dim() == 4 else list(range(x.dim() - 1))
        plain.threshold.copy_(x.mean(axes))
        t = plain.threshold[:, None, None] if options else plain.threshold
        plain.scale.copy_((x - t).abs().mean().clamp_min(torch.finfo(plain.scale.dtype).tiny))
    rows = _rows(plain.binary_input(x), options, groups).to(compute)
    outputs = _columns(y, options, groups).to(compute)
    if match:
        layer.weight.copy_(_refit(rows, outputs).view_as(layer.weight))
    mean, values, basis = decorrelate(rows)
    s = (basis * values[:, None]) @ basis.transpose(1, 2)
    if not rotate:
        basis = torch.eye(rows.shape[2], device=rows.device, dtype=rows.dtype).expand_as(basis)
    importance = None
    if weighted:
        g = _columns(torch.cat([g for _, _, g in seen]), options, groups).to(compute)
        importance = g.square().transpose(1, 2) @ ((rows - mean) @ basis).square() / rows.shape[1]
        # A unit of their own, so that small gradients stay above the smallest number.
        importance = (importance / importance.mean().clamp_min(torch.finfo(g.dtype).tiny)).flatten(0, 1)
    size = rows.shape[2]
    largest = max(n for n in range(1, min(blocks, size) + 1) if size % n == 0)
    made = BinaryLayer(layer, basis if rotate else None, importance, blocks=largest, activations=activations)
    if sweeps:
        w = made.weight.to(compute).view(groups, -1, size)
        q = _descended(w, made.binary_weight().to(compute).view(w.shape), s, sweeps)
        # The same magnitudes with the new signs keep alpha; one factor for each output is free.
        best = ((w @ s) * q).sum(2, keepdim=True) / ((q @ s) * q).sum(2, keepdim=True)
        best = torch.where((best > 0) & torch.isfinite(best), best, torch.ones_like(best))
        made.weight.copy_((torch.where(q < 0, -1.0, 1.0) * w.abs() * best).view_as(made.weight))
    if activations:
        made.threshold.copy_(plain.threshold)
        made.scale.copy_(plain.scale)
    by_group = made.binary_weight().to(compute).flatten(1).view(groups, -1, size)
    made.bias.copy_((outputs.mean(1) - (by_group @ mean.transpose(1, 2)).squeeze(2)).flatten())
    return made


def _check() -> Iterator[Check]:
    g = torch.Generator().manual_seed(0)
    mixing = torch.randn(12, 12, generator=g, dtype=torch.float64)
    x = torch.randn(1, 300, 12, generator=g, dtype=torch.float64) @ mixing
    mean, values, basis = decorrelate(x)
    d = torch.randn(12, generator=g, dtype=torch.float64)
    left = float(((x - mean) @ d).square().mean())
    right = float((values[0] * (basis[0].T @ d).square()).sum())
    yield Check("mean |X d|^2 over sum l_k (V'd)_k^2", 1.0, left / right, 1e-12, "decorrelation")
    v = decorrelate(x.float())[2][0]
    off = float((v.T @ v - torch.eye(12)).abs().max())
    yield Check("largest entry of V'V - 1, fp32", 0.0, off, 1e-5, "orthonormal")

    w, h = torch.randn(64, generator=g, dtype=torch.float64), torch.rand(64, generator=g, dtype=torch.float64)
    alpha = float(binarize(w, h, return_scale=True)[1])
    grid = torch.linspace(0, 3, 30001, dtype=torch.float64)
    errors = (h * (w - grid[:, None] * w.sign()).square()).sum(1)
    yield Check("scale by importance, against a search", float(grid[errors.argmin()]), alpha, 1e-4, "sum h|w| / sum h")

    layer = nn.Linear(12, 5, bias=False, device="meta").to_empty(device="cpu").double()
    layer.weight.data.copy_(torch.randn(5, 12, generator=g, dtype=torch.float64))
    made = BinaryLayer(layer, activations=False)
    xnor = layer.weight.detach().abs().mean(1, keepdim=True) * layer.weight.detach().sign()
    off = float((made.binary_weight().detach() - xnor).abs().max())
    yield Check("h = 1 and V = 1: distance from XNOR-Net", 0.0, off, 1e-15, "XNOR-Net, equation 6")
    made = BinaryLayer(layer, basis, activations=False)
    rotated = layer.weight.detach() @ basis[0]
    binary = rotated.abs().mean(1, keepdim=True) * rotated.sign()
    error = float(((x[0] - mean[0]) @ (made.binary_weight().detach() - layer.weight.detach()).T).square().sum(1).mean())
    want = float((values[0] * (binary - rotated).square()).sum())
    yield Check("output error of a rotated layer", want, error, 1e-10 * want, "sum l_k dW^_k^2")
    ratio = _output_errors()
    for name, s, w in (("V", torch.diag_embed(values), rotated), ("their own", _moment(x), layer.weight.detach())):
        q = w.abs().mean(1, keepdim=True) * w.sign()
        new = _descended(w[None], q[None], s, 2)[0]
        rise = (((w - new) @ s[0]) * (w - new)).sum() / (((w - q) @ s[0]) * (w - q)).sum()
        if name == "V":
            yield Check("signs that a sweep flips in the basis V", 0, int((new != q).sum()), 0, "S is diagonal")
        else:
            yield Check("output error after sweeps over before", 1.0, float(rise), 0.0, "descent", "at most")
    yield Check("output error, inputs collected again over clean ones", 1.0, ratio, 0.0, "bottom to top", "at most")
    yield Check("error of least importance over that of h = 1", 1.0, _weighted_error(x, layer), 0.0, "h = l", "at most")


def _moment(x: Tensor) -> Tensor:
    off = x - x.mean(1, keepdim=True)
    return off.transpose(1, 2) @ off / x.shape[1]


def _output_errors() -> float:
    """Mean squared error of a three-layer network's outputs, progressive over not."""
    errors = []
    for progressive in (True, False):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4)).double()
            x, y = torch.randn(256, 16).double(), torch.randint(4, (256,))
            want = model(x).detach()
            binarize_layers(model, [(x, y)], F.cross_entropy, weighted=False, progressive=progressive)
            errors.append(float((model(x).detach() - want).square().mean()))
    return errors[0] / errors[1]


def _weighted_error(x: Tensor, layer: nn.Module) -> float:
    """Output error with h = l over that with h = 1, in the basis of the inputs."""
    mean, values, basis = decorrelate(x)
    errors = []
    for importance in (values.expand(5, -1), None):
        made = BinaryLayer(layer, basis, importance, activations=False)
        dw = made.binary_weight().detach() - layer.weight.detach()
        errors.append(float(((x[0] - mean[0]) @ dw.T).square().sum()))
    return errors[0] / errors[1]


_ARMS: dict[str, dict[str, int]] = {
    "xnor": {"rotate": False, "weighted": False, "match": False, "progressive": False},
    "plain": {"rotate": False, "blocks": 4},
    "metric": {"rotate": False, "blocks": 4, "sweeps": 2},
    "bitat": {"blocks": 4},
}


def _train(name: str, seed: int, settings: Settings) -> dict[str, float]:
    parts = lab.images(settings.images, settings.test_images)
    rate = settings.choice["lr"]

    def make(model: nn.Module) -> torch.optim.Optimizer:
        return SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)

    # Two fifths of the steps in floats, the same for all arms; then binary.
    first = max(1, settings.steps * 2 // 5)
    net = functools.partial(ConvNet, 1, 28, parts.classes)
    model = lab.fit(net, make, parts.train, first, seed, batch=settings.batch).model
    x, y = (t[:256] for t in parts.train)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        batches = list(zip(x.split(128), y.split(128), strict=True))
        binarize_layers(model, batches, F.cross_entropy, skip=ends(model), **_ARMS[name])
    before = lab.loss_accuracy(model, parts.batches("test"))[1]
    done = lab.fit(model, make, parts.train, max(1, settings.steps - first), seed, batch=settings.batch)
    return lab.measure(done, parts) | {"accuracy_untrained": before}


def _arm(name: str) -> Arm:
    return Arm(name, lambda seed, settings: _train(name, seed, settings))


METHOD = Method(
    name="bitat",
    number=19,
    title="BiTAT: Neural Network Binarization with Task-dependent Aggregated Transformation",
    authors="Park, Yoon, Zhang, Zhang, Hwang, Eldar",
    year=2022,
    arxiv="2207.01394",
    claim=(
        "Decorrelating transforms, scales by importance and layers binarised bottom to top lose less with weights and"
        " activations of one bit; tested against signs and mean magnitudes, before and after training in one bit."
    ),
    kernels=("binarize", "general_quantize"),
    check=_check,
    experiment=Experiment(
        summary=(
            "Fashion-MNIST, a convolutional network with one bit inside; XNOR-Net's scales at once, importance and"
            " progressive layers without a transform, with correlations as a metric for the signs, and BiTAT."
        ),
        arms=tuple(map(_arm, _ARMS)),
        claims=(
            Claim("test_accuracy", "bitat", "xnor"),
            Claim("test_accuracy", "bitat", "plain"),
            Claim("test_accuracy", "metric", "xnor"),
            Claim("accuracy_untrained", "bitat", "xnor"),
        ),
        full=Settings(passes=1200, seeds=3, images=6000, test_images=2000),
        quick=Settings(passes=75, seeds=1, images=640, test_images=400, tune=False),
        grid={"lr": (0.05, 0.02, 0.1)},
        tried=(
            "Before training in one bit, importance and layers binarised bottom to top keep 82.4 % without a transform"
            " where XNOR-Net's scales keep 73.7 %; the decorrelating transform gives most of that back, and"
            " correlations as a metric for the signs keep it. After training all arms lie within 0.8 points."
        ),
        figure=Figure(
            "dots",
            ("accuracy_untrained", "test_accuracy"),
            ("right after binarisation", "after training"),
            "",
            "test accuracy",
        ),
    ),
)

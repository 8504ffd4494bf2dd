# SPDX-License-Identifier: Apache-2.0
"""Margins under perturbed weights: "Formalizing Generalization and Adversarial Robustness of Neural Networks to Weight
Perturbations", Tsai, Hsu, Yu and Chen, NeurIPS 2021, arXiv 2103.02200.

How much ``f_ij = f_i - f_j``, the difference of two scores, changes where every weight of the layers K moves by at most
eps. With activations of slope at most 1 and ``z_k``, the outputs of layer k on clean weights, the largest change of an
output of layer k is at most ``d_k``::

    d_0 = 0,    d_k = (|W_k|_inf + eps_k n_k) d_(k-1) + eps_k |z_(k-1)|_1           eps_k = eps for k in K, else 0
    |change of f_ij| <= eta_ij = |W_L[i] - W_L[j]|_1 d_(L-1) + 2 eps_L (|z_(L-1)|_1 + n_L d_(L-1))

``|W|_inf`` is the largest sum of magnitudes of a row, n_k the weights of a row. For a single layer k this is the
product ``eps |z_(k-1)|_1 prod_(m > k) |W_m|_inf |W_L[i] - W_L[j]|_1``, for the last one alone
``2 eps |z_(L-1)|_1``. The loss asks for margins beyond it, and keeps small the norms in generalisation bounds::

    L = CE + lambda_1 mean_i max_(j != y) [eta_yj - f_yj]_+ + lambda_2 sum_k (|W_k|_inf + |W_k|_1)

``|W|_1`` is the largest sum of magnitudes of a column. Norms and their gradients are :func:`fastflat.weight_reduce`,
one read a weight; products are sums of logarithms.

Our reading. Of the paper what its abstract and citations say could be read (pairwise margins by layers, Rademacher
complexity, a loss of both); the equations are ours, and hold for the perturbation of any set of layers at once.
Convolutions: a row is an output channel's kernel, ``|z|_1`` the largest sum over a receptive field. A batch
normalisation behind a layer scales its rows by ``|gamma| / sqrt(var + eps)`` of its running statistics, so that the
bound is that of evaluation. Biases are not perturbed. Defaults of eps and both lambdas are ours.

The bound grows with the product of the norms. On networks of many layers, or with eps at its height from the first
step, the term outweighs the cross-entropy by far and training diverges: take an eps at which it is about as large as
the margins, and let it rise (the hook of ``fastflat train`` does so over half of the run).

```python
import torch
import fastflat as ff

model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3))
margin = ff.methods.WeightMargin(model, eps=0.01, margin=0.1, norms=1e-3)
opt = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(3):
    x, y = torch.randn(16, 8), torch.randint(3, (16,))
    opt.zero_grad()
    loss, scores = margin(x, y)
    loss.backward()
    opt.step()
print(margin.certified(x, y))  # no weights within eps change these predictions
```
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fastflat import _checks
from fastflat._ops import compute_dtype
from fastflat.evaluate import weight_attack
from fastflat.evaluate._runs import undisturbed
from fastflat.functional import weight_reduce
from fastflat.methods import lab
from fastflat.methods._contract import Arm, Check, Claim, Experiment, Figure, Method, Settings
from fastflat.methods._hook import Hook
from fastflat.methods.lab.networks import MLP
from fastflat.optim import SAM, SGD

__all__ = ["METHOD", "WeightMargin"]

_NAME = "methods.WeightMargin"
_CONVOLUTIONS: dict[type, Callable[..., Tensor]] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
}
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

# What changes no more than its input does, in the largest element.
_POOLS = tuple(
    getattr(nn, f"{kind}Pool{n}d") for n in (1, 2, 3) for kind in ("Max", "Avg", "AdaptiveAvg", "AdaptiveMax")
)
_MODULES = (
    *(nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, *_POOLS),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.Softplus, nn.Hardtanh, nn.Tanh, nn.Sigmoid, nn.LogSigmoid),
)
_FUNCTIONS = {
    *(torch.relu, F.relu, F.relu6, F.hardtanh, torch.tanh, F.tanh, torch.sigmoid, F.sigmoid, torch.flatten, F.dropout),
    *(F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
    *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
}
_METHODS = {"relu", "tanh", "sigmoid", "flatten", "view", "reshape", "squeeze", "contiguous", "mean"}
_SHAPES = {"size", "dim"}


@dataclasses.dataclass(frozen=True)
class _Stage:
    """A layer with a weight, and the batch normalisation behind it."""

    name: str
    layer: nn.Module
    norm: nn.Module | None = None

    @property
    def fan_in(self) -> int:
        """Weights of a row."""
        return self.layer.weight[0].numel()


class WeightMargin:
    """The loss, and the bound, of a feed-forward network; ``margin(x, y)`` is (loss, scores).

    Args:
        model: a chain of linear and convolution layers, each perhaps with batch normalisation, of activations of slope
            at most 1 (ReLU, tanh, ...), of pooling, dropout and changes of shape; a linear layer last.
        eps: largest change of a weight.
        margin: lambda_1.
        norms: lambda_2.
        layers: names of the layers that are perturbed; all by default.

    Raises:
        TypeError, ValueError: the model is not such a chain, or an argument out of range.

    Source: Tsai et al. 2021 (arXiv 2103.02200).
    """

    def __init__(
        self,
        model: nn.Module,
        eps: float = 0.01,
        margin: float = 0.1,
        norms: float = 0.0,
        *,
        layers: Sequence[str] | None = None,
    ):
        if not isinstance(model, nn.Module):
            _checks.fail(_NAME, "model", "be a torch.nn.Module", type(model))
        for name, value in (("eps", eps), ("margin", margin), ("norms", norms)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                _checks.fail(_NAME, name, "be a finite number of at least 0", repr(value))
        self._stages = _chain(model)
        names = [stage.name for stage in self._stages]
        if layers is not None:
            unknown = [n for n in layers if n not in names]
            if isinstance(layers, str) or unknown or not layers:
                got = repr(layers) if isinstance(layers, str) or not layers else repr(unknown[0])
                _checks.fail(_NAME, "layers", f"be some of {', '.join(names)}", got)
        self._model, self.eps, self.margin, self.norms = model, float(eps), float(margin), float(norms)
        self._perturbed = [layers is None or n in layers for n in names]

    @property
    def layers(self) -> list[str]:
        """Names of the layers that are perturbed."""
        return [s.name for s, p in zip(self._stages, self._perturbed, strict=True) if p]

    def __call__(self, x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        """(loss to differentiate, scores [B, C]) in the model's mode; y are labels [B]."""
        wanted = bool(self.margin and self.eps)
        scores, bound = self._run(x, y, bounded=wanted)
        loss = F.cross_entropy(scores.to(compute_dtype(scores.dtype)), y)
        if wanted:
            loss = loss + self.margin * _lacking(scores, y, bound).relu().mean()
        if self.norms:
            loss = loss + self.norms * self.sizes()
        return loss, scores

    def sizes(self) -> Tensor:
        """``sum_k (|W_k|_inf + |W_k|_1)``, without the scales of batch normalisation."""
        found = [weight_reduce(stage.layer.weight) for stage in self._stages]
        return torch.stack([s.row_l1.amax() + s.col_l1.amax() for s in found]).sum()

    @torch.no_grad()
    def bound(self, x: Any, y: Tensor) -> Tensor:
        """eta ``[B, C]``: how much the scores' differences from that of y change at most; the network evaluating."""
        with undisturbed(self._model, evaluating=True):
            return self._run(x, y)[1]

    @torch.no_grad()
    def certified(self, x: Any, y: Tensor) -> Tensor:
        """Whether each sample ``[B]`` is taken for its label by every network within eps; the network evaluating."""
        with undisturbed(self._model, evaluating=True):
            scores, bound = self._run(x, y)
        return _lacking(scores, y, bound) < 0

    def _run(self, x: Any, y: Tensor, bounded: bool = True) -> tuple[Tensor, Tensor | None]:
        inputs: list[Tensor] = []
        handles = [
            layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
            for layer in dict.fromkeys(stage.layer for stage in self._stages)
        ]
        try:
            scores = self._model(x)
        finally:
            for handle in handles:
                handle.remove()
        if not isinstance(y, Tensor) or y.is_floating_point() or y.shape != scores.shape[:1]:
            got = f"{y.dtype} {list(y.shape)}" if isinstance(y, Tensor) else type(y)
            _checks.fail(_NAME, "y", f"be integers [B={len(scores)}]", got)
        with torch.autocast(scores.device.type, enabled=False):
            return scores, self._bound(inputs, y) if bounded else None

    def _bound(self, inputs: list[Tensor], y: Tensor) -> Tensor:
        eps = self.eps
        log_d: Tensor | None = None
        *inner, last = zip(self._stages, inputs, self._perturbed, strict=True)
        for stage, z, perturbed in inner:
            moves = perturbed and eps > 0
            rows = weight_reduce(stage.layer.weight).row_l1
            rows = rows + eps * stage.fan_in if moves else rows
            scale = _row_scale(stage, rows)
            terms = []
            if log_d is not None:
                terms.append(_log((rows * scale).amax()) + log_d)
            if moves:
                terms.append(_log(scale.amax()) + math.log(eps) + _log(_largest_field(stage.layer, z)))
            if terms:
                log_d = terms[0] if len(terms) == 1 else torch.logaddexp(*terms)
        stage, z, perturbed = last
        w = stage.layer.weight.to(compute_dtype(stage.layer.weight.dtype))
        bound = w.new_zeros(len(y), len(w))
        d = None if log_d is None else log_d.exp()[:, None]
        if d is not None:
            between = torch.cdist(w[None], w[None], p=1.0)[0][y]
            bound = (_log(between) + log_d[:, None]).exp() * (between > 0)
        if perturbed and eps > 0:
            field = _largest_field(stage.layer, z)[:, None]
            bound = bound + 2 * eps * (field if d is None else field + stage.fan_in * d)
        return bound


def _log(t: Tensor) -> Tensor:
    """The logarithm, of 0 a finite one without a gradient."""
    return t.clamp_min(torch.finfo(t.dtype).tiny).log()


def _lacking(scores: Tensor, y: Tensor, bound: Tensor) -> Tensor:
    """``max_(j != y) eta_yj - f_yj``, [B]."""
    scores = scores.to(bound.dtype)
    lacking = bound - (scores.gather(1, y[:, None]) - scores)
    return lacking.scatter(1, y[:, None], -math.inf).amax(1)


def _row_scale(stage: _Stage, rows: Tensor) -> Tensor:
    """By how much what follows a layer scales each of its rows."""
    norm = stage.norm
    if norm is None:
        return torch.ones_like(rows)
    scale = (norm.running_var.to(compute_dtype(norm.running_var.dtype)) + norm.eps).rsqrt()
    return scale if norm.weight is None else scale * norm.weight.to(compute_dtype(norm.weight.dtype)).abs()


def _largest_field(layer: nn.Module, z: Tensor) -> Tensor:
    """Of each sample the largest sum of magnitudes that an output of the layer sees, [B]."""
    size = z.to(compute_dtype(z.dtype)).abs()
    run = _CONVOLUTIONS.get(type(layer))
    if run is None:
        return size.sum(-1).flatten(1).amax(1) if size.dim() > 2 else size.sum(-1)
    groups = layer.groups
    size = size.unflatten(1, (groups, -1)).sum(2)
    ones = size.new_ones(groups, 1, *layer.kernel_size)
    return run(size, ones, None, layer.stride, layer.padding, layer.dilation, groups).flatten(1).amax(1)


# The chain -----------------------------------------------------------------------------------------------------------


def _chain(model: nn.Module) -> list[_Stage]:
    """The layers of a feed-forward network, in order."""

    def refuse(got: str) -> NoReturn:
        want = "be a chain of plain layers, activations of slope at most 1, pools and changes of shape"
        _checks.fail(_NAME, "model", want, got)

    try:
        graph = _Tracer().trace(model) if not _is_layer(model) else _alone(model)
    except Exception as error:  # whatever a model's own code raises on symbolic values
        refuse(f"one that cannot be traced: {_checks.first_line(error)}")
    modules = dict(model.named_modules())
    stages: list[_Stage] = []
    previous: fx.Node | None = None
    after_layer = False
    for node in graph.nodes:
        if node.op == "placeholder":
            if previous is not None:
                refuse(f"a second input, {node.name}")
            previous = node
            continue
        if _is_shape(node):
            continue
        if node.op == "output":
            if node.args[0] is not previous:
                refuse("more than one output")
            break
        if [n for n in node.all_input_nodes if not _is_shape(n)] != [previous]:
            refuse(f"{node.name}, which does not follow {previous.name} alone")
        previous = node
        if node.op != "call_module":
            known = _FUNCTIONS if node.op == "call_function" else _METHODS
            if node.target not in known:
                refuse(f"{getattr(node.target, '__name__', node.target)}()")
            after_layer = False
            continue
        module = modules[node.target]
        if _is_layer(module):
            if getattr(module, "padding_mode", "zeros") != "zeros":
                refuse(f"{node.target} with padding {module.padding_mode!r}")
            stages.append(_Stage(node.target, module))
            after_layer = True
        elif type(module) in _NORMS:
            if not after_layer or stages[-1].norm is not None or module.running_var is None:
                refuse(f"{node.target}, a batch norm that is not behind a layer or has no running statistics")
            stages[-1] = dataclasses.replace(stages[-1], norm=module)
        elif not _gentle(module):
            refuse(f"{node.target}, a {type(module).__name__}")
        else:
            after_layer = False
    if not stages or not after_layer or stages[-1].norm is not None or type(stages[-1].layer) is not nn.Linear:
        _checks.fail(_NAME, "model", "end in a linear layer", stages[-1].name if stages else "no layer")
    return stages


class _Tracer(fx.Tracer):
    """What has parameters of its own is one node, and judged by its type."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return super().is_leaf_module(m, module_qualified_name) or any(True for _ in m.parameters(recurse=False))


def _is_layer(module: nn.Module) -> bool:
    return type(module) is nn.Linear or type(module) in _CONVOLUTIONS


def _alone(model: nn.Module) -> fx.Graph:
    graph = fx.Graph()
    graph.output(graph.call_module("", (graph.placeholder("x"),)))
    return graph


def _is_shape(node: fx.Node) -> bool:
    """Sizes, and arithmetic of sizes."""
    if node.op == "call_method":
        return node.target in _SHAPES
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("shape", "ndim")
    arithmetic = node.op == "call_function" and getattr(node.target, "__module__", "") in ("_operator", "operator")
    return bool(arithmetic and node.all_input_nodes and all(map(_is_shape, node.all_input_nodes)))


def _gentle(module: nn.Module) -> bool:
    if type(module) not in _MODULES:
        return False
    slope = max(abs(getattr(module, "negative_slope", 0.0)), abs(getattr(module, "alpha", 0.0)))
    return slope <= 1 and getattr(module, "divisor_override", None) is None


class _Hook(Hook):
    """The loss in an ordinary loop; eps rises over the first half of the run, for at the start no margin reaches it."""

    def __init__(self, eps: float = 0.001, margin: float = 0.01, norms: float = 0.0, rise: float = 0.5):
        self._options, self._rise = (eps, margin, norms), rise

    def start(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        self._margin = WeightMargin(model, *self._options)
        self._steps = max(1, round(self._rise * steps))

    def before(self, step: int) -> None:
        self._margin.eps = self._options[0] * min(1.0, (step + 1) / self._steps)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._margin(x, y)


# Checks --------------------------------------------------------------------------------------------------------------


def _random_net(seed: int, convolutions: bool = False) -> tuple[nn.Module, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    if convolutions:
        net = nn.Sequential(
            *(nn.Conv2d(2, 4, 3, padding=1, stride=2), nn.BatchNorm2d(4), nn.ReLU()),
            *(nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)),
        )
        x = torch.randn(5, 2, 8, 8, generator=g, dtype=torch.float64)
    else:
        sizes = (6, 8, 7, 8, 3)
        net = nn.Sequential()
        for k in range(4):
            net.extend([nn.Linear(sizes[k], sizes[k + 1]), nn.ReLU()])
        net.pop(-1)
        x = torch.randn(5, 6, generator=g, dtype=torch.float64)
    net.double().eval()
    with torch.no_grad():
        for m in net:
            for p in m.parameters():
                p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) / 2)
            if isinstance(m, _NORMS):
                m.running_var.copy_(torch.rand(4, generator=g, dtype=torch.float64) + 0.5)
    return net, x, torch.randint(3, (5,), generator=g)


def _attacked(net: nn.Module, x: Tensor, y: Tensor, names: list[str], eps: float, seed: int) -> Iterator[Tensor]:
    """Scores of networks at a corner of the ball: two at random, and for each class along the sign of a gradient."""
    weights = [net.get_submodule(n).weight for n in names]
    kept = [w.detach().clone() for w in weights]
    g = torch.Generator().manual_seed(seed)
    scores = net(x)
    corners = [[torch.randn(w.shape, generator=g, dtype=w.dtype).sign() for w in weights] for _ in range(2)]
    for j in range(scores.shape[1]):
        rows = y != j
        if rows.any():
            between = (scores[:, j] - scores.gather(1, y[:, None])[:, 0])[rows]
            found = torch.autograd.grad(between[seed % len(between)], weights, retain_graph=True)
            corners += [[t.sign() for t in found], [-t.sign() for t in found]]
    for corner in corners:
        with torch.no_grad():
            for w, w0, s in zip(weights, kept, corner, strict=True):
                w.copy_(w0 + eps * s)
            yield net(x)
    with torch.no_grad():
        for w, w0 in zip(weights, kept, strict=True):
            w.copy_(w0)


def _ratios(nets: int, eps: float, *, convolutions: bool = False, together: bool = False) -> list[float]:
    """Largest change over its bound, of each network, perturbed layers and corner."""
    found = []
    for seed in range(nets):
        net, x, y = _random_net(seed, convolutions)
        names = WeightMargin(net).layers
        scores = net(x).detach()
        for chosen in [names] if together else [[n] for n in names]:
            bound = WeightMargin(net, eps, layers=chosen).bound(x, y)
            for moved in _attacked(net, x, y, chosen, eps, seed):
                change = moved - scores
                change = (change - change.gather(1, y[:, None])).abs()
                other = torch.ones_like(change, dtype=torch.bool).scatter_(1, y[:, None], False)
                found.append(float((change[other] / bound[other]).max()))
    return found


def _check() -> Iterator[Check]:
    edge = 1 + 1e-12
    each = _ratios(34, 0.05)
    yield Check(f"one layer, {len(each)} cases: violations", 0, sum(r > edge for r in each), 0, "eta_ij")
    yield Check("the largest change over its bound", 1.0, max(each), 1e-12, "attained at the last layer")
    for name, options in (("all layers", {"together": True}), ("convolutions", {"convolutions": True}),
                          ("convolutions, all", {"convolutions": True, "together": True})):  # fmt: skip
        ratios = _ratios(15, 0.02, **options)
        yield Check(f"{name}, {len(ratios)} cases: violations", 0, sum(r > edge for r in ratios), 0, "eta_ij")

    net, x, y = _random_net(0)
    first = WeightMargin(net, 0.01, layers=["0"]).bound(x, y)
    w = [net[k].weight.detach() for k in (2, 4, 6)]
    norms = w[0].abs().sum(1).max() * w[1].abs().sum(1).max()
    product = 0.01 * x.abs().sum(1, keepdim=True) * norms * (w[2][y][:, None] - w[2]).abs().sum(2)
    yield Check("first layer: error beside the product", 0.0, float((first - product).abs().max()), 1e-12, "product")
    twice = WeightMargin(net, 0.02, layers=["0"]).bound(x, y)
    yield Check("error of the bound at 2 eps", 0.0, float((twice - 2 * first).abs().max()), 1e-12, "linear in eps")
    last = WeightMargin(net, 0.01, layers=["6"]).bound(x, y)[:, 0]
    want = 0.02 * net[:6](x).detach().sum(1)
    yield Check("last layer: error of 2 eps |z|_1", 0.0, float((last - want).abs().max()), 1e-13, "2 eps |z|_1")
    zero = WeightMargin(net, 0.0, 1.0)(x, y)[0] - F.cross_entropy(net(x), y)
    yield Check("eps = 0: difference from cross-entropy", 0.0, float(zero.detach()), 0.0, "eps = 0")
    yield Check("error of the loss's gradient", 0.0, _gradient_error(), 1e-6, "central differences")


def _gradient_error() -> float:
    """Largest relative error of the gradient along random directions, against central differences."""
    net, x, y = _random_net(2)
    margin, params, step = WeightMargin(net, 0.01, 0.5, 0.1), list(net.parameters()), 1e-6
    grads = torch.autograd.grad(margin(x, y)[0], params)
    g, worst = torch.Generator().manual_seed(0), 0.0
    for _ in range(3):
        along = [torch.randn(p.shape, generator=g, dtype=p.dtype) for p in params]
        values = []
        with torch.no_grad():
            for move in (step, -2 * step):
                torch._foreach_add_(params, along, alpha=move)
                values.append(float(margin(x, y)[0]))
            torch._foreach_add_(params, along, alpha=step)
        want = (values[0] - values[1]) / (2 * step)
        got = float(sum((a * b).sum() for a, b in zip(along, grads, strict=True)))
        worst = max(worst, abs(got / want - 1))
    return worst


# Experiment ----------------------------------------------------------------------------------------------------------

_EPS = 0.001
#: Radii of the attacks on trained weights, and their steps.
_RADII, _STEPS = (0.001, 0.002, 0.005), 10

_ARMS: dict[str, Callable[[float], Hook]] = {
    "sgd": lambda strength: Hook(),
    "sam": lambda strength: Hook(),
    "norms": lambda strength: _Hook(0.0, 0.0, 3e-3 * strength),
    "margin": lambda strength: _Hook(_EPS, 0.01 * strength),
    "both": lambda strength: _Hook(_EPS, 0.01 * strength, 3e-3 * strength),
}


def _train(name: str, seed: int, settings: Settings) -> dict[str, float]:
    parts = lab.images(settings.images, settings.test_images)
    strength = 0.0 if name == "sgd" else settings.choice["strength"]
    common = {"lr": settings.choice["lr"], "momentum": 0.9, "weight_decay": 5e-4}

    def make(model: nn.Module) -> torch.optim.Optimizer:
        if name == "sam":
            return SAM(model, rho=_EPS * strength, metric="linf", **common)
        return SGD(model.parameters(), **common)

    net = functools.partial(MLP, 1, 28, parts.classes)
    done = lab.fit(net, make, parts.train, settings.steps, seed, batch=settings.batch, hook=_ARMS[name](strength))
    found = lab.measure(done, parts)
    model = done.model.eval()
    for eps in _RADII:
        with weight_attack(model, F.cross_entropy, parts.batches("test"), eps, _STEPS):
            found[f"attacked_{eps}"] = lab.loss_accuracy(model, parts.batches("test"))[1]
    with weight_attack(model, F.cross_entropy, parts.batches("validation"), _RADII[1], _STEPS):
        found["validation_attacked"] = lab.loss_accuracy(model, parts.batches("validation"))[1]
    found["certified"] = float(WeightMargin(model, _EPS / 10).certified(*parts.test).double().mean())
    return found


def _arm(name: str, passes: float = 1) -> Arm:
    return Arm(name, lambda seed, settings: _train(name, seed, settings), passes)


METHOD = Method(
    name="weight_margin",
    number=18,
    title="Formalizing Generalization and Adversarial Robustness of Neural Networks to Weight Perturbations",
    authors="Tsai, Hsu, Yu, Chen",
    year=2021,
    arxiv="2103.02200",
    claim=(
        "A loss that asks for margins beyond what perturbed weights can take away gives networks that bear attacks on"
        " their weights at little cost of accuracy; tested by projected sign gradients on all weights at once."
    ),
    kernels=("weight_norms",),
    check=_check,
    recipe={"model": "mlp", "quantizer": "none"},
    hook=_Hook,
    experiment=Experiment(
        summary=(
            "Fashion-MNIST, a network of two hidden layers; SGD, SAM of the same ball, the penalty of norms, the"
            " margin, and both, attacked in the weights after training."
        ),
        arms=(_arm("sgd"), _arm("sam", 2), _arm("norms"), _arm("margin"), _arm("both")),
        claims=(
            *(Claim(f"attacked_{eps}", "margin", "sgd") for eps in _RADII),
            Claim(f"attacked_{_RADII[1]}", "margin", "norms"),
            Claim(f"attacked_{_RADII[1]}", "margin", "sam"),
            Claim("certified", "margin", "sgd"),
            Claim("test_accuracy", "margin", "sgd", margin=-0.02),
        ),
        full=Settings(passes=1500, seeds=3, images=6000, test_images=2000),
        quick=Settings(passes=60, seeds=1, images=640, test_images=400, tune=False),
        # All arms choose by the accuracy under attack, on validation images.
        grid={"lr": (0.05, 0.02), "strength": (1.0, 3.0)},
        tuned_on="validation_attacked",
        tried=(
            "Attacks of 0.001 on the weights cost all arms next to nothing; the margin's gain over SGD grows with"
            " the attack, to 9 points at 0.005, as does that over SAM, to 2."
        ),
        figure=Figure(
            "lines",
            ("test_accuracy", *(f"attacked_{eps}" for eps in _RADII)),
            ("0", *map(str, _RADII)),
            "largest change of a weight",
            "test accuracy",
        ),
    ),
)

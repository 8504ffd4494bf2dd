# SPDX-License-Identifier: Apache-2.0
"""Data of the tests of the row_tangents family, and how its results are compared. Imported by tests of several
folders."""

from __future__ import annotations

import torch
from torch import Tensor

from fastflat._ops import compute_dtype

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
#: K, R, D: nothing, one element, rows around registers and blocks, more rows than a tile.
SHAPES = ((0, 2, 3), (1, 0, 3), (2, 3, 0), (1, 1, 1), (3, 5, 7), (8, 33, 10), (17, 2, 33), (3, 70, 64), (2, 3, 257))
OPS = ("row_tangents_norm", "row_tangents_norm_bwd", "row_tangents_softmax", "row_tangents_softmax_bwd")
#: Of the magnitudes of the terms.
_TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-6, torch.float16: 1e-6}


class Problem:
    """Arguments of every op for one shape; `special` puts a NaN, an infinity and zeros of both signs among them."""

    def __init__(self, shape, dtype: torch.dtype, seed: int = 0, special: bool = False) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.shape, self.dtype, self.compute = tuple(shape), dtype, compute_dtype(dtype)
        k, r, d = self.shape
        self.x, self.g, self.t = (self.draw(k, r, d) for _ in range(3))
        self.normal, self.grad = self.draw(r, d), self.draw(r, d)
        self.weight, self.along_weight, self.along_bias = self.draw(d), self.draw(k, d), self.draw(k, d)
        self.mean, self.scale = self.draw(k, r).to(self.compute), self.draw(k, r).to(self.compute)
        self.inv = self.draw(r).abs().add(0.5).to(self.compute)
        self.of_row = self.draw(r).to(self.compute)
        self.log = torch.log_softmax(self.draw(r, d).double() * 3, 1).to(dtype)
        self.p = self.log.double().exp().to(dtype)
        if special and self.x.numel():
            for tensor in (self.x, self.g, self.t):
                flat = tensor.view(-1)
                for value in (0.0, -0.0, float("nan"), float("inf"), float("-inf")):
                    flat[self.place(flat)] = value
            self.log.view(-1)[self.place(self.log)] = float("-inf")
            self.of_row[0] = 0.0

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def place(self, t: Tensor) -> int:
        return int(torch.randint(t.numel(), (), generator=self.generator))

    def calls(self, op: str, every: bool = True):
        """Arguments, with every choice of what may be absent or only the two that hold most and least."""
        for arguments, choices in self._calls(op):
            numbers = range(2 ** len(choices)) if every else (2 ** len(choices) - 1, 1)
            for number in numbers:
                left = {i for bit, i in enumerate(choices) if not number >> bit & 1}
                call = tuple(None if i in left else a for i, a in enumerate(arguments))
                if any(call[i] is not None for i in _NEEDED[op]):
                    yield call

    def _calls(self, op: str):
        if op == "row_tangents_norm":
            tensors = (self.x, self.normal, self.inv, self.weight, self.along_weight, self.along_bias)
            yield from (((*tensors, centered), (0, 3, 4, 5)) for centered in (True, False))
        elif op == "row_tangents_norm_bwd":
            tensors = (self.g, self.x, self.mean, self.scale, self.along_weight, self.normal, self.grad, self.inv)
            yield from (((*tensors, self.weight, centered), (0, 1, 2, 3, 4, 8)) for centered in (True, False))
        elif op == "row_tangents_softmax":
            yield (self.t, self.p, self.of_row, False), (2,)
            yield (self.t, self.log, self.of_row, True), (2,)
        else:
            yield (self.g, self.x, self.p, self.grad), (0, 1)


_NEEDED = {
    "row_tangents_norm": (0, 4, 5), "row_tangents_norm_bwd": (0, 1, 2, 3, 4), "row_tangents_softmax": (0,),
    "row_tangents_softmax_bwd": (0, 1),
}  # fmt: skip


def _mean(t: Tensor) -> Tensor:
    return t.sum(-1, keepdim=True) / max(t.shape[-1], 1)


def _magnitudes(*arguments) -> list:
    """In fp64, finite."""
    return [
        a.double().abs().nan_to_num(0.0, 0.0, 0.0) if isinstance(a, Tensor) else 0.0 if a is None else a
        for a in arguments
    ]


def terms(op: str, arguments: tuple) -> tuple[Tensor, ...]:
    """Sums of the magnitudes of the terms of each result."""
    if op == "row_tangents_norm":
        x, n, inv, w, along, bias, _ = _magnitudes(*arguments)
        w = 1.0 if arguments[3] is None else w
        if arguments[0] is None:
            x = torch.zeros((), dtype=torch.float64)
            m = s = x
        else:
            m, s = _mean(x), _mean(x * n)
        rows = [a if isinstance(a, float) else a[:, None] for a in (along, bias)]
        out = (x + m + n * s) * inv[:, None] * w + n * rows[0] + rows[1]
        statistics = [t if t.dim() == 0 else t.squeeze(-1) for t in (m, s * inv[:, None] ** 2)]
        return out, *statistics
    if op == "row_tangents_norm_bwd":
        g, x, mean, scale, along, n, grad, inv, w, _ = _magnitudes(*arguments)
        mean, scale, inv = (t if isinstance(t, float) else t[..., None] for t in (mean, scale, inv))
        w = 1.0 if arguments[8] is None else w
        h = grad * w
        a, b = _mean(h), _mean(h * n)
        moved = (x + mean) * inv + n * (scale / inv)
        rh = g * w + grad * (along if isinstance(along, float) else along[:, None])
        return ((rh + _mean(rh) + n * (_mean(rh * n) + _mean(moved * h)) + moved * b) * inv + (h + a + n * b) * scale,)
    if op == "row_tangents_softmax":
        t, p, scale, log = _magnitudes(*arguments)
        q = arguments[1].double().exp() if log else p
        scale = 1.0 if arguments[2] is None else scale[:, None]
        return (scale * q * (t + (t * q).sum(-1, keepdim=True)),)
    g, along, p, grad = _magnitudes(*arguments)
    zero = torch.zeros((), dtype=torch.float64)
    g, along = (zero if isinstance(t, float) else t for t in (g, along))

    def total(t):
        return t.sum(-1, keepdim=True)

    return (along * (grad + total(grad * p)) + p * total(along * grad) + p * (g + total(g * p)),)


def assert_close(got: Tensor, want: Tensor, magnitude: Tensor, dtype: torch.dtype) -> None:
    """Within the tolerance of the family and one rounding to the dtype; what is not finite is so in both."""
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert got.is_contiguous()
    assert want.is_contiguous()
    finite = want.isfinite()
    assert torch.equal(got.isfinite(), finite)
    got, want = got.double(), want.double()
    allowed = _TOLERANCE[dtype] * magnitude.expand_as(want)
    if dtype.itemsize == 2:
        info = torch.finfo(dtype)
        allowed = allowed + info.eps * want.abs() + info.tiny * info.eps
    wrong = (got - want).abs()[finite] > allowed[finite]
    assert not wrong.any(), ((got - want).abs() / allowed)[finite].max()


def as_tuple(result) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def check(op: str, call, reference, shape, dtype: torch.dtype, special: bool = False, every: bool = True) -> None:
    problem = Problem(shape, dtype, special=special)
    for arguments in problem.calls(op, every):
        got, want = as_tuple(call(*arguments)), as_tuple(reference(*arguments))
        for a, b, magnitude in zip(got, want, terms(op, arguments), strict=True):
            assert_close(a, b, magnitude, dtype if a.dim() == 3 else compute_dtype(dtype))


def _changed(op: str, **change):
    """A call of right arguments but for what `change` replaces, by position."""

    def arguments():
        call = list(next(iter(Problem((2, 3, 4), torch.float32).calls(op, every=False))))
        for at, value in change.items():
            call[int(at[1:])] = value
        return tuple(call)

    return arguments


_NORM, _BACKWARD, _SOFTMAX, _SOFTMAX_BACKWARD = OPS
_MUST = "must have shape"
#: Calls that would read or write what is not theirs: op, arguments, words of the error.
REFUSED = (
    (_NORM, _changed(_NORM, _1=torch.ones(4)), "normal must have two axes [R, D]"),
    (_NORM, _changed(_NORM, _1=torch.ones(4, 3).t()), "normal must be contiguous; call .contiguous()"),
    (_NORM, _changed(_NORM, _1=torch.ones(3, 4).int()), "normal must be float32, bfloat16, float16 or float64"),
    (_NORM, _changed(_NORM, _0=torch.ones(2, 3, 5)), f"x {_MUST} [2, 3, 4], got [2, 3, 5]"),
    (_NORM, _changed(_NORM, _0=torch.ones(2, 3, 4).half()), "x must have the dtype of normal"),
    (_NORM, _changed(_NORM, _2=torch.ones(4)), f"inv {_MUST} [3], got [4]"),
    (_NORM, _changed(_NORM, _3=torch.ones(3)), f"weight {_MUST} [4], got [3]"),
    (_NORM, _changed(_NORM, _4=torch.ones(3, 4)), f"along_weight {_MUST} [2, 4], got [3, 4]"),
    (_NORM, _changed(_NORM, _0=None, _4=None, _5=None), "x, along_weight, along_bias must not all be None"),
    (_BACKWARD, _changed(_BACKWARD, _1=torch.ones(3, 3, 4)), f"x {_MUST} [2, 3, 4], got [3, 3, 4]"),
    (_BACKWARD, _changed(_BACKWARD, _2=torch.ones(2, 4)), f"mean {_MUST} [2, 3], got [2, 4]"),
    (_BACKWARD, _changed(_BACKWARD, _3=torch.ones(3, 2).t()), "scale must be contiguous; call .contiguous()"),
    (_BACKWARD, _changed(_BACKWARD, _6=torch.ones(3, 5)), f"grad {_MUST} [3, 4], got [3, 5]"),
    (_SOFTMAX, _changed(_SOFTMAX, _0=torch.ones(())), f"t {_MUST}"),
    (_SOFTMAX, _changed(_SOFTMAX, _2=torch.ones(3, 1)), f"scale {_MUST} [3], got [3, 1]"),
    (_SOFTMAX_BACKWARD, _changed(_SOFTMAX_BACKWARD, _0=None, _1=None), "g, along must not all be None"),
    (_SOFTMAX_BACKWARD, _changed(_SOFTMAX_BACKWARD, _1=torch.ones(2, 4)), f"along {_MUST} [2, 3, 4], got [2, 4]"),
)

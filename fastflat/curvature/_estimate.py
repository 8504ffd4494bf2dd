# SPDX-License-Identifier: Apache-2.0
"""What the estimators share: the operator they see, the estimate they return, their checks and their progress bar."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor


class Operator(Protocol):
    """A symmetric matrix H [n, n] that is known by its products.

    An operator may also offer ``block_matmat(name, V)``: [K, n_b] to [K, n_b], the product with the diagonal block of
    ``name`` alone, and ``rowwise = True`` where row k of V meets a matrix of its own, so that rows keep their places.
    """

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def blocks(self) -> Mapping[str, slice]:
        """Where the parameters lie in a vector, by name."""
        ...

    def matmat(self, V: Tensor) -> Tensor:
        """``H v`` for each row v of V [K, n]."""
        ...


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Estimate:
    """A number or a tensor with its uncertainty and its price.

    Attributes:
        value: the estimate.
        stderr: its standard error, of the shape of ``value``; for eigenvalues and solutions, which are not random, a
            residual norm.
        products: matrix-vector products that it took.
        converged: whether the accuracy asked for was reached within the products allowed.
    """

    value: float | Tensor
    stderr: float | Tensor
    products: int
    converged: bool

    def __repr__(self) -> str:
        state = "converged" if self.converged else "not converged"
        return f"{_shown(self.value, self.stderr)} ({self.products} products, {state})"


def _shown(value: float | Tensor, stderr: float | Tensor) -> str:
    values, errors = (torch.as_tensor(x, dtype=torch.float64) for x in (value, stderr))
    if values.numel() == 1:
        return _with_error(float(values), float(errors))
    if values.dim() == 1 and values.numel() <= 16:
        return "[" + ", ".join(map(_with_error, values.tolist(), errors.tolist())) + "]"
    return f"tensor of shape {list(values.shape)}"


def _with_error(value: float, stderr: float) -> str:
    """``1.23 +- 0.04``: the error with one digit, two if the first is 1, and the value to the same place."""
    if not (math.isfinite(value) and math.isfinite(stderr)) or stderr <= 0:
        return f"{value:.6g} +- {stderr:.2g}"
    place = math.floor(math.log10(stderr))
    place -= stderr < 2 * 10.0**place
    exponent = math.floor(math.log10(max(abs(value), stderr)))
    if exponent - place > 6:
        return f"{value:.7g} +- {stderr:.0e}"
    if not -4 <= exponent < 6:
        digits = exponent - place
        return f"({value / 10.0**exponent:.{digits}f} +- {stderr / 10.0**exponent:.{digits}f})e{exponent:+03d}"
    digits = max(-place, 0)
    return f"{value:.{digits}f} +- {stderr:.{digits}f}"


class Moments:
    """Mean and standard error over samples [...] that come in batches [K, ...], in fp64.

    Sums are kept about the first sample: samples that are equal have an error of exactly zero.
    """

    def __init__(self) -> None:
        self.count = 0
        self._origin = self._sum = self._squares = None

    def add(self, samples: Tensor) -> None:
        if self._origin is None:
            self._origin = samples[0].double()
            self._sum, self._squares = torch.zeros_like(self._origin), torch.zeros_like(self._origin)
        for sample in samples:
            deviation = sample.double() - self._origin
            self._sum += deviation
            self._squares.addcmul_(deviation, deviation)
        self.count += len(samples)

    def mean(self) -> Tensor:
        return self._origin + self._sum / self.count

    def stderr(self) -> Tensor:
        """``sqrt(sum (x - mean)^2 / (N (N - 1)))``; infinite for one sample."""
        if self.count < 2:
            return torch.full_like(self._sum, torch.inf)
        spread = (self._squares - self._sum * self._sum / self.count).clamp_(min=0)
        return (spread / (self.count * (self.count - 1))).sqrt()


def fail(function: str, argument: str, want: str, got: object) -> None:
    """Raise the one-line error of the house: function, argument, want, got."""
    kind = TypeError if isinstance(got, type) else ValueError
    got = got.__name__ if isinstance(got, type) else got
    raise kind(f"fastflat.curvature.{function}: {argument} must {want}, got {got}")


def number(function: str, argument: str, value: object, *, zero: bool = False, negative: bool = False) -> float:
    """A finite number above 0, or at least 0 where zero is allowed, or any where negative ones are."""
    want = "be a finite number" if negative else "be a number of at least 0" if zero else "be a number above 0"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        fail(function, argument, want, type(value))
    if not (math.isfinite(value) and (negative or value > 0 or (zero and value == 0))):
        fail(function, argument, want, value)
    return float(value)


def count(function: str, argument: str, value: object, least: int = 1, most: int | None = None) -> int:
    """A whole number in [least, most]."""
    want = f"be a whole number of at least {least}" if most is None else f"be a whole number from {least} to {most}"
    if isinstance(value, bool) or not isinstance(value, int):
        fail(function, argument, want, type(value))
    if value < least or (most is not None and value > most):
        fail(function, argument, want, value)
    return value


def one_of(function: str, argument: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        fail(function, argument, "be " + ", ".join(map(repr, allowed[:-1])) + f" or {allowed[-1]!r}", repr(value))


def dimension(function: str, op: Operator, generator: torch.Generator | None = None) -> int:
    """The n of an operator that is square, and whose device the generator is for."""
    rows, columns = op.shape
    if rows != columns:
        fail(function, "op", "be square", f"shape {[rows, columns]}")
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            fail(function, "generator", "be a torch.Generator", type(generator))
        if generator.device.type != op.device.type:
            fail(function, "generator", f"be on the device of the operator ({op.device})", generator.device)
    return rows


def working_dtype(op: Operator) -> torch.dtype:
    """The type of the vectors around the products: float64 for a float64 operator, else float32."""
    return torch.float64 if op.dtype == torch.float64 else torch.float32


def product(function: str, op: Operator, V: Tensor, block: str | None = None) -> Tensor:
    """``H v`` for each row of V [K, n], or ``H_bb v`` with the diagonal block of that name, in the type of V. It may be
    V itself or memory that the operator keeps: not to be written to."""
    HV = op.matmat(V.to(op.dtype)) if block is None else op.block_matmat(block, V.to(op.dtype))
    HV = HV.detach()
    if HV.shape != V.shape:
        method = "op.matmat" if block is None else "op.block_matmat"
        fail(function, method, f"return shape {list(V.shape)}", list(HV.shape))
    return HV.to(V.dtype)


def check_finite(function: str, values: Tensor) -> None:
    """An error where products made these values NaN or infinite. Synchronises with the device."""
    if not bool(torch.isfinite(values).all()):
        bad = "NaN" if bool(torch.isnan(values).any()) else "infinity"
        raise FloatingPointError(
            f"fastflat.curvature.{function}: a product with the operator holds {bad}; "
            "look for it in the loss, its gradient, the parameters and the data"
        )


def check_symmetric(function: str, gap: float, op: Operator) -> None:
    """A warning where ``|u^T H v - v^T H u|`` over unit vectors, relative to |H|, is more than rounding explains."""
    if gap > max(0.01, 20 * torch.finfo(op.dtype).eps):
        warnings.warn(
            f"fastflat.curvature.{function}: u^T H v and v^T H u differ by {100 * gap:.0f} % of |H|: the operator is "
            "not symmetric, or not the same in each product (dropout, moving statistics, resampled data)",
            RuntimeWarning,
            stacklevel=3,
        )


class Bar:
    """A progress bar of tqdm, or nothing. ``update(products, text)`` after each chunk."""

    def __init__(self, function: str, total: int, wanted: bool) -> None:
        self._bar = None
        if wanted:
            try:
                from tqdm import tqdm
            except ModuleNotFoundError:
                raise ModuleNotFoundError(
                    f"fastflat.curvature.{function}: progress=True needs tqdm: pip install tqdm"
                ) from None
            self._bar = tqdm(total=total, desc=function, unit="product", leave=False)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, products: int, value: object = None, stderr: object = None) -> None:
        if self._bar is not None:
            if value is not None:
                self._bar.set_postfix_str(_shown(value, stderr), refresh=False)
            self._bar.update(products)

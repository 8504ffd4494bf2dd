# SPDX-License-Identifier: Apache-2.0
"""Linear systems in a Krylov space, for several right-hand sides at once: MINRES and conjugate gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from fastflat.curvature import _estimate, _vectors
from fastflat.curvature._estimate import Bar, Estimate, Operator, product

#: Times that a solution is begun anew from its true residual, where the recurrence had promised a smaller one.
_ROUNDS = 4


def solve(
    op: Operator,
    B: Tensor,
    damping: float = 0.0,
    tol: float = 1e-3,
    *,
    max_products: int = 1000,
    method: str = "minres",
    progress: bool = False,
) -> Estimate:
    """x with ``|b - (H + damping I) x| <= tol |b|`` for each row b of B: Krylov least squares.

    Args:
        op: a symmetric operator [n, n]. Where its ``rowwise`` is true, row k meets a matrix of its own.
        B: right-hand sides [K, n] or [n].
        damping: added to the diagonal.
        tol: bound of the relative residual. Rows that are there take no further products.
        max_products: for all right-hand sides together; a row that is not there then has ``converged=False``.
        method: ``"minres"`` minimises ``|b - (H + damping I) x|`` over the Krylov space for any symmetric operator; for
            a singular one it ends at the least-squares solution or near it. ``"cg"`` wants a positive definite one
            and stops a row where it meets a direction of no positive curvature.
        progress: show a bar (tqdm).

    Returns:
        The solutions, of the shape of B in the working type, with ``stderr`` the norms of their true residuals [K] or
        [], computed by one more product for each row, and ``converged`` for all rows.

    Raises:
        ValueError, TypeError: arguments out of range; B is not finite.
        FloatingPointError: a product holds NaN or infinity.

    Source: Paige and Saunders, SIAM J. of Numerical Analysis 12 (1975); Hestenes and Stiefel, J. Res. NBS 49 (1952).
    """
    n = _estimate.dimension("solve", op)
    damping = _estimate.number("solve", "damping", damping, negative=True)
    tol = _estimate.number("solve", "tol", tol)
    _estimate.count("solve", "max_products", max_products)
    _estimate.one_of("solve", "method", method, ("minres", "cg"))
    if not isinstance(B, Tensor):
        _estimate.fail("solve", "B", "be a tensor", type(B))
    if B.dim() not in (1, 2) or B.shape[-1] != n:
        _estimate.fail("solve", "B", f"have shape [K, {n}] or [{n}]", list(B.shape))
    if not bool(torch.isfinite(B).all()):
        _estimate.fail("solve", "B", "be finite", "NaN or infinity")
    rows = B.detach().to(op.device, _estimate.working_dtype(op)).reshape(B.shape if B.dim() == 2 else (1, n))
    with Bar("solve", max_products, progress) as bar:
        run = _Run(op, len(rows), damping, max_products, bar)
        X, residual, converged = run.refine(rows, tol, _minres if method == "minres" else _cg)
    return Estimate(X.reshape(B.shape), residual.reshape(B.shape[:-1]), run.spent, converged)


class _Run:
    """The shifted operator, and the products that may still be taken."""

    def __init__(self, op: Operator, K: int, damping: float, limit: int, bar: Bar) -> None:
        self.op, self.K, self.damping, self.limit, self.bar = op, K, damping, limit, bar
        self.rowwise = bool(getattr(op, "rowwise", False))
        self.spent = self.reserved = 0

    def product(self, V: Tensor, rows: Tensor) -> Tensor:
        """``(H + damping I) v`` for vectors that belong to these right-hand sides."""
        self.spent += len(V)
        self.bar.update(len(V))
        if self.rowwise:
            whole = V.new_zeros(self.K, V.shape[1])
            whole[rows] = V
            HV = product("solve", self.op, whole)[rows]
        else:
            HV = product("solve", self.op, V)
        return torch.add(HV, V, alpha=self.damping)

    def allows(self, products: int) -> bool:
        return self.spent + products + self.reserved <= self.limit

    def refine(self, B: Tensor, tol: float, method) -> tuple[Tensor, Tensor, bool]:
        """Solve, compute the true residuals, and go on from them where they are larger than promised."""
        X, R = torch.zeros_like(B), B.clone()
        residual = _norm(B)
        goal = tol * residual
        for _ in range(_ROUNDS):
            rows = torch.nonzero(residual > goal).flatten()
            self.reserved = len(rows)
            if not len(rows) or not self.allows(len(rows)):
                break
            tried = X[rows] + method(self, R[rows], goal[rows], rows)
            self.reserved = 0
            left = B[rows] - self.product(tried, rows)
            found = _norm(left)
            better = found < residual[rows]
            if not bool(better.any()):
                break
            X[rows[better]], R[rows[better]], residual[rows[better]] = tried[better], left[better], found[better]
        return X, residual, bool((residual <= goal).all())


def _dot(V: Tensor, W: Tensor) -> Tensor:
    """Inner products of rows, float64 [K] on the host, where a row's stop is decided."""
    found = _vectors.quadratic_forms(V, W, [slice(None)])[:, 0].cpu()
    _estimate.check_finite("solve", found)
    return found


def _norm(V: Tensor) -> Tensor:
    return _dot(V, V).sqrt()


def _column(c: Tensor, like: Tensor) -> Tensor:
    return c.to(like.device, like.dtype)[:, None]


class _Open:
    """Tensors with one row, or one number on the host, for each right-hand side that is still open."""

    def __init__(self, K: int, vectors: list[Tensor], scalars: list[Tensor]) -> None:
        self.rows, self.vectors, self.scalars = torch.arange(K), vectors, scalars

    def keep(self, open_: Tensor) -> None:
        if not bool(open_.all()):
            self.rows = self.rows[open_]
            self.vectors = [v[open_.to(v.device)] for v in self.vectors]
            self.scalars = [s[open_] for s in self.scalars]


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b == 0, 0.0, a / torch.where(b == 0, 1.0, b))


def _minres(run: _Run, R: Tensor, goal: Tensor, places: Tensor) -> Tensor:
    """The correction that minimises the residual over the Krylov space, by the Lanczos recurrence and rotations.

    With beta v the Lanczos vectors, c and s the rotations that make T upper triangular, and eta the residual: each step
    rotates the new column of T, takes one direction d from it and moves by ``c eta d``.
    """
    X = torch.zeros_like(R)
    eta = _norm(R)
    zero, one = torch.zeros_like(eta), torch.ones_like(eta)
    V = R * _column(_ratio(one, eta), R)
    # Lanczos vectors and directions, now and before; beta, eta, the rotations now and before, the goal, |H r| / |r|.
    scalars = [zero, eta, one, zero, one, zero, goal, one / 0]
    state = _Open(len(R), [V, *(torch.zeros_like(R) for _ in range(3))], scalars)
    state.keep(eta > goal)
    eps, largest = torch.finfo(R.dtype).eps, 0.0
    while len(state.rows) and run.allows(len(state.rows)):
        V, V_before, D, D_before = state.vectors
        beta, eta, c, s, c_before, s_before, goal, flattest = state.scalars
        W = run.product(V, places[state.rows])
        W.sub_(V_before * _column(beta, V))
        alpha = _dot(V, W)
        W.sub_(V * _column(alpha, V))
        beta_new = _norm(W)
        largest = max(largest, float(alpha.abs().max()), float(beta_new.max()))
        # At this size the next vector is rounding errors: the Krylov space is complete.
        beta_new = torch.where(beta_new <= eps * largest, 0.0, beta_new)
        delta = c * alpha - c_before * s * beta
        rho = torch.hypot(delta, beta_new)
        # |H r| / |r| of the residual before this step. It falls to about sqrt(eps) |H| where r becomes normal to the
        # range of H, at the least-squares solution of a singular system; then rounding errors take over and grow.
        slope = torch.hypot(delta, c * beta_new)
        flattest = torch.minimum(flattest, slope)
        least = (flattest <= eps**0.5 * largest) & (slope > 3 * flattest) | (slope <= eps * largest)
        D_new = V - D * _column(s * alpha + c_before * c * beta, V) - D_before * _column(s_before * beta, V)
        D_new *= _column(torch.where(least, 0.0, _ratio(one[: len(rho)], rho)), V)
        c_new, s_new = torch.where(least, 0.0, _ratio(delta, rho)), torch.where(least, 1.0, _ratio(beta_new, rho))
        X[state.rows] += D_new * _column(c_new * eta, V)
        W *= _column(_ratio(one[: len(rho)], beta_new), W)
        eta = -s_new * eta
        state.vectors, state.scalars = [W, V, D_new, D], [beta_new, eta, c_new, s_new, c, s, goal, flattest]
        state.keep((eta.abs() > goal) & (beta_new > 0) & ~least)
    return X


def _cg(run: _Run, R: Tensor, goal: Tensor, places: Tensor) -> Tensor:
    """The correction that minimises the energy norm of the error over the Krylov space."""
    X = torch.zeros_like(R)
    square = _dot(R, R)
    state = _Open(len(R), [R, R], [square, goal])
    state.keep(square.sqrt() > goal)
    eps = torch.finfo(R.dtype).eps
    while len(state.rows) and run.allows(len(state.rows)):
        R, P = state.vectors
        square, goal = state.scalars
        HP = run.product(P, places[state.rows])
        curvature = _dot(P, HP)
        positive = curvature > eps * _norm(P) * _norm(HP)
        step = torch.where(positive, _ratio(square, curvature), 0.0)
        X[state.rows] += P * _column(step, P)
        R = R - HP * _column(step, R)
        square_new = _dot(R, R)
        P = R + P * _column(_ratio(square_new, square), P)
        state.vectors, state.scalars = [R, P], [square_new, goal]
        state.keep((square_new.sqrt() > goal) & positive)
    return X

# SPDX-License-Identifier: Apache-2.0
"""Traces and diagonals from random probes: of the whole operator, of its blocks, with and without a sketch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastflat.curvature import _estimate, _sketch, _vectors
from fastflat.curvature._estimate import Bar, Estimate, Operator
from fastflat.curvature._probes import LEAST, Probes
from fastflat.curvature._program import Untraceable


def trace(
    op: Operator,
    rtol: float = 0.05,
    max_products: int | None = None,
    chunk: int = 8,
    method: str = "auto",
    *,
    atol: float = 0.0,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Estimate:
    """``tr H`` from products with random signs.

    Args:
        op: a symmetric operator [n, n].
        rtol: stop when the standard error is no more than ``rtol |value|``, and not before 16 probes and two chunks, 8
            probes with ``"xtrace"``.
        max_products: stop there anyway, with ``converged=False``. 1000, or 96 with a sketch, where None.
        chunk: vectors in one product.
        method: ``"hutchinson"``, the mean of ``v^T H v``, exact on diagonal matrices. ``"jets"``: the same mean from
            the forward pass alone, at about half the price: two probes share a second-order tangent; of operators that
            have ``mean_forms``. ``"auto"``: ``"jets"`` where every operation has a second derivative, else
            ``"hutchinson"``. ``"hutch++"``: the trace on the
            range of a third of the products, exactly, and Hutchinson's mean of the rest; exact where the rank of H is
            no more than that third. ``"xtrace"``: the same with every probe in both roles; exact where the rank is
            less than half of the products. Both keep as many vectors as the sketch has, twice for ``"xtrace"``, and
            pay when eigenvalues fall off fast.
        atol: a standard error that is small enough whatever the value.
        generator: of the probes, on the device of the operator; the global one if None.
        progress: show a bar (tqdm).

    Returns:
        Value and standard error as floats. Exact, with an error of 0, where n is at most 16 and ``max_products``.

    Raises:
        ValueError, TypeError: arguments out of range.
        FloatingPointError: a product holds NaN or infinity.

    Source: Hutchinson, Communications in Statistics 19 (1990); Meyer, Musco, Musco and Woodruff, Hutch++, SOSA 2021,
    algorithm 1; Epperly, Tropp and Webber, XTrace, SIAM J. Matrix Anal. Appl. 45 (2024), section 2.
    """
    n = _estimate.dimension("trace", op, generator)
    _estimate.one_of("trace", "method", method, tuple(_METHODS))
    least, limit = (4, 96) if method in ("hutch++", "xtrace") else (1, 1000)
    limit = _estimate.count("trace", "max_products", limit if max_products is None else max_products, least)
    run = Probes("trace", op, rtol, atol, limit, chunk, generator)
    with Bar("trace", limit, progress) as run.bar:
        if n <= min(LEAST, limit):
            return Estimate(float(run.exact_diagonal(n).sum()), 0.0, n, True)
        return _number(_METHODS[method](run))


def layer_traces(
    op: Operator,
    rtol: float = 0.1,
    max_products: int = 1000,
    chunk: int = 8,
    *,
    atol: float = 0.0,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> dict[str, Estimate]:
    """``tr H_bb`` of each diagonal block of an operator, by the name of its parameter.

    Probes have random signs everywhere and give ``v_b^T (H v)_b`` of all blocks at once. Where the operator has
    ``block_matmat``, each block gets probes of its own instead: they cost less and have no variance from other blocks.

    Args:
        op: a symmetric operator with ``blocks``.
        rtol: stop when each standard error is no more than ``rtol |value|``, and not before 16 probes and two chunks.
        max_products: stop there anyway, with ``converged=False`` for those that are not there. With ``block_matmat``
            the limit is for each block.
        chunk, generator, progress: as for :func:`trace`.
        atol: a standard error that is small enough whatever the value. A block whose trace is nearly zero needs it.

    Returns:
        The names in the order of ``op.blocks``. Exact for an own block of at most 16 entries.

    Raises:
        ValueError, TypeError: arguments out of range.
        FloatingPointError: a product holds NaN or infinity.

    Source: Dong et al., HAWQ-V2, NeurIPS 2020, section 3, with a standard error.
    """
    n = _estimate.dimension("layer_traces", op, generator)
    limit = _estimate.count("layer_traces", "max_products", max_products, 1)
    run = Probes("layer_traces", op, rtol, atol, limit, chunk, generator)
    blocks = dict(op.blocks)
    own = getattr(op, "block_matmat", None)
    with Bar("layer_traces", limit * (len(blocks) if own else 1), progress) as run.bar:
        if own is not None:
            return {name: _own_block(run, name, len(range(*s.indices(n)))) for name, s in blocks.items()}
        slices = list(blocks.values())
        found = run.average(n, lambda V: _vectors.quadratic_forms(V, run.product(V), slices))
    return {name: _number(found, t) for t, name in enumerate(blocks)}


def diagonal(
    op: Operator,
    rtol: float = 0.1,
    max_products: int = 1000,
    chunk: int = 8,
    *,
    atol: float = 0.0,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Estimate:
    """The diagonal of H [n]: ``sum_k v_k * H v_k / sum_k v_k * v_k`` over random signs, exact for diagonal H.

    Args:
        op: a symmetric operator [n, n].
        rtol: stop when ``|stderr| <= rtol |value|`` in the 2-norm over the entries. The error falls as one over the
            root of the products, and what it starts from is the weight beside the diagonal.
        atol: a norm of the standard errors that is small enough whatever the value.
        max_products, chunk, generator, progress: as for :func:`trace`.

    Returns:
        Value and standard error of each entry, [n] in float64 on the device of the operator.

    Raises:
        ValueError, TypeError: arguments out of range.
        FloatingPointError: a product holds NaN or infinity.

    Source: Bekas, Kokiopoulou and Saad, Applied Numerical Mathematics 57 (2007), equation 2.
    """
    n = _estimate.dimension("diagonal", op, generator)
    limit = _estimate.count("diagonal", "max_products", max_products, 1)
    run = Probes("diagonal", op, rtol, atol, limit, chunk, generator)
    with Bar("diagonal", limit, progress) as run.bar:
        if n <= min(LEAST, limit):
            exact = run.exact_diagonal(n)
            return Estimate(exact, torch.zeros_like(exact), n, True)
        found = run.average(n, lambda V: run.product(V) * V, torch.linalg.vector_norm)
    return Estimate(found.value, found.stderr, found.products, bool(found.converged))


def _hutchinson(run: Probes) -> Estimate:
    return run.average(run.op.shape[0], run.forms)


#: Probes of one second-order tangent: enough that it costs little beside theirs, and few enough that their mean still
#: says how much they scatter.
_SHARING = 2


def _jets(run: Probes, n: int | None = None, name: str | None = None) -> Estimate:
    if not hasattr(run.op, "mean_forms"):
        raise Untraceable("the operator has no mean_forms")
    if run.limit < _SHARING:
        raise Untraceable(f"second-order tangents need max_products of at least {_SHARING}")
    n = run.op.shape[0] if n is None else n
    return run.average(n, lambda V: run.op.mean_forms(V.to(run.op.dtype), _SHARING, name), per=_SHARING)


def _cheapest(run: Probes, n: int | None = None, name: str | None = None) -> Estimate:
    if run.limit >= LEAST:
        try:
            return _jets(run, n, name)
        except Untraceable:
            pass
    n = run.op.shape[0] if n is None else n
    return run.average(n, lambda V: run.forms(V, name))


_METHODS = {
    "auto": _cheapest,
    "jets": _jets,
    "hutchinson": _hutchinson,
    "hutch++": _sketch.hutch_plus_plus,
    "xtrace": _sketch.xtrace,
}


def _own_block(run: Probes, name: str, n: int) -> Estimate:
    if n <= min(LEAST, run.limit):
        return Estimate(float(run.exact_diagonal(n, name).sum()), 0.0, n, True)
    return _number(_cheapest(run, n, name))


def _number(found: Estimate, place: int | tuple = ()) -> Estimate:
    """An entry of an estimate in Python's numbers."""
    entries = (x[place].item() if isinstance(x, Tensor) else x for x in (found.value, found.stderr, found.converged))
    value, stderr, converged = entries
    return Estimate(value, stderr, found.products, converged)

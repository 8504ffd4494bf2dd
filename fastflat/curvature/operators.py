# SPDX-License-Identifier: Apache-2.0
"""Hessian, Gauss-Newton and Fisher matrices of a model on data, as linear operators."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastflat import _checks
from fastflat.curvature import _batch, _density, _differentiate, _jets, _lanczos, _routes, _solve, _trace
from fastflat.curvature._batch import Batch
from fastflat.curvature._density import Density
from fastflat.curvature._estimate import Estimate
from fastflat.curvature._problem import Problem, unpacked
from fastflat.curvature._program import Untraceable

_LOOPS = {
    "double_backward": _differentiate.double_backward,
    "finite_difference": _differentiate.finite_difference,
}


class Operator:
    """A symmetric matrix ``[n, n]`` over the chosen parameters, known by its products.

    Attributes:
        shape, dtype, device: as of a matrix.
        blocks: for each parameter, by its name, the slice of rows that it owns.

    Estimates take the arguments of the functions of the same name in :mod:`fastflat.curvature`. Their random probes
    come from a generator of seed 0 unless one is given: a call gives the same numbers again and draws from no generator
    of yours.
    """

    #: Whether blocks are those of the Gauss-Newton matrix: always (True), never (False), or where outputs are piecewise
    #: linear in them (None).
    _gauss_newton: bool | None = False

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        data: Iterable,
        params: Any = None,
        *,
        reduction: str = "mean",
        row_weight: Callable[[Any], Tensor] | None = None,
        chunk: int | None = None,
        microbatch: int | None = None,
        tangent_dtype: torch.dtype | None = None,
        process_group: Any = None,
    ) -> None:
        self._name = f"curvature.{type(self).__name__}"
        _batch.check(self._name, data)
        for argument, value in (("chunk", chunk), ("microbatch", microbatch)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                _checks.fail(self._name, argument, "be a positive int or None", repr(value))
        self._problem = Problem(self._name, model, loss_fn, params, reduction, row_weight, tangent_dtype)
        self._arguments = {
            "reduction": reduction,
            "chunk": chunk,
            "microbatch": microbatch,
            "tangent_dtype": tangent_dtype,
            "process_group": process_group,
        }
        self._data, self._chunk, self._microbatch, self._group = data, chunk, microbatch, process_group
        first, n = self._problem.params[0], sum(self._problem.sizes)
        self.shape, self.dtype, self.device = (n, n), first.dtype, first.device
        ends = torch.tensor(self._problem.sizes).cumsum(0).tolist()
        self.blocks = {
            name: slice(end - size, end)
            for name, size, end in zip(self._problem.names, self._problem.sizes, ends, strict=True)
        }

    def __matmul__(self, v: Tensor) -> Tensor:
        """The product with one vector ``[n]`` or with K of them, ``[n, K]``."""
        self._check(v, (self.shape[0],), "[n={0}] or [n={0}, K]")
        return self.matmat(v[None])[0] if v.dim() == 1 else self.matmat(v.t()).t()

    def matmat(self, v: Tensor) -> Tensor:
        """The products with K vectors, ``[K, n]`` to ``[K, n]``; K = 0 gives an empty result."""
        return self._over_data(v, self._products)

    def block_matmat(self, name: str, v: Tensor) -> Tensor:
        """The products of one parameter's own block with K vectors, ``[K, n_b]`` to ``[K, n_b]``."""
        if name not in self.blocks:
            _checks.fail(self._name, "name", f"be one of {', '.join(self.blocks)}", repr(name))
        where = self.blocks[name]

        def products(batch: Batch, rows: Tensor, into: Tensor, share: float) -> None:
            tangents = self._split(rows, name)
            self._pushed(batch, tangents, list(tangents), lambda _, t: into.add_(t.reshape(rows.shape), alpha=share))

        return self._over_data(v, products, where.stop - where.start)

    def block_diagonal_matmat(self, v: Tensor) -> Tensor:
        """Each parameter's own block of the matrix times its part of K vectors, ``[K, n]`` to ``[K, n]``: the matrix
        without what couples two parameters."""
        return self._over_data(v, self._block_products)

    def trace(self, rtol: float = 0.05, max_products: int | None = None, **options: Any) -> Estimate:
        """The trace; see :func:`fastflat.curvature.trace`."""
        return _trace.trace(self, rtol, max_products, **self._drawing(options))

    def layer_traces(
        self,
        rtol: float = 0.1,
        max_products: int = 1000,
        chunk: int = 8,
        *,
        route: str = "auto",
        atol: float = 0.0,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> _routes.LayerTraces:
        """The trace of each parameter's own block, by the cheapest route that is exact here.

        ``"sampled"``: ``tr G_bb = E |J_b^T r|^2`` with draws r of second moment H_out, for all blocks by one ordinary
        backward pass each. It is exact for a :class:`GGN`, and for a Hessian where outputs are piecewise linear in each
        single parameter (ReLU, max-pool, batch norm in eval mode, straight-through quantizers, no weight used twice in
        a row), which is read off the traced model; the loss must be a softmax cross-entropy or a sum over the outputs
        (squared error, binary cross-entropy), however it is written. ``"own"``: products of each block with probes of
        its own. ``"joint"``: products of the whole matrix, whose probes of other blocks add noise.

        Args:
            route: one of these, or ``"auto"``: the first that is exact.
            rtol, max_products, chunk, atol, generator, progress: as for :func:`fastflat.curvature.layer_traces`; a
                draw counts as a product.

        Returns:
            Name to :class:`Estimate`, with attributes ``route`` and ``reason``.

        Raises:
            ValueError, TypeError: arguments out of range; ``route="sampled"`` where it is not exact.

        Source: Dong et al., HAWQ-V2, NeurIPS 2020, section 3, for what they are used for; Martens, JMLR 21 (2020),
        section 9, for the second moment.
        """
        generator = torch.Generator(self.device).manual_seed(0) if generator is None else generator
        return _routes.layer_traces(
            self, route, self._gauss_newton, rtol, max_products, chunk, atol, generator, progress
        )

    def diagonal(self, rtol: float = 0.1, max_products: int = 1000, **options: Any) -> Estimate:
        """The diagonal ``[n]``; see :func:`fastflat.curvature.diagonal`."""
        return _trace.diagonal(self, rtol, max_products, **self._drawing(options))

    def eigenvalues(
        self, k: int = 5, which: str = "largest", tol: float = 1e-3, **options: Any
    ) -> Estimate | tuple[Estimate, Tensor]:
        """The k extreme eigenvalues; see :func:`fastflat.curvature.eigenvalues`."""
        return _lanczos.eigenvalues(self, k, which, tol, **self._drawing(options))

    def density(self, steps: int = 64, probes: int = 8, **options: Any) -> Density:
        """The density of all eigenvalues; see :func:`fastflat.curvature.density`."""
        return _density.density(self, steps, probes, **self._drawing(options))

    def solve(self, b: Tensor, damping: float = 0.0, tol: float = 1e-3, **options: Any) -> Estimate:
        """Solutions of ``(H + damping I) x = b``; see :func:`fastflat.curvature.solve`."""
        return _solve.solve(self, b, damping, tol, **options)

    def _drawing(self, options: dict[str, Any]) -> dict[str, Any]:
        """Options with a generator."""
        if options.get("generator") is None:
            options["generator"] = torch.Generator(self.device).manual_seed(0)
        return options

    def to_scipy(self) -> Any:
        """The operator as a ``scipy.sparse.linalg.LinearOperator`` over NumPy arrays."""
        from scipy.sparse.linalg import LinearOperator

        def product(array):
            v = torch.as_tensor(array, dtype=self.dtype, device=self.device)
            return (self @ v.reshape(self.shape[0], -1)).reshape(v.shape).cpu().numpy()

        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return LinearOperator(self.shape, matvec=product, matmat=product, rmatvec=product, rmatmat=product, dtype=dtype)

    def of_class(self, label: int, weight: Callable[[Any], Tensor] | None = None) -> Operator:
        """The same operator over the rows of one class alone: the mean (or sum) of their losses.

        Args:
            label: the class; targets are class indices ``[B]``.
            weight: other weights of rows, targets to ``[B]``; then ``label`` is not looked at.
        """
        weight = weight or (lambda target: (target == label).to(self.dtype))
        problem = self._problem
        options = {**self._arguments, **self._own(), "row_weight": weight}
        return type(self)(problem.model, problem.loss_fn, self._data, problem.names, **options)

    def on(self, data: Iterable) -> Operator:
        """The same operator at other data.

        What was traced for a shape of batch (about a millisecond for each operation of the network) serves here, too:
        for a matrix of each batch while training. A change of the model's code or structure needs a new operator; its
        parameters, buffers and modes may change.
        """
        _batch.check(self._name, data)
        other = copy.copy(self)
        other._data = data
        return other

    def _own(self) -> dict[str, Any]:
        """Arguments of this kind of operator alone."""
        return {}

    def _check(self, v: Any, size: tuple[int, ...], want: str) -> None:
        if not isinstance(v, Tensor):
            _checks.fail(self._name, "V", "be a tensor", type(v))
        n = self.shape[0]
        if v.dim() not in (1, 2) or v.shape[0] != n:
            _checks.fail(self._name, "V", f"have shape {want.format(n)}", list(v.shape))
        self._check_kind(v)

    def _check_kind(self, v: Tensor) -> None:
        if v.dtype != self.dtype or v.device != self.device:
            _checks.fail(self._name, "V", f"be {self.dtype} on {self.device}", f"{v.dtype} on {v.device}")

    def _over_data(self, v: Tensor, products: _Products, size: int | None = None) -> Tensor:
        """The mean or sum over all batches and ranks of the products of each batch, with rows of ``size`` or n;
        ``products(batch, rows, into, share)`` adds ``share`` of them to ``into``."""
        size = self.shape[0] if size is None else size
        if not isinstance(v, Tensor) or v.dim() != 2 or v.shape[1] != size:
            got = list(v.shape) if isinstance(v, Tensor) else type(v)
            _checks.fail(self._name, "V", f"have shape [K, n={size}]", got)
        self._check_kind(v)
        v = v.detach()
        return self._summed(v, torch.zeros_like(v, memory_format=torch.contiguous_format), products)

    def _summed(self, v: Tensor, total: Tensor, products: _Products, per: int = 1) -> Tensor:
        """``total`` with what ``per`` rows of v make for each row of it, over all batches and ranks."""
        if not v.shape[0]:
            return total
        weight = 0.0
        rows_at_once = max((self._chunk or len(v)) // per, 1)
        for whole in _batch.batches(self._name, self._data):
            self._check_split(whole)
            for batch in whole.split(self._microbatch):
                weight += self._problem.weight(batch)
                share = self._problem.share(batch)
                for rows, into in zip(v.split(rows_at_once * per), total.split(rows_at_once), strict=True):
                    products(batch, rows, into, share)
        if self._group is not None:
            weight = self._reduced(total, weight)
        return total.div_(weight) if self._problem.reduction == "mean" and weight else total

    def _reduced(self, total: Tensor, weight: float) -> float:
        """The sum over the ranks of a process group (``True``: the default one)."""
        group = None if self._group is True else self._group
        torch.distributed.all_reduce(total, group=group)
        count = torch.tensor(weight, dtype=torch.float64, device=total.device)
        torch.distributed.all_reduce(count, group=group)
        return float(count)

    def _check_split(self, batch: Batch) -> None:
        if self._microbatch is None or self._microbatch >= batch.size:
            return
        name = _batch.coupling(self._problem.model)
        if name is not None:
            _checks.fail(
                self._name, "microbatch", "be None where samples of a batch depend on each other",
                f"{self._microbatch}, and {name} in train mode", "; put it into eval mode",
            )  # fmt: skip

    def _products(self, batch: Batch, v: Tensor, into: Tensor, share: float) -> None:
        """Products of one batch's matrix with ``[K, n]``."""
        places = list(self.blocks.values())

        def take(i: int, t: Tensor) -> None:
            into[:, places[i]].add_(t.reshape(len(v), -1), alpha=share)

        self._pushed(batch, self._split(v, None), range(len(places)), take)

    def _block_products(self, batch: Batch, v: Tensor, into: Tensor, share: float) -> None:
        for i, (where, part) in enumerate(zip(self.blocks.values(), unpacked(v, self._problem.params), strict=True)):
            of_block = into[:, where]
            self._pushed(batch, {i: part}, [i], lambda _, t, of=of_block: of.add_(t.reshape(of.shape), alpha=share))

    def mean_forms(self, v: Tensor, per: int, name: str | None = None) -> Tensor:
        """The mean of ``v_k^T H v_k`` over each ``per`` neighbours of K vectors ``[K, n]``, float64 ``[K / per]``; with
        a name that of one parameter's own block, with vectors ``[K, n_b]``.

        From the forward pass alone: second-order tangents of the Hessian, summed over neighbours as they arise, and the
        tangents of the outputs of a Gauss-Newton matrix. Half the arithmetic of products, and none of the memory of a
        backward pass.

        Raises:
            RuntimeError: an operation has no second derivative that could be had.
        """

        def forms(batch: Batch, rows: Tensor, into: Tensor, share: float) -> None:
            found = self._forms(batch, self._split(rows, name), len(rows) // per)
            if found is not None:
                into.add_(found.double(), alpha=share / per)

        total = torch.zeros(len(v) // per, dtype=torch.float64, device=v.device)
        return self._summed(v.detach(), total, forms, per)

    def _split(self, rows: Tensor, name: str | None) -> dict[int, Tensor]:
        """Rows as tangents of the parameters, by their number; all of them or one."""
        if name is None:
            return dict(enumerate(unpacked(rows, self._problem.params)))
        b = list(self.blocks).index(name)
        return {b: rows.reshape(len(rows), *self._problem.params[b].shape)}

    def _forms(self, batch: Batch, tangents: dict[int, Tensor], groups: int) -> Tensor | None:
        """The sums of ``v_k^T H v_k`` of one batch within groups of neighbours, ``[G]``; None for zeros."""
        raise NotImplementedError

    def _pushed(
        self,
        batch: Batch,
        tangents: dict[int, Tensor],
        wanted: Sequence[int],
        take: Callable[[int, Tensor], object],
    ) -> None:
        """``take(i, products)`` for the i-th of some parameters (by number) and K tangents of some parameters, at one
        batch; not for those of zeros."""
        raise NotImplementedError


#: Adds products of one batch with rows to a tensor, times a factor.
_Products = Callable[[Batch, Tensor, Tensor, float], None]


class Hessian(Operator):
    """The Hessian of the loss of a model on data, ``H = mean_i d^2 l(f(x_i), y_i) / dw^2``, exact.

    ``H @ V`` linearises the gradient once for each batch and pushes all K vectors through it together: 2F + 6F K
    multiply-adds where a forward pass takes F. In a quantized network the in-range mask and the residual of each
    quantizer are frozen, so that H is symmetric; the gradient factor f of a scale makes it D H D with D = f there.

    Args:
        model: any module; in the mode it is in. Batch norm in train mode uses the batch's statistics and leaves its
            running ones alone; dropout draws one mask for each linearisation, the same for all vectors.
        loss_fn: ``(output, target) -> scalar``, the mean (or sum) over the rows of a batch.
        data: list of ``(inputs, targets)``, or another iterable that can be gone through again. Inputs may be a tuple
            (arguments) or a dict (keywords). Batches are weighted by their number of rows.
        params: which parameters: names, ``fnmatch`` patterns or the tensors; those that require a gradient by default.
            Tied parameters count once, under their first name. A parameter that the loss does not reach has zeros.
        reduction: ``"mean"`` over all rows or ``"sum"``; ``loss_fn`` must reduce in the same way.
        row_weight: weights of rows, ``targets -> [B]``; the loss is then taken row by row and its weighted mean used.
        chunk: at most so many vectors at once; memory is about (1 + chunk) times that of one gradient's activations.
        microbatch: at most so many rows at once; refused where batch norm in train mode couples them.
        tangent_dtype: type in which tangents are computed, such as ``torch.bfloat16``: faster and less exact (relative
            error of a product 5e-3 on a 4-bit convolutional network of 6 layers); None for that of the parameters.
        process_group: sum products over the ranks of this group (``True``: the default one), each with its own data.
        method: ``"auto"``: the engine, and double backward with a warning where a function cannot be traced.
            ``"engine"``, ``"double_backward"``, ``"finite_difference"`` (:mod:`fastflat.curvature` compares them).

    Raises:
        TypeError, ValueError: an argument is not as above. The model is unchanged in every case: modes, buffers,
            gradients, random state.

    Source: Pearlmutter, Neural Computation 6(1), 1994, for the R-operator.
    """

    _gauss_newton = None

    def __init__(self, model, loss_fn, data, params=None, *, method: str = "auto", **options) -> None:
        super().__init__(model, loss_fn, data, params, **options)
        if method not in ("auto", "engine", *_LOOPS):
            names = ", ".join(map(repr, ("auto", "engine", *_LOOPS)))
            _checks.fail(self._name, "method", f"be one of {names}", repr(method))
        self._method = method

    def _own(self) -> dict[str, Any]:
        return {"method": self._method}

    def _forms(self, batch, tangents, groups):
        if self._method not in ("auto", "engine") or self._problem.tangent_dtype is not None:
            raise Untraceable("second-order tangents belong to the engine, in the type of the parameters")
        linear, traced = self._problem.at(batch, "gradient")
        (loss,) = traced.outputs
        return _jets.summed_forms(linear, {traced.params[i]: t for i, t in tangents.items()}, loss, groups)

    def _pushed(self, batch, tangents, wanted, take):
        if self._method not in _LOOPS:
            try:
                linear, traced = self._problem.at(batch, "gradient")
                seeds = {traced.params[i]: t for i, t in tangents.items()}
                linear.push(seeds, [traced.gradients[i] for i in wanted], take)
                return
            except Untraceable as reason:
                if self._method == "engine":
                    raise
                self._method = "double_backward"
                warnings.warn(f"fastflat.{self._name}: {reason}; double backward takes its place", stacklevel=5)
        self._looped(batch, tangents, wanted, take)

    def _looped(self, batch, tangents, wanted, take):
        problem = self._problem
        params = [p.detach() for p in problem.params]
        k = len(next(iter(tangents.values())))
        full = [tangents[i] if i in tangents else p.new_zeros(k, *p.shape) for i, p in enumerate(params)]
        _, targets = batch.together(batch.tensors)

        def loss(values):
            with problem.draws_given_back():
                return problem.loss(problem.output(batch, values), targets)

        found = _LOOPS[self._method](loss, params, full)
        for number, i in enumerate(wanted):
            take(number, found[i])

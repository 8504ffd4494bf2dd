# SPDX-License-Identifier: Apache-2.0
"""Rows of the vectors family: the vector work of Krylov methods and stochastic estimators.

Vectors are the rows of contiguous tensors ``[K, n]`` in fp32 or fp64. Their partners (a basis, the probes of a
quadratic form) have that dtype, or bf16 beside fp32. Sums are formed in fp64, where products of fp32 numbers are exact
and none overflows, in an order that depends on shape and dtype alone; backends agree to a relative 1e-12 of the sum of
the magnitudes of their terms.
"""

from __future__ import annotations

import torch

from fastflat._ops._row import Op, size_of


def _fake_dot(q, w):
    return w.new_empty((q.shape[0], w.shape[0]), dtype=torch.float64)


def _fake_subtract(w, q, c):
    return w.new_empty(w.shape[0], dtype=torch.float64)


def _fake_rademacher(state, k, n, dtype):
    return state.new_empty((k, n), dtype=dtype)


def _fake_quadratic(v, hv, starts):
    return hv.new_empty((v.shape[0], len(starts) - 1), dtype=torch.float64)


def _bytes_of_quadratic(v, hv, starts):
    elements = v.shape[0] * (starts[-1] - starts[0])
    return elements * (v.element_size() + hv.element_size()) + 8 * v.shape[0] * (len(starts) - 1)


ROWS = (
    Op(
        "vectors_dot",
        "vectors",
        "(Tensor q, Tensor w) -> Tensor",
        _fake_dot,
        lambda q, w: size_of(q, w) + 8 * q.shape[0] * w.shape[0],
        """``d[j, k] = sum_i q[j, i] w[k, i]``, fp64 ``[J, K]``, of a basis ``q`` ``[J, n]`` and vectors ``w`` ``[K,
        n]``: one pass over the basis for all vectors.""",
    ),
    Op(
        "vectors_subtract_",
        "vectors",
        "(Tensor(a!) w, Tensor q, Tensor c) -> Tensor",
        _fake_subtract,
        lambda w, q, c: size_of(w, w, q, c) + 8 * w.shape[0],
        """``w[k] -= sum_j c[j, k] q[j]`` in place, and the new ``|w[k]|^2``, fp64 ``[K]``, in the same pass. ``c`` is
        fp64 ``[J, K]`` on the device of w, each number rounded to the dtype of w. Each element is a map, the same bits
        on every backend: ``w = w - c[j] q[j]`` for j = 0, 1, ..., product and difference rounded. With J = 2 it is the
        step of the Lanczos recurrence, ``c`` holding alpha and beta; with ``c = vectors_dot(q, w)`` one pass of
        Gram-Schmidt. w shares no memory with q.""",
    ),
    Op(
        "vectors_rademacher",
        "vectors",
        "(Tensor state, int k, int n, ScalarType dtype) -> Tensor",
        _fake_rademacher,
        lambda state, k, n, dtype: k * n * dtype.itemsize,
        """+1 or -1 with equal chances, ``[k, n]`` in any of the four dtypes, on the device of ``state``, int64 ``[seed,
        offset]``. A bit an element, elements numbered in storage order: element i takes bit ``i & 31`` of word ``(i >>
        5) & 3`` of Philox block ``i >> 7`` and is -1 where it is set. A map: the same bits on every backend.""",
    ),
    Op(
        "vectors_quadratic",
        "vectors",
        "(Tensor v, Tensor hv, int[] starts) -> Tensor",
        _fake_quadratic,
        _bytes_of_quadratic,
        """``f[k, t] = sum_i v[k, i] hv[k, i]`` over ``starts[t] <= i < starts[t + 1]``, fp64 ``[K, T]``: the quadratic
        forms of the blocks that T slices of a flat vector make, in one pass. ``starts`` holds T + 1 places that do not
        decrease and need not reach the ends.""",
    ),
)

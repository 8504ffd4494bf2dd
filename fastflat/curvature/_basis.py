# SPDX-License-Identifier: Apache-2.0
"""An orthonormal basis that grows by blocks of vectors and keeps the coefficients: classical Gram-Schmidt, twice."""

from __future__ import annotations

import torch
from torch import Tensor

from fastflat.curvature import _vectors
from fastflat.curvature._estimate import check_finite

#: A block is scaled by its Gram matrix until its condition, squared, is below this; the next Gram matrix, measured on
#: the scaled rows, is then exact enough to make them orthonormal.
_WELL_CONDITIONED = 1e3


class Basis:
    """Orthonormal rows Q [count, n], in one buffer of ``capacity`` rows.

    Args:
        function: whose name an error gives.
        capacity: rows that the buffer holds; the last block of :meth:`extend` must fit as a whole.
    """

    def __init__(self, function: str, capacity: int, n: int, dtype: torch.dtype, device: torch.device) -> None:
        self._function = function
        self._buffer = torch.empty(capacity, n, dtype=dtype, device=device)
        self.count = 0

    @property
    def rows(self) -> Tensor:
        return self._buffer[: self.count]

    def extend(self, W: Tensor, floor: float = 0.0, window: int = 0) -> tuple[Tensor, Tensor]:
        """Append what the rows of W [b, n] add to the basis.

        ``W = C^T Q + R^T Q_new``, with Q_new [r, n] the new rows. Directions of Q_new that W has no more of than
        ``floor``, the singular values of R, are left out, and there are never more than n rows.

        Args:
            window: the first pass subtracts rows from this one on: those before are known to be nearly orthogonal to W.
                The second pass subtracts all rows and leaves rounding errors of the size of what it subtracts.

        Returns:
            C [j, b] and R [b, b], float64 on the host. The last b - r rows of R are those of directions left out.
        """
        j, b = self.count, len(W)
        new, old = self._buffer[j : j + b], self.rows
        new.copy_(W)
        C = torch.zeros(j, b, dtype=torch.float64)
        R = torch.eye(b, dtype=torch.float64)
        squares = None
        if j > window:
            c = _vectors.dots(old[window:], new)
            squares = _vectors.subtract_(new, old[window:], c)
            C[window:] += c.cpu()
        R, _ = self._orthonormalise(new, R, squares)
        r = self._cut(new, R, floor)
        # A block that loses most of its length in the second pass was mostly rounding errors: it needs another one.
        for _ in range(3):
            new, squares = new[:r], None
            if r and j:
                c = _vectors.dots(old, new)
                squares = _vectors.subtract_(new, old, c)
                C += c.cpu() @ R[:r]
            R[:r], least = self._orthonormalise(new, R[:r], squares)
            if least > 0.25:
                break
        self.count = j + self._cut(new, R[:r], floor)
        return C, R

    def _cut(self, new: Tensor, R: Tensor, floor: float) -> int:
        """How many directions of a block [b, n] are more than the floor and fit. If not all do, the rows and R are
        turned in place so that these come first."""
        if not len(new):
            return 0
        U, s, Vh = torch.linalg.svd(R, full_matrices=False)
        r = min(int((s > floor).sum()), new.shape[1] - self.count)
        if r < len(new):
            _vectors.rotate_(new, U)
            R.copy_(s[:, None] * Vh)
        return r

    def _orthonormalise(self, new: Tensor, R: Tensor, squares: Tensor | None) -> tuple[Tensor, float]:
        """Make the rows of a block orthonormal in place. Returns R with the change, and the least squared norm met."""
        least = 1.0
        for _ in range(4 if len(new) else 0):
            gram = squares[:, None] if squares is not None and len(new) == 1 else _vectors.dots(new, new)
            gram = gram.cpu()
            check_finite(self._function, gram)
            squares = None
            size = gram.diagonal().clone()
            filled = size > 0
            least = min(least, float(size[filled].min())) if bool(filled.any()) else least
            scale = torch.where(filled, size, 1.0).sqrt()
            s, U = torch.linalg.eigh((gram + gram.T) / (2 * scale[:, None] * scale))
            s = s.clamp_(min=1e-6).sqrt_()
            _vectors.rotate_(new, U / scale[:, None] / s)
            R = (s[:, None] * U.T * size.sqrt()) @ R
            if (s[-1] / s[0]) ** 2 < _WELL_CONDITIONED:
                break
        return R, least

    def rotate(self, S: Tensor, following: int = 0) -> None:
        """The rows become ``S^T Q``, for S [j, p] with p <= j. ``following`` rows after the first j move up behind."""
        j, p = S.shape
        _vectors.rotate_(self._buffer[:j], S)
        for i in range(following):
            self._buffer[p + i] = self._buffer[j + i]
        self.count = p + following

# SPDX-License-Identifier: Apache-2.0
"""Integer grids of other libraries as fields of a spec."""

from __future__ import annotations

from typing import Any


def grid(qmin: int, qmax: int) -> dict[str, Any] | None:
    """The fields ``bits``, ``signed`` and ``narrow`` of the grid [qmin, qmax]; None if no spec has it."""
    bits = (qmax - qmin + 1).bit_length() - 1
    if qmin == 0:
        narrow = qmax + 1 != 1 << bits
        bits += narrow
        fits = qmax == (1 << bits) - 1 - narrow
        signed = False
    else:
        narrow = qmin == -qmax
        bits += narrow
        fits = qmax == (1 << (bits - 1)) - 1 and qmin == -(1 << (bits - 1)) + narrow
        signed = True
    if not fits or not 1 <= bits <= 16 or (narrow and bits == 1):
        return None
    return {"bits": bits, "signed": signed, "narrow": narrow}

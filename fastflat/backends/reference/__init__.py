# SPDX-License-Identifier: Apache-2.0
"""Every raw op in plain PyTorch: the oracle of the tests, and what runs where no compiled kernel does.

Step by step the same IEEE operations as ``csrc/math``, so that map ops agree with it bit for bit; sums run in fp64.
One module a family, under the family's name.
"""

from __future__ import annotations

import importlib

from fastflat._ops import OPS

for _op in OPS.values():
    _family = importlib.import_module(f"{__name__}.{_op.family}")
    globals()[_op.name] = getattr(_family, _op.name)

# SPDX-License-Identifier: Apache-2.0
"""What each rank does: operators over its own share of the data against one over all of it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from fastflat.curvature import GGN, Hessian


def over_their_shares(folder) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.SiLU(), nn.Linear(5, 3)).double()
    x, y = torch.randn(7, 4, dtype=torch.float64), torch.randint(0, 3, (7,))
    rank = dist.get_rank()
    mine = [(x[:5], y[:5])] if rank == 0 else [(x[5:6], y[5:6]), (x[6:], y[6:])]
    v = torch.randn(2, sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    for kind in (Hessian, GGN):
        want = kind(model, F.cross_entropy, [(x, y)]).matmat(v)
        for group in (True, dist.group.WORLD):
            got = kind(model, F.cross_entropy, mine, process_group=group).matmat(v)
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    alone = Hessian(model, F.cross_entropy, mine).matmat(v)
    assert not torch.allclose(alone, want)

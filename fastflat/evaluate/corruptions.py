# SPDX-License-Identifier: Apache-2.0
"""Common corruptions of images in five severities, and the accuracy that remains.

Images are ``[B, C, H, W]`` in [0, 1]. The kinds follow Hendrycks and Dietterich, Benchmarking Neural Network Robustness
to Common Corruptions and Perturbations, ICLR 2019, section 4; the constants are our own, chosen for small and large
images alike: lengths are shares of the shorter side. Numbers are not comparable with those of ImageNet-C or CIFAR-10-C.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fastflat import _checks
from fastflat._ops import compute_dtype

Generator = torch.Generator | None


def corrupt(x: Tensor, name: str, severity: int, *, generator: Generator = None) -> Tensor:
    """Images of one kind of corruption.

    Args:
        x: ``[B, C, H, W]`` in [0, 1], floating; computed in float32 (float64 for float64).
        name: one of :data:`CORRUPTIONS`.
        severity: 1 to 5.
        generator: of what is random; by default torch's. With one on the CPU the results are the same on every device
            up to rounding.

    Returns:
        Corrupted images in [0, 1], of the type of x.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    check_kind("evaluate.corrupt", name, severity)
    check_images("evaluate.corrupt", x)
    return applied(x, name, severity, generator)


def applied(x: Tensor, name: str, severity: int, generator: Generator) -> Tensor:
    """As :func:`corrupt`, of arguments that are known to be right."""
    function, values = CORRUPTIONS[name]
    wide = x.to(compute_dtype(x.dtype))
    return function(wide, values[severity - 1], generator).clamp(0, 1).to(x.dtype)


def check_kind(op: str, name: object, severity: object) -> None:
    if name not in CORRUPTIONS:
        close = difflib.get_close_matches(str(name), CORRUPTIONS, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        _checks.fail(op, "corruption", f"be one of {', '.join(CORRUPTIONS)}", repr(name), hint)
    if isinstance(severity, bool) or not isinstance(severity, int) or not 1 <= severity <= 5:
        _checks.fail(op, "severity", "be an integer from 1 to 5", repr(severity))


def check_images(op: str, x: object, hint: str = "; undo their normalisation first") -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() != 4:
        got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x)
        _checks.fail(op, "images", "be a floating tensor [B, C, H, W]", got)
    if not x.numel():
        _checks.fail(op, "images", "hold at least one image", list(x.shape))
    low, high = torch.stack(torch.aminmax(x.detach())).tolist()
    slack = 1e-3 if x.dtype in (torch.float32, torch.float64) else 1e-2
    if not (low >= -slack and high <= 1 + slack):
        _checks.fail(op, "images", "lie in 0 to 1", f"{low:.4g} to {high:.4g}", hint)


def _uniform(shape: tuple[int, ...], x: Tensor, generator: Generator) -> Tensor:
    device = x.device if generator is None else generator.device
    return torch.rand(shape, generator=generator, device=device, dtype=x.dtype).to(x.device)


def _gaussian_noise(x: Tensor, deviation: float, generator: Generator) -> Tensor:
    device = x.device if generator is None else generator.device
    return x + deviation * torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)


def _shot_noise(x: Tensor, photons: float, generator: Generator) -> Tensor:
    """Counts of so many photons at full brightness."""
    device = x.device if generator is None else generator.device
    return torch.poisson((x * photons).clamp(min=0).to(device), generator=generator).to(x.device) / photons


def _impulse_noise(x: Tensor, share: float, generator: Generator) -> Tensor:
    """A share of all elements black or white, half each."""
    u = _uniform(tuple(x.shape), x, generator)
    return torch.where(u < share / 2, 0.0, torch.where(u >= 1 - share / 2, 1.0, x))


def _gaussian_blur(x: Tensor, deviation: float, generator: Generator) -> Tensor:
    sigma = deviation * min(x.shape[-2:])
    reach = max(1, math.ceil(3 * sigma))
    t = torch.arange(-reach, reach + 1, dtype=torch.float64)
    row = torch.exp(-(t**2) / (2 * sigma**2))
    row = (row / row.sum()).to(x)
    return _filtered(_filtered(x, row[None, :]), row[:, None])


def _defocus_blur(x: Tensor, radius: float, generator: Generator) -> Tensor:
    """The mean over a disk whose edge fades over one pixel."""
    r = radius * min(x.shape[-2:])
    reach = max(1, math.ceil(r))
    t = torch.arange(-reach, reach + 1, dtype=torch.float64)
    disk = (r + 0.5 - (t[:, None] ** 2 + t[None, :] ** 2).sqrt()).clamp(0, 1)
    return _filtered(x, (disk / disk.sum()).to(x))


def _filtered(x: Tensor, kernel: Tensor) -> Tensor:
    """Each channel convolved with a kernel of odd sides; images go on at their edges as they end."""
    rows, columns = kernel.shape[0] // 2, kernel.shape[1] // 2
    padded = F.pad(x.flatten(0, 1)[:, None], (columns, columns, rows, rows), mode="replicate")
    with torch.autocast(x.device.type, enabled=False):
        return F.conv2d(padded, kernel[None, None]).view_as(x)


def _contrast(x: Tensor, share: float, generator: Generator) -> Tensor:
    mean = x.mean((-2, -1), keepdim=True)
    return mean + share * (x - mean)


def _brightness(x: Tensor, more: float, generator: Generator) -> Tensor:
    return x + more


def _pixelate(x: Tensor, share: float, generator: Generator) -> Tensor:
    """The mean over each of fewer, larger pixels; a border inside a pixel divides it."""
    for axis in (-2, -1):
        side = x.shape[axis]
        size = max(1, round(side * share))
        ends = torch.arange(1, size + 1, dtype=torch.float64)[:, None] * side / size
        pixel = torch.arange(side, dtype=torch.float64)
        overlap = (torch.minimum(ends, pixel + 1) - torch.maximum(ends - side / size, pixel)).clamp(min=0)
        back = overlap.T / overlap.sum(0)[:, None]
        both = (back @ (overlap / overlap.sum(1, keepdim=True))).to(x)
        with torch.autocast(x.device.type, enabled=False):
            x = (x.movedim(axis, -1) @ both.T).movedim(-1, axis)
    return x


def _fog(x: Tensor, amount: float, generator: Generator) -> Tensor:
    """Noise in octaves of halving strength, mixed in so that white stays white."""
    mist, octave = x.new_zeros(len(x), 1, *x.shape[-2:]), 2
    while octave <= max(2, min(x.shape[-2:])):
        coarse = _uniform((len(x), 1, octave + 1, octave + 1), x, generator)
        mist += F.interpolate(coarse, x.shape[-2:], mode="bilinear", align_corners=True) / octave
        octave *= 2
    low, high = mist.amin((-2, -1), keepdim=True), mist.amax((-2, -1), keepdim=True)
    mist = (mist - low) / (high - low).clamp(min=torch.finfo(x.dtype).tiny)
    return (x + amount * (0.5 + 0.5 * mist)) / (1 + amount)


def _rotate(x: Tensor, degrees: float, generator: Generator) -> Tensor:
    """About the middle, to either side."""
    angle = math.radians(degrees) * (1 - 2 * (_uniform((len(x),), x, generator) < 0.5).to(x.dtype))
    height, width = x.shape[-2:]
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    rows = [cos, -sin * height / width, zero, sin * width / height, cos, zero]
    return _moved(x, torch.stack(rows, 1).view(-1, 2, 3))


def _translate(x: Tensor, share: float, generator: Generator) -> Tensor:
    """By a share of the side in a random direction."""
    angle = 2 * math.pi * _uniform((len(x),), x, generator)
    one, zero = torch.ones_like(angle), torch.zeros_like(angle)
    rows = [one, zero, 2 * share * angle.cos(), zero, one, 2 * share * angle.sin()]
    return _moved(x, torch.stack(rows, 1).view(-1, 2, 3))


def _moved(x: Tensor, theta: Tensor) -> Tensor:
    """Resampled bilinearly; images go on at their edges as they end."""
    with torch.autocast(x.device.type, enabled=False):
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _occlusion(x: Tensor, share: float, generator: Generator) -> Tensor:
    """A gray square with this share of the side, anywhere inside."""
    covered = []
    for side in x.shape[-2:]:
        length = max(1, round(share * side))
        first = (_uniform((len(x), 1), x, generator) * (side - length + 1)).floor()
        at = torch.arange(side, device=x.device)
        covered.append((at >= first) & (at < first + length))
    square = covered[0][:, None, :, None] & covered[1][:, None, None, :]
    return torch.where(square, 0.5, x)


#: How, and by how much in severities 1 to 5.
CORRUPTIONS: dict[str, tuple[Callable[[Tensor, float, Generator], Tensor], tuple[float, ...]]] = {
    "gaussian_noise": (_gaussian_noise, (0.04, 0.08, 0.12, 0.18, 0.26)),  # standard deviation
    "shot_noise": (_shot_noise, (200.0, 60.0, 25.0, 12.0, 6.0)),  # photons at full brightness
    "impulse_noise": (_impulse_noise, (0.01, 0.03, 0.06, 0.11, 0.18)),  # share of elements
    "gaussian_blur": (_gaussian_blur, (0.02, 0.03, 0.04, 0.055, 0.075)),  # deviation / side
    "defocus_blur": (_defocus_blur, (0.03, 0.045, 0.06, 0.08, 0.11)),  # radius / side
    "contrast": (_contrast, (0.7, 0.5, 0.35, 0.22, 0.12)),  # remaining contrast
    "brightness": (_brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),  # added
    "pixelate": (_pixelate, (0.75, 0.6, 0.45, 0.33, 0.22)),  # remaining pixels of a side
    "fog": (_fog, (0.3, 0.6, 0.9, 1.3, 1.8)),  # brightness of the fog beside the image's
    "rotate": (_rotate, (6.0, 12.0, 18.0, 24.0, 32.0)),  # degrees
    "translate": (_translate, (0.04, 0.08, 0.12, 0.16, 0.22)),  # distance / side
    "occlusion": (_occlusion, (0.15, 0.25, 0.35, 0.45, 0.55)),  # side of the square / side
}

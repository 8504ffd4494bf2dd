# SPDX-License-Identifier: Apache-2.0
"""How a worker's gradient is sent: a method with its options, as bytes and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from fastflat.functional import Compressed, Largest, compress, compress_topk, decompress, decompress_topk

_BUCKET = 512
METHODS = ("sign", "qsgd", "terngrad", "topk")

Sent = Compressed | Largest


@dataclasses.dataclass(frozen=True)
class Compression:
    """A method of :func:`fastflat.compress`, or ``topk``, with error feedback or without.

    With feedback ``p = g + e`` is sent as C(p) and ``e <- p - C(p)``: everything arrives at last, provided that C takes
    something away, ``E |p - C(p)|^2 <= delta |p|^2`` with delta < 1; else the residual grows without bound. Of normal
    numbers delta is 1 - 2/pi with signs, 0.04 with qsgd by the largest of 512 in 4 bits, 0.27 with TernGrad clipped at
    one root mean square, at most 1 - share with topk. QSGD as published (l2 norm, buckets of 512, 7 levels) has 1.6, as
    it has with one level, and TernGrad as published (clipped at 2.5) 1.0. Hence the defaults: contractions with
    feedback, the published ones without, where signs and topk are biased and qsgd is not, nor TernGrad but for what it
    clips.

    Layers differ in the size of their gradients, so that units are of 512 elements where the paper has one for all.

    Attributes:
        method: ``sign``, ``qsgd``, ``terngrad`` or ``topk``.
        feedback: whether what is not sent is kept for the next step.
        levels, bucket, norm, clip: of :func:`fastflat.compress`; None for the default of the method and buckets of
            512, norm ``max`` of qsgd and clip 1 of TernGrad with feedback, ``l2`` and 2.5 without.
        share: of the elements that topk sends, in (0, 1].

    Raises:
        TypeError, ValueError: an unknown method, or an option that does not fit it.
    """

    method: str = "sign"
    feedback: bool = True
    levels: int | None = None
    bucket: int | None = None
    norm: str | None = None
    clip: float | None = None
    share: float = 0.01

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(
                f"fastflat.distributed.Compression: method must be one of {', '.join(METHODS)}, got {self.method!r}"
            )
        if isinstance(self.share, bool) or not isinstance(self.share, (int, float)) or not 0 < self.share <= 1:
            raise ValueError(f"fastflat.distributed.Compression: share must lie in (0, 1], got {self.share!r}")
        if self.method != "topk":
            self.encode(torch.zeros(1), None, torch.zeros(2, dtype=torch.int64))  # the options are checked there
            return
        for name in ("levels", "bucket", "norm", "clip"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"fastflat.distributed.Compression: {name} must be None with topk, got {getattr(self, name)!r}"
                )

    def encode(self, g: Tensor, error: Tensor | None = None, state: Tensor | None = None) -> Sent:
        """What is sent of g; the residual `error` is written. `state`: of the draws, unused by sign and topk."""
        if self.method == "topk":
            return compress_topk(g, max(1, round(self.share * g.numel())), error=error)
        norm, clip = self.norm, self.clip
        if self.method == "qsgd" and norm is None:
            norm = "max" if self.feedback else "l2"
        if self.method == "terngrad" and clip is None:
            clip = 1.0 if self.feedback else 2.5
        bucket = _BUCKET if self.bucket is None else self.bucket
        options = {"levels": self.levels, "bucket": bucket, "norm": norm, "clip": clip}
        return compress(g, self.method, error=error, state=None if self.method == "sign" else state, **options)

    @staticmethod
    def decode(sent: Sent | Sequence[Sent], out: Tensor | None = None, *, factor: float = 1.0) -> Tensor:
        """Factor times the sum of what workers sent: one of them, several, or what :meth:`unpack` gives."""
        if not isinstance(sent, (Compressed, Largest)):
            names = sent[0]._fields[:2]
            sent = sent[0]._replace(**{name: torch.stack([getattr(s, name) for s in sent]) for name in names})
        return (decompress if isinstance(sent, Compressed) else decompress_topk)(sent, out, factor=factor)

    @staticmethod
    def pack(sent: Sent) -> Tensor:
        """Everything that travels in one uint8 tensor, wider numbers first."""
        first, second = _parts(sent)
        return torch.cat([getattr(sent, name).view(torch.uint8) for name in (first, second)])

    @staticmethod
    def unpack(like: Sent, payloads: Tensor) -> Sent:
        """What K workers sent, from their bytes ``[K, bytes]``, where `like` is what one of them sent."""
        first, second = _parts(like)
        split = getattr(like, first).nbytes
        pieces = {first: payloads[:, :split], second: payloads[:, split:]}
        return like._replace(**{n: _own(p).view(getattr(like, n).dtype) for n, p in pieces.items()})


def _own(t: Tensor) -> Tensor:
    # `contiguous` would keep the stride of an axis of one worker, which then does not fit wider numbers.
    return t.clone(memory_format=torch.contiguous_format)


def _parts(sent: Sent) -> tuple[str, str]:
    return ("units", "codes") if isinstance(sent, Compressed) else ("indices", "values")

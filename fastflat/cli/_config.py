# SPDX-License-Identifier: Apache-2.0
"""What a training run does, as one value that its folder keeps."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from fastflat import methods
from fastflat._spec import QuantSpec
from fastflat.optim import BASES

#: Optimizers of a run with the radius that each perturbs with unless told; None: it does not perturb.
OPTIMIZERS: dict[str, float | None] = {
    **dict.fromkeys((*BASES, "gadam", "gadamx")),
    "sam": 0.05,
    "asam": 0.5,
    "gsam": 0.05,
    "gnp": 0.05,
    "hero": 0.5,
    "saq": 0.05,
}
#: Options that runs before them lack.
_NEWER = {"optimizer", "base", "rho", "method"}
QUANTIZERS = ("fastflat", "python", "torch", "none")


@dataclasses.dataclass(frozen=True)
class Config:
    """The options of ``fastflat train`` that decide a run's numbers. Plain values only: it is stored as JSON."""

    data: str = "auto"
    image_size: int | None = None
    train_images: int | None = None
    test_images: int | None = None
    model: str = "convnet"
    quantizer: str = "fastflat"
    weight_bits: int = 4
    activation_bits: int = 4
    bits: tuple[str, ...] = ()
    skip: tuple[str, ...] = ("first", "last")
    per_channel: bool = True
    epochs: int = 5
    batch: int = 64
    lr: float = 0.02
    scale_lr: float | None = None
    momentum: float = 0.9
    optimizer: str = "sgd"
    base: str = "sgd"
    rho: float | None = None
    weight_decay: float = 5e-4
    shift: int = 0
    mirror: bool = True
    seed: int = 0
    device: str = "cpu"
    amp: bool = False
    init: str | None = None
    method: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch", 1), ("shift", 0), ("train_images", 1), ("test_images", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"train: {name} must be at least {least}, got {value}")
        for name in ("lr", "momentum", "weight_decay", "scale_lr", "rho"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"train: {name} must be a finite number of at least 0, got {value}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"train: seed must lie in 0 to 2**63-1, got {self.seed}")
        if self.quantizer not in QUANTIZERS:
            raise ValueError(f"train: quantizer must be one of {', '.join(QUANTIZERS)}, got {self.quantizer!r}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"train: optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")
        if self.base not in BASES:
            raise ValueError(f"train: base must be one of {', '.join(BASES)}, got {self.base!r}")
        perturbs = OPTIMIZERS[self.optimizer] is not None
        if not perturbs and (self.base != "sgd" or self.rho is not None):
            raise ValueError(f"train: base and rho must come with an optimizer that perturbs, got {self.optimizer!r}")
        if self.optimizer == "saq" and self.quantizer == "none":
            raise ValueError("train: optimizer saq must have quantized weights, got quantizer none")
        if self.method is not None:
            methods.get(self.method)
        self.layer_bits()
        self.specs()

    def layer_bits(self) -> dict[str, int | dict[str, int]]:
        """``bits`` as :func:`fastflat.prepare` takes them: ``"layer3.*=2"``, ``"fc=8/4"`` (weights/activations)."""
        parsed: dict[str, int | dict[str, int]] = {}
        for text in self.bits:
            pattern, equals, value = text.rpartition("=")
            numbers = value.split("/")
            if not equals or not pattern or len(numbers) > 2 or not all(n.strip().isdigit() for n in numbers):
                raise ValueError(f"train: bits must be PATTERN=BITS or PATTERN=WEIGHTS/ACTIVATIONS, got {text!r}")
            both = [int(n) for n in numbers]
            parsed[pattern] = both[0] if len(both) == 1 else {"weights": both[0], "activations": both[1]}
        return parsed

    def specs(self) -> tuple[QuantSpec, QuantSpec]:
        """Specs of weights and activations."""
        weights = QuantSpec.lsq(bits=self.weight_bits, signed=True, axis=0 if self.per_channel else None)
        return weights, QuantSpec.lsq(bits=self.activation_bits, signed=False)

    @property
    def label(self) -> str:
        """Short name for tables and folders."""
        optimizer = "" if self.optimizer == "sgd" else f"-{self.optimizer}"
        if self.method is not None and self.method != self.optimizer:
            optimizer += f"-{self.method}"
        if self.quantizer == "none":
            return "fp32" + optimizer
        mixed = "-mixed" if self.bits else ""
        return f"w{self.weight_bits}a{self.activation_bits}{mixed}-{self.quantizer}{optimizer}"

    @property
    def radius(self) -> float | None:
        """The radius of the perturbation; None without one."""
        return OPTIMIZERS[self.optimizer] if self.rho is None else self.rho

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_dict(cls, values: Any, path: Path) -> Config:
        """The config that a file or checkpoint holds; refuses what is not one."""
        fields = {f.name for f in dataclasses.fields(cls)}
        if isinstance(values, dict):
            missing = _NEWER - set(values)
            values = {**values, **{f.name: f.default for f in dataclasses.fields(cls) if f.name in missing}}
        if not isinstance(values, dict) or set(values) != fields:
            odd = sorted(set(values) ^ fields)[:3] if isinstance(values, dict) else [type(values).__name__]
            raise ValueError(f"train: {path} must hold the options of a run, got a difference in {', '.join(odd)}")
        try:
            return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        except TypeError as error:
            raise ValueError(f"train: {path} must hold the options of a run, got: {error}") from None

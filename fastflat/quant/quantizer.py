# SPDX-License-Identifier: Apache-2.0
"""One quantizer as a module: a spec, its scale, and (for affine specs) its zero-point."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastflat import _checks
from fastflat._ops import compute_dtype, scale_shape
from fastflat._spec import QuantSpec
from fastflat.functional import fake_quantize, scale_value
from fastflat.quant import _initial

#: First values of a quantizer's scalars; delta is that of the EWGS authors.
SCALARS = {"nu": 1.0, "a": 0.0, "delta": 1e-3}


class Quantizer(nn.Module):
    """``y = fake_quantize(x, scale, zero_point, spec=spec)`` with state.

    ``scale`` (and ``zero_point``, for ``spec.symmetric=False``) is a buffer with ``estimator="ste"`` and an
    ``nn.Parameter`` with the others, which train it. A new quantizer has no scale yet: the tensor holds ones and a
    forward call raises, until :meth:`initialise_from`, :meth:`set_scale`, :func:`fastflat.calibrate` or
    ``load_state_dict`` gives it one. Values are checked there and never in ``forward``, which does not synchronise with
    the device. Training and evaluation mode compute the same, but for the noise (or stochastic rounding) of a spec:
    evaluation has none.

    Args:
        spec: the quantizer.
        shape: shape of the scale: ``()`` per tensor, ``(C,)`` per channel, ``(..., K/group)`` in groups.
        device, dtype: of the scale; float32, or float64 for float64 data.
        learn_delta: with ``estimator="ewgs"``, make ``delta`` a parameter.

    Attributes:
        nu, a: amplitude of the noise and share of the residual, 0-dim buffers where the spec has noise (``a``: temper);
            1 and 0 at first. A :class:`fastflat.quant.NoiseSchedule` moves them; they are in the ``state_dict``.
        delta: factor of ``estimator="ewgs"``, a 0-dim buffer (0.001 at first) or parameter.
        enabled: ``False`` lets x pass unquantized.
        calibrated: whether there is a scale.
        name: where the module sits in its model, for error messages; :func:`fastflat.prepare` sets it.

    Raises:
        TypeError, ValueError: spec is not a QuantSpec, or shape does not fit it.
    """

    #: Optimizers that perturb leave the parameters of such modules alone unless asked.
    is_quantizer = True

    def __init__(
        self,
        spec: QuantSpec,
        shape: Sequence[int] = (),
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        learn_delta: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(spec, QuantSpec):
            _checks.fail("Quantizer", "spec", "be a QuantSpec", type(spec))
        shape = tuple(shape)
        if spec.group is None and len(shape) != (spec.axis is not None):
            want = "have no axis: the spec has one scale" if spec.axis is None else "be (C,): the spec has an axis"
            _checks.fail("Quantizer", "shape", want, shape)
        self.spec = spec
        self.enabled = True
        self.name = ""
        self._calibrated = False
        self._hold("scale", torch.ones(shape, device=device, dtype=dtype))
        self._hold("zero_point", None if spec.symmetric else torch.zeros(shape, device=device, dtype=dtype))
        scalars = {"nu": spec.noise != "none", "a": spec.noise == "temper", "delta": spec.estimator == "ewgs"}
        for name, needed in scalars.items():
            value = torch.tensor(SCALARS[name], device=device, dtype=dtype) if needed else None
            if name == "delta" and learn_delta and value is not None:
                self.delta = nn.Parameter(value)
            else:
                self.register_buffer(name, value)
        self.register_buffer("initialised", torch.zeros((), dtype=torch.bool, device=device))

    @classmethod
    def like(cls, x: Tensor, spec: QuantSpec) -> Quantizer:
        """A quantizer whose scale has the shape, device and type that x asks for; without a scale yet."""
        _checks.data("Quantizer.like", x, spec)
        shape = scale_shape(x.shape, _checks.axis_of(spec, x.dim()), spec.group or 0)
        return cls(spec, shape, device=x.device, dtype=compute_dtype(x.dtype))

    def _hold(self, name: str, value: Tensor | None) -> None:
        if self.spec.estimator != "ste":
            self.register_parameter(name, None if value is None else nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    @property
    def calibrated(self) -> bool:
        return self._calibrated

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Quantize x, and cast the result to ``dtype`` in the same pass if one is given."""
        if not self.enabled:
            return x if dtype is None else x.to(dtype)
        if not self._calibrated:
            raise RuntimeError(f"fastflat::{self.label}: no scale yet; call fastflat.calibrate(model, batches) first")
        return self.quantize(x, dtype)

    def quantize(self, x: Tensor, dtype: torch.dtype | None) -> Tensor:
        """The quantization itself; other implementations of the same rule override it."""
        spec = self.spec if self.training else self._evaluation
        extra = {} if spec is self._evaluation and spec.estimator != "ewgs" else self._scalars(spec)
        return fake_quantize(x, self.scale, self.zero_point, spec=spec, dtype=dtype, **extra)

    def _scalars(self, spec: QuantSpec) -> dict[str, Tensor]:
        """The device scalars that a call with `spec` takes."""
        noise = {"nu": self.nu, "a": self.a} if spec.noise != "none" else {}
        return {name: value for name, value in {**noise, "delta": self.delta}.items() if value is not None}

    def evaluated(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Q(x) as in evaluation, whatever the mode."""
        training = self.training
        try:
            return self.eval()(x, dtype)
        finally:
            self.train(training)

    @property
    def spec(self) -> QuantSpec:
        return self._spec

    @spec.setter
    def spec(self, spec: QuantSpec) -> None:
        self._spec, self._evaluation = spec, spec.evaluation()

    @property
    def step(self) -> Tensor:
        """The step s that the scale stands for: the scale itself unless ``spec.scale_is`` says otherwise."""
        return scale_value(self.scale, self.spec)

    @torch.no_grad()
    def initialise_from(self, x: Tensor, method: str | None = None, *, q: float | None = None) -> None:
        """Take scale and zero-point from x by one of :data:`fastflat.quant.METHODS`; the default follows the spec.

        Percentiles are exact here (linear between order statistics, as ``torch.quantile``), and so are the errors that
        ``"mse"`` compares: those of x under the quantizer's own rule.

        Args:
            x: the data; its shape fits the scale's.
            method: how; see :func:`fastflat.calibrate`.
            q: the percentile of ``"percentile"``; 99.99 by default.

        Raises:
            ValueError: x gives a scale that is zero or not finite, or the method does not fit the spec. The old scale
                stays.
        """
        self.set_scale(*_initial.scale_from(x, self.spec, method, self.label, q))

    @torch.no_grad()
    def set_scale(self, scale: Tensor, zero_point: Tensor | None = None) -> None:
        """Set scale and zero-point (broadcast to their shape) after a check of their values.

        Raises:
            ValueError: a scale is zero, negative or not finite, or a zero-point is not finite.
        """
        scale = torch.as_tensor(scale, dtype=self.scale.dtype, device=self.scale.device).expand_as(self.scale)
        self.check_values({"scale": scale, "zero_point": zero_point}, self.label, self.spec.scale_is)
        if zero_point is not None:
            if self.zero_point is None:
                _checks.fail(self.label, "zero_point", "be None with spec.symmetric=True", "a tensor")
            self.zero_point.copy_(torch.as_tensor(zero_point).expand_as(self.zero_point))
        self.scale.copy_(scale)
        self.initialised.fill_(True)
        self._calibrated = True

    @property
    def label(self) -> str:
        """The name that error messages use in place of an op's."""
        return self.name or type(self).__name__

    @staticmethod
    def check_values(state: dict[str, Tensor | None], label: str, scale_is: str = "s") -> None:
        """Raise the one-line error if a scale is not positive and finite (a logarithm: finite) or a zero-point is not
        finite."""
        scale = torch.as_tensor(state["scale"])
        if scale_is != "log2":
            _checks.scale_values(label, scale)
        elif not bool(torch.isfinite(scale).all()):
            _checks.fail(label, "scale", "be finite", "nan or inf", "; calibrate first")
        zero_point = state.get("zero_point")
        if zero_point is not None and not bool(torch.isfinite(torch.as_tensor(zero_point)).all()):
            _checks.fail(label, "zero_point", "be finite", "nan or inf")

    def check_state(self, state: dict[str, Tensor], prefix: str) -> None:
        """Check the entries of a state_dict that belong to this quantizer, before any of them is loaded."""
        own = {key: state[prefix + key] for key in ("scale", "zero_point", "initialised") if prefix + key in state}
        label = prefix.rstrip(".") or self.label
        for key in own.keys() & {"scale", "zero_point"}:
            mine = getattr(self, key)
            if mine is not None and tuple(own[key].shape) != tuple(mine.shape):
                _checks.fail(label, key, f"have shape {list(mine.shape)}", list(own[key].shape))
        if "scale" in own and bool(own.get("initialised", True)):
            self.check_values(own, label, self.spec.scale_is)

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        self.check_state(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if prefix + "scale" in state_dict:
            self._calibrated = bool(state_dict.get(prefix + "initialised", True))
            self.initialised.fill_(self._calibrated)

    def extra_repr(self) -> str:
        spec = self.spec
        parts = [f"{spec.bits} bits", "signed" if spec.signed else "unsigned", spec.estimator]
        if spec.group is not None:
            parts.append(f"groups of {spec.group}")
        elif spec.axis is not None:
            parts.append(f"{self.scale.numel()} channels on axis {spec.axis}")
        if not spec.symmetric:
            parts.append("zero-point")
        if not self.calibrated:
            parts.append("no scale yet")
        if not self.enabled:
            parts.append("off")
        return ", ".join(parts)

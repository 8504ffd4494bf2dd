# SPDX-License-Identifier: Apache-2.0
"""What a quantizer does, as one frozen value: :class:`QuantSpec`.

It lives below the op layer because every layer above reads it; users import it from ``fastflat`` or ``fastflat.quant``.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

#: Bits of the ``rules`` argument of the raw ops. ``csrc/math/rules.h`` holds the same table; a test compares them.
RULES = {
    "reciprocal": 1,
    "zero_inside": 2,
    "zero_float": 4,
    "mask_after": 8,
    "mask_none": 16,
    "nan_qmin": 32,
    "inf_qmin": 64,
    "positive_zero": 128,
    "round_away": 256,
    "round_stochastic": 512,
    "pact": 1024,
    "compute_input": 2048,
    "noise_uniform": 4096,
    "noise_normal": 8192,
    "noise_temper": 16384,
    "noise_bypass": 32768,
    "binary": 65536,
    "e4m3": 131072,
    "e5m2": 262144,
    "e3m2": 524288,
    "e2m3": 1048576,
    "e2m1": 2097152,
    "scale_floor": 4194304,
    "scale_ceil": 8388608,
    "scale_even": 16777216,
    "scale_rceil": 33554432,
    "scale_e4m3": 67108864,
    "through_chain": 134217728,
    "inverse": 268435456,
    "mask_absmax": 536870912,
    "nan_passes": 1073741824,
    "rectified": 2147483648,
}

#: Largest value, smallest normal value and 2^-mantissa bits of the minifloat formats (OCP MX v1.0, section 5.3; OFP8
#: v1.0). Their results saturate. ``csrc/math/minifloat.h`` holds the same table; a test compares them.
MINIFLOATS = {
    "e4m3": (448.0, 2.0**-6, 2.0**-3),
    "e5m2": (57344.0, 2.0**-14, 2.0**-2),
    "e3m2": (28.0, 2.0**-2, 2.0**-2),
    "e2m3": (7.5, 1.0, 2.0**-3),
    "e2m1": (6.0, 1.0, 2.0**-1),
}

_CHOICES = {
    "format": ("int", "binary", "ternary", *MINIFLOATS),
    "rounding": ("even", "away", "stochastic"),
    "arithmetic": ("divide", "reciprocal", "inverse"),
    "zero": ("outside", "inside", "float", "outside_float"),
    "mask": ("before", "after", "absmax", "none"),
    "through": ("exact", "chain"),
    "nan_gradient": ("stop", "pass"),
    "nan": ("propagate", "qmin"),
    "inf": ("saturate", "qmin"),
    "scale_is": ("s", "log2", "absmax", "range"),
    "scale_rule": ("absmax", "floor", "ceil", "even", "rceil", "e4m3"),
    "compute": ("fp32", "input"),
    "estimator": ("ste", "lsq", "pact", "ewgs"),
    "noise": ("none", "uniform", "normal", "temper", "bypass"),
}

#: Width of a code by format; that of "int" is free.
_WIDTHS = {"binary": 1, "ternary": 2, "e4m3": 8, "e5m2": 8, "e3m2": 6, "e2m3": 6, "e2m1": 4}

#: The smallest normal fp32 number: kernels hold a scale at this value from below, so that 1/s stays finite.
TINY = 2.0**-126


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """One quantizer, completely described. Frozen, hashable, and a plain ``dict`` by :meth:`to_dict`.

    The rule, element by element, with ``s = max(scale, eps)`` (NaN stays) and ``z`` the zero-point (0 when absent)::

        u = x / s                        arithmetic="divide"      (IEEE division)
        u = x * (1 / s)                  arithmetic="reciprocal"
        u = x * k, y = (q - z) / k       arithmetic="inverse": k = qmax / scale, 0 for scale <= eps (then y = 0)
        r = round(u) + z                 zero="outside", z rounded to even and clamped to the grid
        r = round(u + z)                 zero="inside",  z rounded to even and clamped to the grid
        r = round(u + z)                 zero="float",   z as it is
        r = round(u) + z                 zero="outside_float", z as it is
        q = clamp(r, qmin, qmax)         NaN and codes of 2**63 and more: by `nan` and `inf`
        y = (q - z) * s                  signed_zero=False turns a -0 of (q - z) into +0

    The grid of ``"int"`` is ``[-2**(bits-1), 2**(bits-1)-1]`` when signed, ``[0, 2**bits-1]`` when not; ``narrow``
    drops its lowest (signed) or highest (unsigned) code. ``"ternary"`` is {-1, 0, 1}, ``"binary"`` is {-1, 1} with
    sign(0) = 1. ``"e4m3"``, ``"e5m2"``, ``"e3m2"``, ``"e2m3"`` and ``"e2m1"`` are the floating-point formats of OCP MX
    v1.0, rounded to nearest with subnormals, saturating at the largest value.

    With noise (one draw xi an element; u is the unrounded code, Q the rule above, clip its clamp without rounding)::

        uniform   y = s clamp(u + nu xi)                      xi ~ U(-1/2, 1/2)
        normal    y = s clamp(u + nu xi)                      xi ~ N(0, 1/12)
        temper    y = Q(x) + a (clip(x) - Q(x)) + nu s xi     xi ~ U(-1/2, 1/2)
        bypass    y = x with probability nu, else Q(x)        an element

    and ``rounding="stochastic"`` rounds up with the probability of the fraction: ``r = floor(u) + (xi < u - floor(u))``
    with xi ~ U(0, 1). Uniform draws have 16 bits, normal ones 23.

    Attributes:
        bits: width of the grid, 1 to 16; of other formats than "int" it follows from the format.
        format: number format of the grid, see above.
        signed, narrow: which integers the grid holds, see above.
        symmetric: no zero-point. ``False`` allows one; formats other than "int" have none.
        axis: channel axis of ``scale`` (negative counts from the end); ``None`` means one scale for the tensor.
        group: size of contiguous blocks along the last axis, one scale each; excludes ``axis``.
        rounding: ``"even"`` ties to the even neighbour, ``"away"`` ties away from zero, ``"stochastic"``.
        arithmetic, zero, nan, inf, signed_zero: see the rule.
        mask: which elements pass their gradient: ``"before"`` those whose unrounded code ``u + z`` lies on
            ``[qmin, qmax]`` (LSQ paper), ``"after"`` those whose rounded code does (PyTorch), ``"absmax"`` those with
            ``|x| <= scale`` (arithmetic="inverse"), ``"none"`` all.
        through: how the gradient passes: ``"exact"`` ``m g``; ``"chain"`` ``m ((g s) / s)`` (``(g s) (1/s)`` with
            reciprocal), with the product in the storage type of x, as a chain of eager operations computes it.
        nan_gradient: whether NaN passes its gradient.
        grad_scale: factor of the gradient of scale and zero-point: ``"none"`` 1, ``"lsq"`` 1/sqrt(numel*max(qmax,1)),
            ``"lsq_channel"`` the same with the elements that share one scale, or a number.
        scale_is: what the scale tensor holds: ``"s"``; ``"log2"`` s = 2**scale; ``"absmax"`` s = scale / max(qmax, 1);
            ``"range"`` s = scale / (qmax - qmin).
        scale_rule: how :func:`fastflat.fake_quantize_dynamic` finds a scale from the largest magnitude: ``"absmax"`` as
            it is; a power of two by the rules ``"floor"`` (OCP MX), ``"ceil"``, ``"even"``, ``"rceil"``; or ``"e4m3"``
            (NVFP4).
        eps: lower bound of the scale inside the kernels.
        compute: ``"fp32"``: arithmetic in fp32 (fp64 for fp64 input) whatever the storage type. ``"input"``: 16-bit
            data are rounded to their type after every operation, as eager code does; integer grids without noise.
        estimator: ``"ste"`` takes scale and zero-point as constants; ``"lsq"`` trains them; ``"pact"`` trains the scale
            by the elements beyond the grid alone (Choi et al., 2018); ``"ewgs"`` is ``"lsq"`` with the gradient that
            passes multiplied by ``1 + delta sign(gradient) (u - q)`` (Lee et al., CVPR 2021, eq. 5).
        noise: see above; evaluation is always Q(x), see :meth:`evaluation`.
        rectified: x is ``max(x, 0)``, and elements that are not above 0 pass no gradient: a ReLU in the same pass.
            Integer grids without chance.
    """

    bits: int = 8
    format: str = "int"
    signed: bool = True
    narrow: bool = False
    symmetric: bool = True
    axis: int | None = None
    group: int | None = None
    rounding: str = "even"
    arithmetic: str = "divide"
    zero: str = "outside"
    mask: str = "before"
    through: str = "exact"
    nan_gradient: str = "stop"
    nan: str = "propagate"
    inf: str = "saturate"
    signed_zero: bool = True
    grad_scale: str | float = "none"
    scale_is: str = "s"
    scale_rule: str = "absmax"
    eps: float = TINY
    compute: str = "fp32"
    estimator: str = "ste"
    noise: str = "none"
    rectified: bool = False

    def __post_init__(self) -> None:
        def fail(field: str, want: str, hint: str = "") -> None:
            raise ValueError(f"QuantSpec: {field} must be {want}, got {getattr(self, field)!r}{hint}")

        for field, choices in _CHOICES.items():
            if getattr(self, field) not in choices:
                fail(field, "one of " + ", ".join(map(repr, choices)))
        if not _is_int(self.bits) or not 1 <= self.bits <= 16:
            fail("bits", "an integer from 1 to 16")
        if self.format != "int":
            width = _WIDTHS[self.format]
            if self.bits not in (width, QuantSpec.bits):
                fail("bits", f"{width} with format={self.format!r}", "; leave it out")
            object.__setattr__(self, "bits", width)
            for field, want in (("signed", True), ("narrow", False), ("symmetric", True), ("inf", "saturate")):
                if getattr(self, field) != want:
                    fail(field, f"{want!r} with format={self.format!r}")
        if self.noise != "none" and self.rounding == "stochastic":
            fail("rounding", f"'even' or 'away' with noise={self.noise!r}", ": one draw an element")
        if self.compute == "input" and (self.noise != "none" or self.rounding == "stochastic"):
            fail(
                "compute", "'fp32' with noise or stochastic rounding", ": peers that round every operation draw nothing"
            )
        if self.compute == "input" and self.format not in ("int", "ternary"):
            fail("compute", f"'fp32' with format={self.format!r}")
        for field in ("signed", "narrow", "symmetric", "signed_zero", "rectified"):
            if not isinstance(getattr(self, field), bool):
                fail(field, "True or False")
        if self.rectified:
            chance = self.noise != "none" or self.rounding == "stochastic"
            if chance or self.format not in ("int", "ternary") or self.estimator in ("pact", "ewgs"):
                fail("rectified", "False with chance, a floating-point format, or estimator 'pact' or 'ewgs'")
        if self.arithmetic == "inverse":
            for field, want in (("noise", "none"), ("estimator", "ste"), ("symmetric", True), ("scale_is", "s")):
                if getattr(self, field) != want:
                    fail(field, f"{want!r} with arithmetic='inverse'")
            if self.rounding == "stochastic" or self.format not in ("int", "ternary"):
                fail("arithmetic", "'divide' or 'reciprocal' with stochastic rounding or a floating-point format")
        elif self.mask == "absmax":
            fail("mask", "'before', 'after' or 'none'", ": 'absmax' goes with arithmetic='inverse'")
        if self.through == "chain" and (
            self.draws or self.estimator == "ewgs" or self.format not in ("int", "ternary")
        ):
            fail("through", "'exact' with chance, estimator='ewgs' or a floating-point format")
        if self.scale_rule == "even" and self.format not in MINIFLOATS:
            fail("scale_rule", f"another with format={self.format!r}", ": 'even' rounds to the mantissa of a minifloat")
        if self.narrow and self.bits == 1 and self.format == "int":
            fail("narrow", "False with bits=1", ": a single code would be left")
        if self.axis is not None and not _is_int(self.axis):
            fail("axis", "None or an integer")
        if self.group is not None and (not _is_int(self.group) or self.group < 1):
            fail("group", "None or a positive integer")
        if self.group is not None and self.axis is not None:
            fail("group", "None when axis is given", ": groups run along the last axis and have a scale each")
        if isinstance(self.grad_scale, str):
            if self.grad_scale not in ("none", "lsq", "lsq_channel"):
                fail("grad_scale", "'none', 'lsq', 'lsq_channel' or a number")
        elif isinstance(self.grad_scale, bool) or not isinstance(self.grad_scale, (int, float)):
            fail("grad_scale", "'none', 'lsq', 'lsq_channel' or a number")
        elif not math.isfinite(self.grad_scale):
            fail("grad_scale", "finite")
        if self.estimator == "ste" and self.grad_scale != "none":
            fail("grad_scale", "'none' with estimator='ste'", ": its scale is a constant; estimator='lsq' trains it")
        if isinstance(self.eps, bool) or not isinstance(self.eps, (int, float)) or not TINY <= self.eps < math.inf:
            fail("eps", "a number of at least 2**-126 (1/scale must stay finite)")
        # No part of the value: the rules, read at every call, and checked calls by metadata (fastflat.functional).
        object.__setattr__(self, "_rules", self._chosen_rules())
        object.__setattr__(self, "_plans", {})
        if self.symmetric and self.zero != "outside":
            fail("zero", "'outside' when symmetric=True", ": a symmetric grid has no zero-point; pass symmetric=False")

    # Named forms ------------------------------------------------------------------------------------------------

    @classmethod
    def lsq(cls, bits: int = 4, signed: bool = True, axis: int | None = None, **changes: Any) -> QuantSpec:
        """Learned step size as in the paper (Esser et al., ICLR 2020, eq. 1-5): ``y = round(clamp(x/s)) s``, mask
        before rounding, scale gradient times ``1/sqrt(numel*qmax)``. LSQ+ (Bhalgat et al., 2020) is
        ``lsq(symmetric=False, zero="float")``: its offset is ``-z*s``."""
        form = {"estimator": "lsq", "grad_scale": "lsq", "bits": bits, "signed": signed, "axis": axis}
        return cls(**{**form, **changes})

    @classmethod
    def torch(cls, bits: int = 8, signed: bool = True, axis: int | None = None, **changes: Any) -> QuantSpec:
        """The numbers of ``torch.fake_quantize_per_tensor_affine`` (axis None) and ``..._per_channel_affine``, bit for
        bit in fp32: multiplication by ``1/s``, mask after rounding, NaN to qmin, no -0. Where the per-channel operator
        overflows its 64-bit code (x/s of 2**63 and more, +inf) the result is qmin, here too. With ``estimator="lsq"``
        it follows ``torch._fake_quantize_learnable_*`` for integer zero-points."""
        form = {
            "arithmetic": "reciprocal",
            "mask": "after",
            "nan": "qmin",
            "inf": "saturate" if axis is None else "qmin",
            "signed_zero": False,
            "symmetric": False,
            "bits": bits,
            "signed": signed,
            "axis": axis,
        }
        return cls(**{**form, **changes})

    @classmethod
    def mx(cls, format: str = "e2m1", scale_rule: str = "floor", **changes: Any) -> QuantSpec:
        """Microscaling block format for :func:`fastflat.fake_quantize_dynamic`: blocks of 32 along the last axis with a
        power-of-two (E8M0) scale. MXFP8 is ``"e4m3"`` or ``"e5m2"``, MXFP6 ``"e3m2"`` or ``"e2m3"``, MXFP4 ``"e2m1"``;
        ``scale_rule`` is "floor" (OCP MX v1.0), "ceil", "even" or "rceil". All elements pass their gradient."""
        return cls(**{"format": format, "group": 32, "scale_rule": scale_rule, "mask": "none", **changes})

    @classmethod
    def nvfp4(cls, **changes: Any) -> QuantSpec:
        """NVFP4 for :func:`fastflat.fake_quantize_dynamic`: e2m1 in blocks of 16 with an e4m3 scale each, over one fp32
        scale for the tensor. All elements pass their gradient."""
        return cls(**{"format": "e2m1", "group": 16, "scale_rule": "e4m3", "mask": "none", **changes})

    @classmethod
    def torchao(cls, bits: int = 4, signed: bool = True, axis: int | None = None, **changes: Any) -> QuantSpec:
        """The numbers of torchao's integer fake-quantization (``_fake_quantize_affine`` in the integer domain, which
        ``IntxFakeQuantizer`` runs), with fp32 scales: multiplication by 1/s, mask after rounding, gradient through the
        chain of operations, no -0. Scales of 16 bits: ``compute="input"``. Range learning: ``estimator="lsq"``, with a
        zero-point ``zero="outside_float"``. torchao has no gradient factor."""
        form = {
            "arithmetic": "reciprocal",
            "mask": "after",
            "through": "chain",
            "signed_zero": False,
            "symmetric": False,
            "bits": bits,
            "signed": signed,
            "axis": axis,
        }
        return cls(**{**form, **changes})

    @classmethod
    def brevitas(
        cls, bits: int = 4, signed: bool = True, axis: int | None = None, *, weight: bool = True, **changes: Any
    ) -> QuantSpec:
        """The numbers of Brevitas' ``IntQuant``: division, zero-point as it is, gradient through the chain of
        operations. ``weight`` is the form of its weight quantizers (``TensorClampSte``: all elements pass their
        gradient; narrow grid when signed), ``weight=False`` that of activations (``TensorClamp``: mask after rounding,
        NaN passes). In 16 bit: ``compute="input"``. Learned scales: ``estimator="lsq"``. Pass a zero-point of 0, as
        Brevitas does, for its sign of zero."""
        clamp = {"mask": "none", "narrow": signed} if weight else {"mask": "after", "nan_gradient": "pass"}
        form = {
            "zero": "float",
            "through": "chain",
            "symmetric": False,
            "bits": bits,
            "signed": signed,
            "axis": axis,
        }
        return cls(**{**form, **clamp, **changes})

    @classmethod
    def modelopt(cls, bits: int = 8, signed: bool = True, axis: int | None = None, **changes: Any) -> QuantSpec:
        """The numbers of NVIDIA Model-Optimizer's ``fake_tensor_quant``: the scale tensor holds amax,
        ``k = qmax/amax``, ``y = q / k``; the gradient passes where ``|x| <= amax``; amax of 2**-24 and less gives 0.
        ``pass_through_bwd=True``, the default of its TensorQuantizer, is ``mask="none"``; its ``narrow_range`` is
        ``narrow``."""
        form = {
            "arithmetic": "inverse",
            "mask": "absmax",
            "eps": 2.0**-24,
            "bits": bits,
            "signed": signed,
            "axis": axis,
        }
        return cls(**{**form, **changes})

    def replace(self, **changes: Any) -> QuantSpec:
        """A copy with some fields changed; the result is checked like a new spec."""
        unknown = set(changes) - {f.name for f in dataclasses.fields(self)}
        if unknown:
            raise TypeError(f"QuantSpec.replace: no field {', '.join(sorted(unknown))}")
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain Python values; :meth:`from_dict` gives the same spec back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> QuantSpec:
        """The spec that :meth:`to_dict` described; unknown fields are refused."""
        unknown = set(values) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"QuantSpec.from_dict: unknown field {', '.join(sorted(unknown))}")
        return cls(**values)

    def __reduce__(self) -> tuple:
        return (QuantSpec.from_dict, (self.to_dict(),))

    # Derived values ---------------------------------------------------------------------------------------------

    @property
    def qmin(self) -> int | float:
        """Lowest value of the grid in units of the scale; a float for a minifloat format."""
        if self.format != "int":
            return -self.qmax
        return -(1 << (self.bits - 1)) + int(self.narrow) if self.signed else 0

    @property
    def qmax(self) -> int | float:
        """Highest value of the grid in units of the scale; a float for a minifloat format."""
        if self.format in MINIFLOATS:
            return MINIFLOATS[self.format][0]
        if self.format != "int":
            return 1
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1 - int(self.narrow)

    @property
    def ends(self) -> tuple[int, int]:
        """qmin and qmax as the raw ops take them; minifloat formats have their own."""
        return (-1, 1) if self.format in MINIFLOATS else (self.qmin, self.qmax)

    @property
    def draws(self) -> bool:
        """Whether a call draws random numbers."""
        return self.noise != "none" or self.rounding == "stochastic"

    @property
    def trains_scale(self) -> bool:
        """Whether scale and zero-point get gradients."""
        return self.estimator != "ste"

    def evaluation(self) -> QuantSpec:
        """The same quantizer without chance: no noise, ties to even in place of stochastic rounding."""
        if not self.draws:
            return self
        return self.replace(noise="none", rounding="even" if self.rounding == "stochastic" else self.rounding)

    @property
    def general(self) -> bool:
        """Whether a call needs the general_quantize ops; the others have a faster form."""
        return self.rules > 0xFF or self.estimator == "ewgs"

    @property
    def rules(self) -> int:
        """The rule as the bit set that the raw ops take (:data:`RULES`)."""
        return self._rules

    def _chosen_rules(self) -> int:
        chosen = (
            ("reciprocal", self.arithmetic == "reciprocal"),
            ("zero_inside", self.zero in ("inside", "float")),
            ("zero_float", self.zero in ("float", "outside_float")),
            ("mask_after", self.mask == "after"),
            ("mask_none", self.mask == "none"),
            ("nan_qmin", self.nan == "qmin"),
            ("inf_qmin", self.inf == "qmin"),
            ("positive_zero", not self.signed_zero),
            ("round_away", self.rounding == "away"),
            ("round_stochastic", self.rounding == "stochastic"),
            ("pact", self.estimator == "pact"),
            ("compute_input", self.compute == "input"),
            ("through_chain", self.through == "chain"),
            ("inverse", self.arithmetic == "inverse"),
            ("mask_absmax", self.mask == "absmax"),
            ("nan_passes", self.nan_gradient == "pass"),
            ("rectified", self.rectified),
            (f"noise_{self.noise}", self.noise != "none"),
            (self.format, self.format not in ("int", "ternary")),
        )
        return sum(RULES[name] for name, on in chosen if on)

    def grad_factor(self, numel: int, scales: int) -> float:
        """Factor of the gradients of scale and zero-point for `numel` elements that share `scales` scales."""
        if not isinstance(self.grad_scale, str):
            return float(self.grad_scale)
        if self.grad_scale == "none" or numel == 0:
            return 1.0
        shared = numel if self.grad_scale == "lsq" else numel / scales
        return 1.0 / math.sqrt(shared * max(self.qmax, 1))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

# SPDX-License-Identifier: Apache-2.0
"""Bits of the ``rules`` argument of the raw ops; a test compares them with fastflat's table."""

import triton.language as tl

RECIPROCAL = tl.constexpr(1)
ZERO_INSIDE = tl.constexpr(2)
ZERO_FLOAT = tl.constexpr(4)
MASK_AFTER = tl.constexpr(8)
MASK_NONE = tl.constexpr(16)
NAN_QMIN = tl.constexpr(32)
INF_QMIN = tl.constexpr(64)
POSITIVE_ZERO = tl.constexpr(128)
# From here on: the general_quantize family alone.
ROUND_AWAY = tl.constexpr(256)
ROUND_STOCHASTIC = tl.constexpr(512)
PACT = tl.constexpr(1024)
COMPUTE_INPUT = tl.constexpr(2048)
NOISE_UNIFORM = tl.constexpr(4096)
NOISE_NORMAL = tl.constexpr(8192)
NOISE_TEMPER = tl.constexpr(16384)
NOISE_BYPASS = tl.constexpr(32768)
BINARY = tl.constexpr(65536)
E4M3 = tl.constexpr(131072)
E5M2 = tl.constexpr(262144)
E3M2 = tl.constexpr(524288)
E2M3 = tl.constexpr(1048576)
E2M1 = tl.constexpr(2097152)
SCALE_FLOOR = tl.constexpr(4194304)
SCALE_CEIL = tl.constexpr(8388608)
SCALE_EVEN = tl.constexpr(16777216)
SCALE_RCEIL = tl.constexpr(33554432)
SCALE_E4M3 = tl.constexpr(67108864)
THROUGH_CHAIN = tl.constexpr(134217728)
INVERSE = tl.constexpr(268435456)
MASK_ABSMAX = tl.constexpr(536870912)
NAN_PASSES = tl.constexpr(1073741824)
RECTIFIED = tl.constexpr(2147483648)

MINIFLOATS = tl.constexpr(E4M3.value | E5M2.value | E3M2.value | E2M3.value | E2M1.value)
#: Noise that is added before the clamp, which then takes the place of rounding.
ADDITIVE = tl.constexpr(NOISE_UNIFORM.value | NOISE_NORMAL.value)
#: Noise whose uniform draws are centred.
CENTRED = tl.constexpr(NOISE_UNIFORM.value | NOISE_TEMPER.value)
#: What draws at all.
DRAWS = tl.constexpr(ADDITIVE.value | NOISE_TEMPER.value | NOISE_BYPASS.value | ROUND_STOCHASTIC.value)

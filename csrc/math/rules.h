// SPDX-License-Identifier: Apache-2.0
// Bits of the `rules` argument of the raw ops. fastflat/_spec.py holds the same table; a test compares the two.
#pragma once

#include <cstdint>

namespace fastflat::rules {

inline constexpr int64_t reciprocal = 1;       // u = x * (1/s) instead of x / s
inline constexpr int64_t zero_inside = 2;      // r = round(u + z) instead of round(u) + z
inline constexpr int64_t zero_float = 4;       // z as it is, neither rounded nor clamped to the grid
inline constexpr int64_t mask_after = 8;       // gradient where the rounded code is on the grid
inline constexpr int64_t mask_none = 16;       // gradient everywhere
inline constexpr int64_t nan_qmin = 32;        // NaN takes the lowest code instead of staying NaN
inline constexpr int64_t inf_qmin = 64;        // codes of 2^63 and more take the lowest code instead of the highest
inline constexpr int64_t positive_zero = 128;  // -0 results become +0

// From here on: the general_quantize family alone.
inline constexpr int64_t round_away = 256;        // ties away from zero instead of to even
inline constexpr int64_t round_stochastic = 512;  // up with the probability of the fraction
inline constexpr int64_t pact = 1024;             // the scale's gradient comes from elements beyond the grid only
inline constexpr int64_t compute_input = 2048;    // every operation is rounded to the storage type of x
inline constexpr int64_t noise_uniform = 4096;    // y = s clamp(u + nu xi), xi uniform on (-1/2, 1/2)
inline constexpr int64_t noise_normal = 8192;     // the same with xi normal, variance 1/12
inline constexpr int64_t noise_temper = 16384;    // y = Q + a (clip - Q) + nu s xi, xi uniform
inline constexpr int64_t noise_bypass = 32768;    // y = x with probability nu, else Q
inline constexpr int64_t binary = 65536;          // grid {-1, 1}
inline constexpr int64_t e4m3 = 131072;           // minifloat grids: exponent and mantissa bits
inline constexpr int64_t e5m2 = 262144;
inline constexpr int64_t e3m2 = 524288;
inline constexpr int64_t e2m3 = 1048576;
inline constexpr int64_t e2m1 = 2097152;
inline constexpr int64_t scale_floor = 4194304;   // dynamic scale: power of two, floor(log2 absmax) - emax (OCP MX)
inline constexpr int64_t scale_ceil = 8388608;    // power of two, ceil(log2 absmax) - emax
inline constexpr int64_t scale_even = 16777216;   // power of two, absmax rounded to the format's mantissa first
inline constexpr int64_t scale_rceil = 33554432;  // power of two, ceil(log2(absmax / largest value))
inline constexpr int64_t scale_e4m3 = 67108864;   // absmax / largest value rounded to e4m3, over an outer scale (NVFP4)
inline constexpr int64_t through_chain = 134217728;  // dx = m ((gy s) / s), as a chain of eager operations gives it
inline constexpr int64_t inverse = 268435456;      // the scale is a largest magnitude p: k = qmax/p, u = x k, y = d / k
inline constexpr int64_t mask_absmax = 536870912;  // gradient where |x| <= p
inline constexpr int64_t nan_passes = 1073741824;  // NaN passes its gradient
inline constexpr int64_t rectified = 2147483648;   // x is max(x, 0); what is not above 0 passes no gradient

// Rules that only the general_quantize family knows.
inline constexpr int64_t general = ~int64_t{255};

}  // namespace fastflat::rules

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

}  // namespace fastflat::rules

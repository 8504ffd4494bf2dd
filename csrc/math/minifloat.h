// SPDX-License-Identifier: Apache-2.0
// The grids of the small floating-point formats, by one rule: the step at v is 2^(floor(log2 |v|) - mantissa bits), not
// below the subnormal step, so that rounding to a format is rounding to an integer between two exact scalings by powers
// of two. Values: OCP Microscaling Formats v1.0, section 5.3; e4m3 and e5m2: OFP8 v1.0. Results saturate: no format
// here has an infinity as a code.
#pragma once

#include <cstdint>

#include "convert.h"
#include "macros.h"
#include "rules.h"

namespace fastflat {

template <class C>
struct FloatBits;
template <>
struct FloatBits<float> {
  using type = uint32_t;
  static constexpr int mantissa = 23;
  static constexpr uint32_t exponent = 0x7f800000u, inverse = 254u << 23;
};
template <>
struct FloatBits<double> {
  using type = uint64_t;
  static constexpr int mantissa = 52;
  static constexpr uint64_t exponent = 0x7ff0000000000000u, inverse = uint64_t{2046} << 52;
};

// The power of two at or below |v|, for finite normal v; 0 for smaller ones.
template <class C>
FASTFLAT_HD C binade(C v) {
  return bit_cast<C>(bit_cast<typename FloatBits<C>::type>(v) & FloatBits<C>::exponent);
}

// 1/p of a power of two that is neither subnormal nor the largest.
template <class C>
FASTFLAT_HD C inverse_power(C p) {
  return bit_cast<C>(FloatBits<C>::inverse - bit_cast<typename FloatBits<C>::type>(p));
}

template <class C>
struct Minifloat {
  C largest;   // greatest value
  C smallest;  // smallest normal value: the step does not shrink below it
  C unit;      // 2^-mantissa bits

  // The format that the rules name; a grid of {-1, 1} has the steps of none and takes the limits alone.
  FASTFLAT_HD static Minifloat make(int64_t rules) {
    if (rules & rules::e4m3) return {C(448), C(0x1p-6), C(0x1p-3)};
    if (rules & rules::e5m2) return {C(57344), C(0x1p-14), C(0x1p-2)};
    if (rules & rules::e3m2) return {C(28), C(0x1p-2), C(0x1p-2)};
    if (rules & rules::e2m3) return {C(7.5), C(1), C(0x1p-3)};
    if (rules & rules::e2m1) return {C(6), C(1), C(0x1p-1)};
    return {C(1), C(1), C(1)};
  }

  // Distance of neighbours at v.
  FASTFLAT_HD C step(C v) const {
    const C p = binade(v);
    return (p < smallest ? smallest : p) * unit;
  }
};

}  // namespace fastflat

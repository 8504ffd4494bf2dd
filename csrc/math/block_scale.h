// SPDX-License-Identifier: Apache-2.0
// The scale of a block from its largest magnitude, by the rules of the block-scaled formats. Power-of-two scales come
// from the bits of the magnitude in fp32 (OCP Microscaling Formats v1.0, section 6.3, and its variants):
//
//   floor   2^(floor(log2 a) - emax)                 emax = floor(log2 largest value of the format)
//   ceil    2^(ceil(log2 a) - emax)
//   even    floor with a rounded to the mantissa bits of the format first, halves up
//   rceil   2^ceil(log2(a / largest))
//   e4m3    outer * e4m3(clamp(a / largest / outer, 2^-6, 448))    (NVFP4)
//
// Exponents lie in [-126, 127]: E8M0's 2^-127 is below the normal numbers of fp32. NaN stays NaN.
#pragma once

#include <cstdint>

#include "convert.h"
#include "macros.h"
#include "minifloat.h"
#include "round.h"
#include "rules.h"

namespace fastflat {

inline constexpr int64_t powers_of_two =
    rules::scale_floor | rules::scale_ceil | rules::scale_even | rules::scale_rceil;

// Exponent of the power of two at or below v, for v >= 0; -127 below the normal numbers.
FASTFLAT_HD int32_t floor_log2(float v) { return static_cast<int32_t>(bit_cast<uint32_t>(v) >> 23) - 127; }

// The same, above or at v.
FASTFLAT_HD int32_t ceil_log2(float v) {
  return floor_log2(v) + ((bit_cast<uint32_t>(v) & 0x007fffffu) != 0 && floor_log2(v) > -127 ? 1 : 0);
}

template <class C>
FASTFLAT_HD C block_scale(C absmax, C outer, C largest, const Minifloat<C>& format, int64_t rules) {
  if (rules & rules::scale_e4m3) {
    const Minifloat<C> e4m3 = Minifloat<C>::make(rules::e4m3);
    const C wanted = (absmax / largest) / outer;
    const C lifted = wanted < e4m3.smallest ? e4m3.smallest : wanted;
    const C held = lifted > e4m3.largest ? e4m3.largest : lifted;
    const C step = e4m3.step(held);
    return outer * (round_even(held * inverse_power(step)) * step);
  }
  if (!(rules & powers_of_two)) return absmax / (largest < C(1) ? C(1) : largest);
  const float a = static_cast<float>(absmax);
  const int32_t emax = floor_log2(static_cast<float>(largest));
  int32_t e;
  if (rules & rules::scale_rceil) {
    e = ceil_log2(a / static_cast<float>(largest));
  } else if (rules & rules::scale_ceil) {
    e = ceil_log2(a) - emax;
  } else if (rules & rules::scale_even) {
    // Half of the last mantissa bit that the format keeps; the carry into the exponent is the rounding.
    const uint32_t half = 1u << (22 + floor_log2(static_cast<float>(format.unit)));
    e = floor_log2(bit_cast<float>(bit_cast<uint32_t>(a) + half)) - emax;
  } else {
    e = floor_log2(a) - emax;
  }
  e = e < -126 ? -126 : e > 127 ? 127 : e;
  return absmax == absmax ? static_cast<C>(bit_cast<float>(static_cast<uint32_t>(e + 127) << 23)) : absmax;
}

}  // namespace fastflat

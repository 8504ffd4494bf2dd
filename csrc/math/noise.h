// SPDX-License-Identifier: Apache-2.0
// Random draws of the elements of a dense tensor, numbered in storage order. Always fp32; fp64 data takes them widened.
//
//   uniform   element i takes 16 bits k of block i >> 3: with j = i & 7 word j >> 1, its low half where j is even.
//             u = (k + 1/2) / 2^16, in (0, 1); centred xi = u - 1/2, in (-1/2, 1/2): both exact, mean of all k exact.
//   normal    N(0, 1/12), the variance of the centred uniform draw. Block i >> 2 gives two pairs by the rule of Box and
//             Muller: words 0 and 1 elements 0 and 1, words 2 and 3 elements 2 and 3, the cosine the even one. The
//             first word's high 23 bits are the radius, sqrt(-log(u) / 6) with u = (k + 1/2) / 2^23: at most 5.77
//             standard deviations. Of the second word 2 bits are the quadrant and the next 23 the angle in it.
#pragma once

#include <cmath>
#include <cstdint>

#include "convert.h"
#include "elementary.h"
#include "macros.h"
#include "philox.h"

namespace fastflat {

inline constexpr int uniform_per_block = 8, normal_per_block = 4;

// u of 16 bits.
FASTFLAT_HD float uniform_value(uint32_t k) { return (static_cast<float>(static_cast<int32_t>(k)) + 0.5f) * 0x1p-16f; }

// The 16 bits of element j = 0..7 of a block.
FASTFLAT_HD uint32_t uniform_bits(const PhiloxWords& w, int j) {
  const uint32_t word = j < 4 ? (j < 2 ? w.w0 : w.w1) : (j < 6 ? w.w2 : w.w3);
  return j & 1 ? word >> 16 : word & 0xffffu;
}

FASTFLAT_HD float centred_value(uint32_t k) { return uniform_value(k) - 0.5f; }

struct NormalPair {
  float even, odd;
};

FASTFLAT_HD NormalPair normal_pair(uint32_t radius_word, uint32_t angle_word) {
  const float u = (static_cast<float>(static_cast<int32_t>(radius_word >> 9)) + 0.5f) * 0x1p-23f;
  const float radius = std::sqrt(elementary::log_of_normal(u) * -0.16666667f);
  // The quadrant is centred on its axis: f in (-1/2, 1/2) right angles from it.
  const int32_t step = static_cast<int32_t>((angle_word >> 7) & 0x7fffffu) - 0x400000;
  const auto a = elementary::sine_cosine((static_cast<float>(step) + 0.5f) * 0x1p-23f);
  // Quadrants 1 and 3 swap the two; bit 31 turns both round, and a swap one of them.
  const uint32_t cosine = bit_cast<uint32_t>(a.cosine), sine = bit_cast<uint32_t>(a.sine);
  const uint32_t swap = 0u - ((angle_word >> 30) & 1u);
  const uint32_t turned = angle_word & 0x80000000u;
  const uint32_t even = ((cosine & ~swap) | (sine & swap)) ^ (turned ^ (swap & 0x80000000u));
  const uint32_t odd = ((sine & ~swap) | (cosine & swap)) ^ turned;
  return {bit_cast<float>(even) * radius, bit_cast<float>(odd) * radius};
}

// The draws of one element.
FASTFLAT_HD float uniform_at(const PhiloxState& state, uint64_t index) {
  return uniform_value(uniform_bits(philox(state, index >> 3), static_cast<int>(index & 7)));
}

FASTFLAT_HD float centred_at(const PhiloxState& state, uint64_t index) { return uniform_at(state, index) - 0.5f; }

FASTFLAT_HD float normal_at(const PhiloxState& state, uint64_t index) {
  const PhiloxWords w = philox(state, index >> 2);
  const NormalPair pair = index & 2 ? normal_pair(w.w2, w.w3) : normal_pair(w.w0, w.w1);
  return index & 1 ? pair.odd : pair.even;
}

}  // namespace fastflat

// SPDX-License-Identifier: Apache-2.0
// The vector work of Krylov methods and stochastic estimators, element by element.
//
// Signs: +-1 of the elements of a dense tensor, numbered in storage order, 128 of a Philox block: element i takes bit
// i & 31 of word (i >> 5) & 3 of block i >> 7 (math/philox.h), and is -1 where that bit is set.
#pragma once

#include <cstdint>

#include "macros.h"
#include "philox.h"

namespace fastflat {

// The bits of 1 in each storage type, in their order (core/pairs.h).
inline constexpr uint64_t bits_of_one[] = {0x3f800000u, 0x3f80u, 0x3c00u, 0x3ff0000000000000u};

inline constexpr int signs_per_word = 32, signs_per_block = 4 * signs_per_word;

// One term of w - sum_j c[j] q[j]: rounded product, rounded difference. Of a number, or of each in a vector register.
struct Subtract {
  template <class V, class C>
  FASTFLAT_HD V operator()(V w, C c, V q) const {
    return w - c * q;
  }
};

// `one` with the sign of bit k of a word; numbers as their bits, of which the top one is the sign.
template <class Bits>
FASTFLAT_HD Bits signed_one(Bits one, uint32_t word, int k) {
  constexpr int bits = 8 * sizeof(Bits);
  const uint32_t sign = word & (uint32_t{1} << k) ? 0x80000000u : 0u;
  if constexpr (bits > 32) {
    return one | static_cast<Bits>(sign) << (bits - 32);
  } else {
    return static_cast<Bits>(one | static_cast<Bits>(sign >> (32 - bits)));
  }
}

}  // namespace fastflat

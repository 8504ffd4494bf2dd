// SPDX-License-Identifier: Apache-2.0
// Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1,
// 2, 3" (SC11): four random words from a 128-bit counter and a 64-bit key, each counter by itself.
//
// Word order, the same in all backends:
//   key      = {seed bits 0-31, seed bits 32-63}
//   counter  = {block bits 0-31, block bits 32-63, offset bits 0-31, offset bits 32-63}
// where (seed, offset) is the state that an op receives and a block is what one draw serves: eight elements of a
// uniform draw, four of a normal one, in storage order.
#pragma once

#include <cstdint>

#include "macros.h"

namespace fastflat {

struct PhiloxState {
  uint32_t seed_low, seed_high, offset_low, offset_high;

  FASTFLAT_HD static PhiloxState make(int64_t seed, int64_t offset) {
    const uint64_t s = static_cast<uint64_t>(seed), o = static_cast<uint64_t>(offset);
    return {static_cast<uint32_t>(s), static_cast<uint32_t>(s >> 32), static_cast<uint32_t>(o),
            static_cast<uint32_t>(o >> 32)};
  }
};

struct PhiloxWords {
  uint32_t w0, w1, w2, w3;
};

inline constexpr int philox_rounds = 10;
inline constexpr uint32_t philox_multiplier0 = 0xd2511f53u, philox_multiplier1 = 0xcd9e8d57u;
inline constexpr uint32_t philox_step0 = 0x9e3779b9u, philox_step1 = 0xbb67ae85u;

FASTFLAT_HD PhiloxWords philox(PhiloxWords c, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < philox_rounds; ++round) {
    const uint64_t p0 = uint64_t{philox_multiplier0} * c.w0, p1 = uint64_t{philox_multiplier1} * c.w2;
    c = {static_cast<uint32_t>(p1 >> 32) ^ c.w1 ^ key0, static_cast<uint32_t>(p1),
         static_cast<uint32_t>(p0 >> 32) ^ c.w3 ^ key1, static_cast<uint32_t>(p0)};
    key0 += philox_step0;
    key1 += philox_step1;
  }
  return c;
}

// The words of a block.
FASTFLAT_HD PhiloxWords philox(const PhiloxState& state, uint64_t block) {
  return philox({static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), state.offset_low, state.offset_high},
                state.seed_low, state.seed_high);
}

}  // namespace fastflat

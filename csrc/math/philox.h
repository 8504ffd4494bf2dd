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

// The high word of a product. nvcc carries a 64-bit product through the rounds in 64-bit registers.
FASTFLAT_HD uint32_t high_product(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  return __umulhi(a, b);
#else
  return static_cast<uint32_t>((uint64_t{a} * b) >> 32);
#endif
}

FASTFLAT_HD PhiloxWords philox(PhiloxWords c, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < philox_rounds; ++round) {
    c = {high_product(c.w2, philox_multiplier1) ^ c.w1 ^ key0, c.w2 * philox_multiplier1,
         high_product(c.w0, philox_multiplier0) ^ c.w3 ^ key1, c.w0 * philox_multiplier0};
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

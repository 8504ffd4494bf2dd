// SPDX-License-Identifier: Apache-2.0
// The random draws of a pack: of each Philox block that the pack touches one draw, as math/noise.h numbers them.
#pragma once

#include "cuda/launch.cuh"
#include "math/noise.h"

namespace fastflat::cuda {

template <int N>
struct Draws {
  float v[N];
};

__device__ __forceinline__ PhiloxState load_state(const int64_t* state) {
  const int64_t seed = load_parameter(state, 0), offset = load_parameter(state, 1);
  return PhiloxState::make(seed, offset);
}

// The uniform draws of the pack at `offset`, a multiple of N.
template <int N>
__device__ __forceinline__ Draws<N> draw_uniform(const PhiloxState& state, int64_t offset) {
  static_assert(uniform_per_block % N == 0);
  PhiloxWords w = philox(state, static_cast<uint64_t>(offset) / uniform_per_block);
  // The pack's part of the block comes to the front.
  if (N <= 4) {
    w.w0 = offset & 4 ? w.w2 : w.w0;
    w.w1 = offset & 4 ? w.w3 : w.w1;
  }
  if (N <= 2) w.w0 = offset & 2 ? w.w1 : w.w0;
  Draws<N> draws;
#pragma unroll
  for (int k = 0; k < N; ++k) draws.v[k] = uniform_value(uniform_bits(w, k));
  return draws;
}

// The same of normal draws.
template <int N>
__device__ __forceinline__ Draws<N> draw_normal(const PhiloxState& state, int64_t offset) {
  static_assert(N % 2 == 0);
  Draws<N> draws;
#pragma unroll
  for (int first = 0; first < N; first += normal_per_block) {
    PhiloxWords w = philox(state, static_cast<uint64_t>(offset + first) / normal_per_block);
    if (N <= 2) {
      w.w0 = offset & 2 ? w.w2 : w.w0;
      w.w1 = offset & 2 ? w.w3 : w.w1;
    }
    const NormalPair low = normal_pair(w.w0, w.w1);
    draws.v[first] = low.even;
    draws.v[first + 1] = low.odd;
    if constexpr (N > 2) {
      const NormalPair high = normal_pair(w.w2, w.w3);
      draws.v[first + 2] = high.even;
      draws.v[first + 3] = high.odd;
    }
  }
  return draws;
}

}  // namespace fastflat::cuda

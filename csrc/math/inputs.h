// SPDX-License-Identifier: Apache-2.0
// Maps of inputs: noise of a strength for each sample, and a step of a projected attack. Formulas of the ops:
// fastflat/_ops/inputs.py.
#pragma once

#include <cstdint>

#include "elementary.h"
#include "macros.h"
#include "noise.h"

namespace fastflat::inputs {

// How the strength of a sample is drawn.
enum Law : int64_t { constant, uniform, exponential, laws };
enum Norm : int64_t { linf, l2, norms };

// Streams of an op beside that of the noise itself, which has the offset of the state.
inline constexpr int64_t mask_stream = 1, strength_stream = 2;

FASTFLAT_HD PhiloxState stream_of(int64_t seed, int64_t offset, int64_t stream) {
  return PhiloxState::make(seed, static_cast<int64_t>(static_cast<uint64_t>(offset) + static_cast<uint64_t>(stream)));
}

// Draws of K copies of n elements: copy k begins at k times this, a block.
FASTFLAT_HD int64_t draws_of_copy(int64_t n) {
  return (n + uniform_per_block - 1) / uniform_per_block * uniform_per_block;
}

// Of sample `index`: 23 bits of a word of block index >> 2.
FASTFLAT_HD float strength(const PhiloxState& state, int64_t law, float most, int64_t index) {
  const PhiloxWords w = philox(state, static_cast<uint64_t>(index) >> 2);
  const int64_t j = index & 3;
  const uint32_t word = j < 2 ? (j == 0 ? w.w0 : w.w1) : (j == 2 ? w.w2 : w.w3);
  const float u = (static_cast<float>(static_cast<int32_t>(word >> 9)) + 0.5f) * 0x1p-23f;
  const float drawn = law == uniform ? most * u : most * -elementary::log_of_normal(u);
  return law == constant ? most : drawn;
}

// Draws have variance 1/12: what a strength multiplies them with.
FASTFLAT_HD float factor_of(float strength) { return strength * 3.4641016f; }

// x with noise where the element is kept; `draw` and `factor` are fp32 for every type of x.
template <class C>
FASTFLAT_HD C noisy(C x, float factor, float draw, bool kept) {
  const C v = x + static_cast<C>(factor * draw);
  return kept ? v : x;
}

template <class C>
FASTFLAT_HD C held(C v, C low, C high) {
  const C raised = v < low ? low : v;
  return raised > high ? high : raised;
}

// A step along the sign of the gradient, then back into the box around x0 and into [low, high].
template <class C>
struct SignStep {
  C step, eps, low, high;

  FASTFLAT_HD C operator()(C xa, C x0, C g) const {
    // The sign of +-0 is that zero, of NaN is NaN.
    const C sign = g > C(0) ? C(1) : g < C(0) ? C(-1) : g;
    const C moved = held((xa + step * sign) - x0, -eps, eps);
    return held(x0 + moved, low, high);
  }
};

// A step along the gradient over its norm, then back into the ball: `scale` is the step over the norm of g, `shrink`
// what the distance from x0 is multiplied with.
template <class C>
struct NormStep {
  C scale, shrink, low, high;

  // 0 where the norm is 0.
  FASTFLAT_HD static C scale_of(C step, C norm) { return norm == C(0) ? C(0) : step / norm; }
  FASTFLAT_HD static C shrink_of(C eps, C distance) { return distance > eps ? eps / distance : distance * C(0) + C(1); }

  FASTFLAT_HD C distance(C xa, C x0, C g) const { return (xa + scale * g) - x0; }
  FASTFLAT_HD C operator()(C xa, C x0, C g) const { return held(x0 + shrink * distance(xa, x0, g), low, high); }
};

}  // namespace fastflat::inputs

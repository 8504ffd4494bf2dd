// SPDX-License-Identifier: Apache-2.0
// The ascent of sharpness-aware minimisation, element by element, and what its norm adds up.
//
//   metric   term of the norm squared   perturbation e
//   l2       g^2                        s g
//   scaled   (t g)^2, t = |w| + eta     s t^2 g          (adaptive SAM; eta = 0 is its plain form)
//   linf     none                       s sign(g)
//
// s = rho / (norm + eps), 0 where the norm is 0, infinite or NaN; linf has s = rho.
#pragma once

#include <cmath>
#include <cstdint>

#include "convert.h"
#include "macros.h"

namespace fastflat {

enum Metric : int64_t { metric_l2, metric_scaled, metric_linf };

// What sharpness_sums adds up for a tensor g and its partner o, three numbers.
enum SumKind : int64_t {
  sum_gradient,  // {g g, 0, 0}, o is not read
  sum_pair,      // {g g, g o, o o}
  sum_scaled,    // {(t g)^2, 0, 0}, t = |o| + eta
};

template <class C>
FASTFLAT_HD C magnitude(C v) {
  return v < C(0) ? -v : v == C(0) ? C(0) : v;
}

template <class C>
struct Ascent {
  C scale, eta;
  int64_t metric;

  FASTFLAT_HD C direction(C w, C g) const {
    if (metric == metric_scaled) {
      const C t = magnitude(w) + eta;
      return (t * t) * g;
    }
    // The sign of +-0 is that zero, of NaN is NaN.
    const C sign = g > C(0) ? C(1) : g < C(0) ? C(-1) : g;
    return metric == metric_linf ? sign : g;
  }
  // A scale of 0 comes of a norm that is not finite: 0 times such a gradient would be NaN.
  FASTFLAT_HD C operator()(C w, C g) const {
    const C risen = w + scale * direction(w, g);
    return scale == C(0) ? w : risen;
  }
};

// rho over the norm; `total` is the norm squared, or any finite number for linf.
FASTFLAT_HD double ascent_scale(double rho, double total, double eps, bool linf) {
  const double norm = std::sqrt(total);
  const bool usable = norm <= 1.7976931348623157e308;
  if (linf) return usable ? rho : 0.0;
  return usable && norm > 0.0 ? rho / (norm + eps) : 0.0;
}

// Bits of v rounded to bfloat16 up or down with the chances that its mean is v; `random` holds 16 bits. Infinities and
// NaN as to_bfloat16.
FASTFLAT_HD BFloat16 to_bfloat16_stochastic(float v, uint32_t random) {
  const uint32_t u = bit_cast<uint32_t>(v);
  const uint32_t up = random < (u & 0xffffu) ? 1u : 0u;
  const bool special = (u & 0x7f800000u) == 0x7f800000u;
  return {special ? to_bfloat16(v).bits : static_cast<uint16_t>((u >> 16) + up)};
}

}  // namespace fastflat

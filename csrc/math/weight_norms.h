// SPDX-License-Identifier: Apache-2.0
// Moments and norms of a weight matrix and their gradient, and a saturating nonlinearity. Formulas of the ops:
// fastflat/_ops/weight_norms.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "elementary.h"
#include "macros.h"

namespace fastflat::weight_norms {

template <class C>
FASTFLAT_HD C magnitude_of(C v) {
  return v < C(0) ? -v : v;
}

// m3 over m2^(3/2); 0 of a constant row.
template <class C>
FASTFLAT_HD C skewness(C m2, C m3) {
  return m2 == C(0) ? C(0) : m3 / (m2 * std::sqrt(m2));
}

// Gradient to an element of a row: a + d (b + c d), d its distance from the mean, and what its sign takes.
template <class C>
struct RowGradient {
  C mean, a, b, c, of_row, most, of_most;

  FASTFLAT_HD static RowGradient make(C n, C mean, C var, C skew, C g_mean, C g_var, C g_skew, C of_row, C most,
                                      C of_most) {
    const bool spread = var != C(0);
    const C by_root = spread ? g_skew / (var * std::sqrt(var)) : C(0);
    const C by_var = spread ? (C(3) * (g_skew * skew)) / var : C(0);
    return {
        mean,   (g_mean - C(3) * (by_root * var)) / n, (C(2) * g_var - by_var) / n, (C(3) * by_root) / n, of_row, most,
        of_most};
  }
  FASTFLAT_HD C operator()(C w, C of_column) const {
    const C d = w - mean;
    const C sign = w > C(0) ? C(1) : w < C(0) ? C(-1) : C(0);
    const C norms = (of_row + of_column) + (magnitude_of(w) == most ? of_most : C(0));
    return (a + d * (b + c * d)) + sign * norms;
  }
};

// tanh with all its digits near 0, by a ratio of polynomials (Lambert's continued fraction, seven levels); relative
// error below 2^-53 for |x| < 1/2, beyond that of elementary::tanh.
template <class C>
FASTFLAT_HD C tanh(C x) {
  const C z = x * x;
  const C above = x * (C(135135) + z * (C(17325) + z * (C(378) + z)));
  const C below = C(135135) + z * (C(62370) + z * (C(3150) + z * C(28)));
  const C far = elementary::tanh(x);
  return magnitude_of(x) < C(0.5) ? above / below : far;
}

template <class C>
struct Saturate {
  C alpha;

  FASTFLAT_HD C operator()(C w) const { return alpha * tanh(w / alpha); }
  FASTFLAT_HD C backward(C g, C w, C& of_alpha) const {
    const C x = w / alpha;
    const C t = tanh(x);
    const C slope = C(1) - t * t;
    of_alpha = g * (t - x * slope);
    return g * slope;
  }
};

}  // namespace fastflat::weight_norms

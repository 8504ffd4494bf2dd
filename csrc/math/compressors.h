// SPDX-License-Identifier: Apache-2.0
// Codes of compressed gradients. Of an element p = g + e a few bits are stored, c levels of its bucket's unit:
//
//   sign     (levels 0)   c = -1 where p < 0, else 1; stored 0 or 1
//   levels   (1 to 127)   a = |p| / unit, at most `levels`; c = sign(p) (floor(a) + [u < a - floor(a)]), stored c +
//   levels
//
// What is sent is unit c. A bucket whose unit is not finite sends that unit, and what it had left over stays as it was.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "macros.h"

namespace fastflat::compressors {

inline constexpr int64_t most_levels = 127;

// Norms of a bucket that its unit is made of.
enum Norm : int64_t { mean, l2, largest, norms };

// Bits of a stored code.
FASTFLAT_HD int width_of(int64_t levels) { return levels == 0 ? 1 : levels == 1 ? 2 : levels <= 7 ? 4 : 8; }

// c of a stored code: stored * step - offset.
struct Grid {
  int32_t step, offset;
  FASTFLAT_HD static Grid of(int64_t levels) {
    return levels == 0 ? Grid{2, 1} : Grid{1, static_cast<int32_t>(levels)};
  }
};

template <class C>
FASTFLAT_HD bool finite(C v) {
  return std::fabs(v) <= std::numeric_limits<C>::max();
}

template <class C>
FASTFLAT_HD int32_t stored_sign(C p) {
  return p < C(0) ? 0 : 1;
}

template <class C>
FASTFLAT_HD int32_t stored_level(C p, C unit, float u, C levels) {
  const C ratio = std::fabs(p) / unit;
  const C held = ratio < levels ? ratio : levels;
  const C a = unit > C(0) && finite(unit) ? held : C(0);
  const int32_t whole = static_cast<int32_t>(a);
  const int32_t level = whole + (static_cast<C>(u) < a - static_cast<C>(whole) ? 1 : 0);
  return (p < C(0) ? -level : level) + static_cast<int32_t>(levels);
}

// What is left of p = g + e when unit c was sent.
template <class C>
FASTFLAT_HD C left_over(C p, C e, C unit, int32_t c) {
  const C rest = p - unit * static_cast<C>(c);
  return finite(unit) ? rest : e;
}

// The same of one of the largest, sent as v: nothing of what is not finite.
template <class C>
FASTFLAT_HD C left_of_largest(C p, C v) {
  const C rest = p - v;
  return finite(rest) ? rest : C(0);
}

// The unit, from sums over a bucket of n elements, of |p| and of p^2, and the largest |p|. With clip > 0 the largest is
// at most `clip` times the root of the mean square.
FASTFLAT_HD double unit_of(int64_t norm, int64_t levels, double clip, double n, double sum, double squares,
                           double most) {
  double size = most;
  if (norm == mean) size = sum / n;
  if (norm == l2) size = std::sqrt(squares);
  if (norm == largest && clip > 0.0) {
    const double limit = clip * std::sqrt(squares / n);
    size = most > limit ? limit : most;
  }
  return levels > 1 ? size / static_cast<double>(levels) : size;
}

}  // namespace fastflat::compressors

// SPDX-License-Identifier: Apache-2.0
// Weights as a sum of N bit planes, each plane the difference of two soft bits and with a soft mask:
//
//   w = step sum_b 2^(N-1-b) M_b (bit(p_b) - bit(q_b)),   step = s / (2^N - 1)
//   bit(t) = sigmoid(beta t), hard: 1{t > 0};   M_b = sigmoid(beta m_b), hard: 1{m_b > 0}
//
// Planes are added in the order b = 0 ... N-1. NaN in a latent stays NaN, hard bits included.
#pragma once

#include <cstdint>

#include "elementary.h"
#include "macros.h"

namespace fastflat {

inline constexpr int most_planes = 16;

// A bit and its derivative by beta t.
template <class C>
struct Bit {
  C value, slope;
};

template <class C>
FASTFLAT_HD C hard_bit(C t) {
  return t > C(0) ? C(1) : (t <= C(0) ? C(0) : t);
}

// The value has the bits of elementary::sigmoid. The slope is sigmoid(x) sigmoid(-x), exact to a few units in the last
// place where sigmoid(x) (1 - sigmoid(x)) has cancelled to 0.
template <class C>
FASTFLAT_HD Bit<C> soft_bit(C x) {
  using F = elementary::Format<C>;
  const C e = elementary::exp(bit_cast<C>(bit_cast<typename F::Bits>(x) | F::sign));
  const C below = e / (C(1) + e), above = C(1) / (C(1) + e);
  return {x < C(0) ? below : above, below * above};
}

// What all elements of one plane share.
template <class C>
struct Plane {
  C weight;   // 2^(N-1-b) M_b
  C slope;    // step weight beta: of w by the slope of a bit
  C by_mask;  // step 2^(N-1-b) dM_b/dm_b
};

template <class C>
struct BitPlanes {
  int planes;
  C beta, levels, step;  // levels = 2^N - 1

  static FASTFLAT_HD BitPlanes make(int planes, C scale, C beta) {
    const C levels = static_cast<C>((1 << planes) - 1);
    return {planes, beta, levels, scale / levels};
  }

  FASTFLAT_HD Plane<C> plane(int b, C m, bool hard_mask) const {
    const C power = static_cast<C>(1 << (planes - 1 - b));
    const Bit<C> soft = soft_bit(beta * m);
    const C weight = power * (hard_mask ? hard_bit(m) : soft.value);
    return {weight, (step * weight) * beta, step * (power * (hard_mask ? C(0) : beta * soft.slope))};
  }

  // Value of a bit alone; `hard` is a constant of the loop.
  FASTFLAT_HD C value(C t, bool hard) const { return hard ? hard_bit(t) : elementary::sigmoid(beta * t); }
  FASTFLAT_HD Bit<C> bit(C t, bool hard) const { return hard ? Bit<C>{hard_bit(t), C(0)} : soft_bit(beta * t); }

  // One more plane on top of the sum so far, and the weight that a whole sum is.
  FASTFLAT_HD C add(C sum, const Plane<C>& plane, C p, C q, bool hard) const {
    return sum + plane.weight * (value(p, hard) - value(q, hard));
  }
  FASTFLAT_HD C weight(C sum) const { return step * sum; }

  // Gradients of p and q for the cotangent g of w, and the element's share of D_b = sum_k g (bit(p) - bit(q)).
  struct Gradient {
    C p, q, share;
  };
  FASTFLAT_HD Gradient backward(const Plane<C>& plane, C g, C p, C q, bool hard) const {
    const Bit<C> first = bit(p, hard), second = bit(q, hard);
    const C share = g * (first.value - second.value);
    if (hard) return {C(0), C(0), share};
    const C along = g * plane.slope;
    return {along * first.slope, -(along * second.slope), share};
  }

  // From D_b: the gradient of m_b, and the share of the gradient of s, which is the sum of these over levels.
  FASTFLAT_HD static C mask_gradient(const Plane<C>& plane, double d, bool hard_mask) {
    return hard_mask ? C(0) : plane.by_mask * static_cast<C>(d);
  }
  FASTFLAT_HD static double scale_share(const Plane<C>& plane, double d) {
    return static_cast<double>(plane.weight) * d;
  }
  FASTFLAT_HD C scale_gradient(double sum) const { return static_cast<C>(sum) / levels; }

  // Factor of bit(p) - bit(q) in the tangent of w for the tangents of m_b and s.
  FASTFLAT_HD C lift(const Plane<C>& plane, C tm, C ts) const { return plane.by_mask * tm + plane.weight * (ts / levels); }
  // One more plane on top of the tangent so far.
  FASTFLAT_HD C add_tangent(C sum, const Plane<C>& plane, C lift, C tp, C tq, C p, C q, bool hard) const {
    const Bit<C> first = bit(p, hard), second = bit(q, hard);
    const C moved = lift * (first.value - second.value);
    if (hard) return sum + moved;
    return sum + (plane.slope * (first.slope * tp - second.slope * tq) + moved);
  }
};

}  // namespace fastflat

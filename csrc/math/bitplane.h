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

template <class C>
FASTFLAT_HD C hard_bit(C t) {
  return t > C(0) ? C(1) : (t <= C(0) ? C(0) : t);
}

// exp(-x) for the bit sigmoid(x) = 1 / (1 + exp(-x)), as 2^u with u = rate t. u is held within +-62 (+-510 in fp64),
// where bits are 0 or 1 to far beyond rounding: so two of them multiply without overflow, and nothing is subnormal,
// which some processors make slowly.
template <class C>
FASTFLAT_HD C odds(C rate, C t) {
  using F = elementary::Format<C>;
  using Bits = typename F::Bits;
  constexpr C most = sizeof(C) == 8 ? C(510) : C(62);
  constexpr C ln2 = sizeof(C) == 8 ? C(0.6931471805599453) : C(0.6931472f);
  const C u = rate * t;
  const C raised = u < -most ? -most : u;
  const C held = raised > most ? most : raised;
  const C shifted = held + F::magic;
  const C r = (held - (shifted - F::magic)) * ln2;
  const C e = C(1) + (r + (r * r) * elementary::exp_tail(r));
  // The low bits of `shifted` are the exponent; what `magic` adds to them falls out at the top.
  return e * bit_cast<C>((bit_cast<Bits>(shifted) << F::mantissa) + (F::bias << F::mantissa));
}

// bit(p) - bit(q) from their odds: one division, and no digits lost where both are close to 1.
template <class C>
FASTFLAT_HD C soft_difference(C a, C b) {
  return (b - a) * (C(1) / ((C(1) + a) * (C(1) + b)));
}

// The same with the derivatives by beta p and beta q, bit (1 - bit), which keep their digits at both ends.
template <class C>
struct SoftBits {
  C difference, first_slope, second_slope;
};
template <class C>
FASTFLAT_HD SoftBits<C> soft_bits(C a, C b) {
  const C ua = C(1) + a, ub = C(1) + b;
  const C inverse = C(1) / (ua * ub);
  const C first = inverse * ub, second = inverse * ua;
  return {(b - a) * inverse, (a * first) * first, (b * second) * second};
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
  C beta, rate, levels, step;  // rate = -beta log2(e), levels = 2^N - 1

  static FASTFLAT_HD BitPlanes make(int planes, C scale, C beta) {
    const C levels = static_cast<C>((1 << planes) - 1);
    return {planes, beta, -(beta * elementary::Format<C>::log2_e), levels, scale / levels};
  }

  FASTFLAT_HD Plane<C> plane(int b, C m, bool hard_mask) const {
    const C power = static_cast<C>(1 << (planes - 1 - b));
    const C a = odds(rate, m);
    const C soft = C(1) / (C(1) + a);
    const C weight = power * (hard_mask ? hard_bit(m) : soft);
    return {weight, (step * weight) * beta, step * (power * (hard_mask ? C(0) : beta * ((a * soft) * soft)))};
  }

  // `hard` is a constant of the loop, here and below.
  FASTFLAT_HD C difference(C p, C q, bool hard) const {
    return hard ? hard_bit(p) - hard_bit(q) : soft_difference(odds(rate, p), odds(rate, q));
  }
  FASTFLAT_HD SoftBits<C> bits(C p, C q, bool hard) const {
    return hard ? SoftBits<C>{hard_bit(p) - hard_bit(q), C(0), C(0)} : soft_bits(odds(rate, p), odds(rate, q));
  }

  // One more plane on top of the sum so far, and the weight that a whole sum is.
  FASTFLAT_HD C add(C sum, const Plane<C>& plane, C p, C q, bool hard) const {
    return sum + plane.weight * difference(p, q, hard);
  }
  FASTFLAT_HD C weight(C sum) const { return step * sum; }

  // Gradients of p and q for the cotangent g of w, and the element's share of D_b = sum_k g (bit(p) - bit(q)).
  struct Gradient {
    C p, q, share;
  };
  FASTFLAT_HD Gradient backward(const Plane<C>& plane, C g, C p, C q, bool hard) const {
    const SoftBits<C> bit = bits(p, q, hard);
    const C share = g * bit.difference;
    if (hard) return {C(0), C(0), share};
    const C along = g * plane.slope;
    return {along * bit.first_slope, -(along * bit.second_slope), share};
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
  FASTFLAT_HD C lift(const Plane<C>& plane, C tm, C ts) const {
    return plane.by_mask * tm + plane.weight * (ts / levels);
  }
  // One more plane on top of the tangent so far.
  FASTFLAT_HD C add_tangent(C sum, const Plane<C>& plane, C lift, C tp, C tq, C p, C q, bool hard) const {
    const SoftBits<C> bit = bits(p, q, hard);
    const C moved = lift * bit.difference;
    if (hard) return sum + moved;
    return sum + (plane.slope * (bit.first_slope * tp - bit.second_slope * tq) + moved);
  }
};

}  // namespace fastflat

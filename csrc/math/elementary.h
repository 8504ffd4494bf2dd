// SPDX-License-Identifier: Apache-2.0
// Elementary functions with the same bits on every target: additions, subtractions, multiplications, divisions and
// integer operations on the representation, each an IEEE operation, in one order that the reference and the Triton
// kernels repeat. No libm, no fused operations, no branch that depends on data.
//
// Largest error in units in the last place; fp32 is exhaustive over all 2^32 inputs, fp64 sampled (tests/cpp):
//
//             fp32     fp64
//   exp       0.99     0.95     subnormal results included; overflow to infinity, underflow to 0
//   sigmoid   2.41     2.39     subnormal results included
//   log       0.84     0.86     log(+-0) = -inf, log(x < 0) = NaN
//   sine      1.65     1.62     of f right angles, |f| <= 1/2
//   cosine    1.13     1.13     the same
//
// normal and tanh serve derivatives, near 1: their error is absolute, below 2^-21.9 (fp32) and 2^-51 (fp64).
//
// NaN gives NaN.
#pragma once

#include <cstdint>

#include "convert.h"
#include "macros.h"

namespace fastflat::elementary {

// The representation: `magic` = 1.5 * 2^mantissa turns a small number into an integer in its low bits, and back.
template <class C>
struct Format;
template <>
struct Format<float> {
  using Bits = uint32_t;
  static constexpr int mantissa = 23;
  static constexpr Bits bias = 127;
  static constexpr Bits infinity = 0x7f800000u, nan = 0x7fc00000u, sign = 0x80000000u;
  static constexpr Bits sqrt_half = 0x3f3504f3u;
  static constexpr float magic = 12582912.0f;
  static constexpr float smallest_normal = 1.17549435e-38f;
  static constexpr float lift = 16777216.0f, lift_exponent = 24.0f;  // 2^24: subnormals become normal
  // Below `lowest` exp is less than half the smallest number, above `highest` more than the largest.
  static constexpr float lowest = -105.0f, highest = 89.0f;
  static constexpr float log2_e = 1.442695f;
  // ln 2 in two parts: a product of the first with an exponent is exact.
  static constexpr float ln2_high = 0.693145751953125f, ln2_low = 1.4286068e-06f;
  static constexpr float peak_density = 0.3989423f;  // 1 / sqrt(2 pi)
  // pi / 2 in two parts.
  static constexpr float right_angle = 1.5707964f, right_angle_low = -4.371139e-08f;
};
template <>
struct Format<double> {
  using Bits = uint64_t;
  static constexpr int mantissa = 52;
  static constexpr Bits bias = 1023;
  static constexpr Bits infinity = 0x7ff0000000000000u, nan = 0x7ff8000000000000u, sign = 0x8000000000000000u;
  static constexpr Bits sqrt_half = 0x3fe6a09e667f3bcdu;
  static constexpr double magic = 6755399441055744.0;
  static constexpr double smallest_normal = 2.2250738585072014e-308;
  static constexpr double lift = 18014398509481984.0, lift_exponent = 54.0;  // 2^54
  static constexpr double lowest = -746.0, highest = 710.0;
  static constexpr double log2_e = 1.4426950408889634;
  static constexpr double ln2_high = 0.6931471805592082, ln2_low = 7.371002565167799e-13;
  static constexpr double peak_density = 0.3989422804014327;
  static constexpr double right_angle = 1.5707963267948966, right_angle_low = 6.123233995736766e-17;
};

// c0 + x (c1 + x (c2 + ...))
template <class C>
FASTFLAT_HD C horner(C, C c) {
  return c;
}
template <class C, class... Rest>
FASTFLAT_HD C horner(C x, C c, Rest... rest) {
  return c + x * horner(x, rest...);
}

// Polynomials of least largest error, coefficients rounded to the type; the error each leaves is less than 2^-28 of
// the function in fp32, 2^-58 in fp64.

// (exp(r) - 1 - r) / r^2, |r| <= ln(2) / 2
FASTFLAT_HD float exp_tail(float r) {
  return horner(r, 4.9999994e-01f, 1.6666517e-01f, 4.1668102e-02f, 8.369193e-03f, 1.3838927e-03f);
}
FASTFLAT_HD double exp_tail(double r) {
  return horner(r, 0.5, 0.16666666666666682, 0.041666666666666095, 0.008333333333317035, 0.0013888888889115427,
                0.0001984126989638054, 2.4801586926951727e-05, 2.755723486442574e-06, 2.75575816191314e-07,
                2.5112036170890887e-08, 2.082668869221173e-09);
}

// (log((1 + s) / (1 - s)) / s - 2) / z, z = s^2, |s| <= 3 - sqrt(8)
FASTFLAT_HD float log_tail(float z) { return horner(z, 6.666666e-01f, 4.0000972e-01f, 2.8498793e-01f, 2.4278857e-01f); }
FASTFLAT_HD double log_tail(double z) {
  return horner(z, 0.6666666666666734, 0.3999999999941642, 0.2857142874211116, 0.22222198593865336, 0.18183563548947843,
                0.15314064393661334, 0.1479586134887594);
}

// (sin(pi/2 f) / f - pi/2) / z, z = f^2, |f| <= 1/2
FASTFLAT_HD float sine_tail(float z) { return horner(z, -6.4596367e-01f, 7.9681866e-02f, -4.6060635e-03f); }
FASTFLAT_HD double sine_tail(double z) {
  return horner(z, -0.6459640975062463, 0.07969262624616921, -0.0046817541353737025, 0.0001604411854244899,
                -3.5988469028847546e-06, 5.693163721616766e-08, -6.770366509454037e-10);
}

// (cos(pi/2 f) - 1) / z
FASTFLAT_HD float cosine_tail(float z) {
  return horner(z, -1.2337005e+00f, 2.5366852e-01f, -2.0855254e-02f, 8.935723e-04f);
}
FASTFLAT_HD double cosine_tail(double z) {
  return horner(z, -1.2337005501361697, 0.25366950790104154, -0.020863480763173275, 0.000919260272508224,
                -2.5202026537920282e-05, 4.7103031607185294e-07, -6.285421083052827e-09);
}

// exp(z^2 / 2) (1 - Phi(|z|)) / t, t = 1 / (1 + |z| / 4), Phi the normal distribution; of least error where the density
// is not negligible, and bounded beyond.
FASTFLAT_HD float normal_tail(float t) {
  return horner(t, 0.10056086f, 0.0994751f, 0.06323166f, 0.21965346f, -0.21192595f, 0.3154557f, -0.08645083f);
}
FASTFLAT_HD double normal_tail(double t) {
  return horner(t, 0.09974405444180474, 0.09957072420951622, 0.0949458459803783, 0.07361115764169901,
                0.0876362105855102, -0.004199652280908166, 0.057521102147695714, 0.11124049021178187,
                -0.4202553085646161, 0.7809656074110198, -0.9610002298701803, 0.7791985074278353, -0.413742840754715,
                0.13993655631293495, -0.027609556502353798, 0.002437331602597286);
}

// 2^n for the exponent of a normal number.
template <class C>
FASTFLAT_HD C power_of_two(typename Format<C>::Bits n) {
  return bit_cast<C>((n + Format<C>::bias) << Format<C>::mantissa);
}

template <class C>
FASTFLAT_HD C exp(C x) {
  using F = Format<C>;
  using Bits = typename F::Bits;
  const C raised = x < F::lowest ? F::lowest : x;
  const C held = raised > F::highest ? F::highest : raised;
  const C shifted = held * F::log2_e + F::magic;
  const C whole = shifted - F::magic;
  const C r = (held - whole * F::ln2_high) - whole * F::ln2_low;
  const C p = C(1) + (r + (r * r) * exp_tail(r));
  // Half the exponent at a time: the first product is exact, so that a subnormal result is rounded once.
  const Bits n = bit_cast<Bits>(shifted) - bit_cast<Bits>(F::magic);
  const Bits half = ((n + 4 * F::bias + 4) >> 1) - (2 * F::bias + 2);
  return (p * power_of_two<C>(half)) * power_of_two<C>(n - half);
}

// 1 / (1 + exp(-x)), through exp of what is not positive: neither end loses digits.
template <class C>
FASTFLAT_HD C sigmoid(C x) {
  using F = Format<C>;
  const C e = exp(bit_cast<C>(bit_cast<typename F::Bits>(x) | F::sign));
  return (x < C(0) ? e : C(1)) / (C(1) + e);
}

// Through the sigmoid's exp: near 0 the difference loses relative digits, not absolute ones.
template <class C>
FASTFLAT_HD C tanh(C x) {
  using F = Format<C>;
  const C low = bit_cast<C>(bit_cast<typename F::Bits>(x) | F::sign);
  const C e = exp(low + low);
  return (x < C(0) ? C(-1) : C(1)) * ((C(1) - e) / (C(1) + e));
}

template <class C>
struct Normal {
  C below, density;  // Phi(z), and its derivative
};

// The standard normal distribution.
template <class C>
FASTFLAT_HD Normal<C> normal(C z) {
  using F = Format<C>;
  const C magnitude = bit_cast<C>(bit_cast<typename F::Bits>(z) & ~F::sign);
  const C e = exp(C(-0.5) * (z * z));
  const C t = C(1) / (C(1) + C(0.25) * magnitude);
  const C beyond = e * (t * normal_tail(t));
  return {z < C(0) ? beyond : C(1) - beyond, e * F::peak_density};
}

// Natural logarithm of a positive, finite, normal number; `exponent` is added to that of x.
template <class C>
FASTFLAT_HD C log_of_normal(C x, C exponent = C(0)) {
  using F = Format<C>;
  using Bits = typename F::Bits;
  // x = 2^k (1 + f) with sqrt(1/2) <= 1 + f < sqrt(2); log(1 + f) = 2 artanh(s), s = f / (2 + f).
  const Bits one = F::bias << F::mantissa;
  const Bits above = bit_cast<Bits>(x) + (one - F::sqrt_half);
  const Bits fraction = (above & ((Bits(1) << F::mantissa) - 1)) + F::sqrt_half;
  const Bits n = (above >> F::mantissa) - F::bias;
  const C k = (bit_cast<C>(bit_cast<Bits>(F::magic) + n) - F::magic) + exponent;
  const C f = bit_cast<C>(fraction) - C(1);
  const C s = f / (C(2) + f);
  const C z = s * s;
  const C h = C(0.5) * (f * f);
  const C t = s * (h + z * log_tail(z)) + k * F::ln2_low;
  return k * F::ln2_high - ((h - t) - f);
}

template <class C>
FASTFLAT_HD C log(C x) {
  using F = Format<C>;
  const bool small = x < F::smallest_normal;
  const C finite = log_of_normal(small ? x * F::lift : x, small ? -F::lift_exponent : C(0));
  const C beyond = x < C(0) ? bit_cast<C>(F::nan) : x;
  const C special = x == C(0) ? bit_cast<C>(F::infinity | F::sign) : beyond;
  return (x > C(0)) & (x < bit_cast<C>(F::infinity)) ? finite : special;
}

template <class C>
struct SineCosine {
  C sine, cosine;
};

// Of f right angles, |f| <= 1/2.
template <class C>
FASTFLAT_HD SineCosine<C> sine_cosine(C f) {
  using F = Format<C>;
  const C z = f * f;
  return {f * F::right_angle + f * (F::right_angle_low + z * sine_tail(z)), C(1) + z * cosine_tail(z)};
}

}  // namespace fastflat::elementary

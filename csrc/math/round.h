// SPDX-License-Identifier: Apache-2.0
// Rounding to the nearest integer, ties to even. Every form below gives the same bits (tests/cpp compares them on all
// 2^32 fp32 values); the choice is speed: a hardware instruction where the target has one, additions where it has not.
#pragma once

#include <cmath>

#include "macros.h"

namespace fastflat {

// Adding and taking away 1.5 * 2^(mantissa bits) leaves the nearest integer; beyond 2^(mantissa bits) all values are
// integers already. NaN fails the comparison and stays.
FASTFLAT_HD float round_even_by_addition(float v) {
  const float magic = 8388608.0f;
  const float a = std::fabs(v);
  const float t = (a + magic) - magic;
  return std::copysign(a < magic ? t : a, v);
}

FASTFLAT_HD double round_even_by_addition(double v) {
  const double magic = 4503599627370496.0;
  const double a = std::fabs(v);
  const double t = (a + magic) - magic;
  return std::copysign(a < magic ? t : a, v);
}

#if defined(__CUDA_ARCH__) || defined(__SSE4_1__) || defined(__aarch64__)
#define FASTFLAT_ROUND_INSTRUCTION 1
#endif

FASTFLAT_HD float round_even(float v) {
#ifdef FASTFLAT_ROUND_INSTRUCTION
  return rintf(v);
#else
  return round_even_by_addition(v);
#endif
}

FASTFLAT_HD double round_even(double v) {
#ifdef FASTFLAT_ROUND_INSTRUCTION
  return rint(v);
#else
  return round_even_by_addition(v);
#endif
}

}  // namespace fastflat

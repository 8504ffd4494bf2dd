// SPDX-License-Identifier: Apache-2.0
// Storage types of 16 bits and their conversion from and to fp32, the same on every target: round to nearest, ties to
// even, subnormals kept, overflow to infinity, NaN to a quiet NaN. GPUs have instructions for it, whose NaN alone has
// other bits; elsewhere it is integer arithmetic, which vectorises.
#pragma once

#include <cstdint>
#include <cstring>

#include "macros.h"

namespace fastflat {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

template <class To, class From>
FASTFLAT_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

FASTFLAT_HD float to_float(BFloat16 v) { return bit_cast<float>(static_cast<uint32_t>(v.bits) << 16); }

FASTFLAT_HD BFloat16 to_bfloat16(float v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  BFloat16 t;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(t.bits) : "f"(v));
  return t;
#else
  // One NaN for all: a payload could carry out of the mantissa when rounded.
  const uint32_t u = bit_cast<uint32_t>(v == v ? v : bit_cast<float>(0x7fc00000u));
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
#endif
}

FASTFLAT_HD float to_float(Half v) {
#ifdef __CUDA_ARCH__
  float t;
  asm("cvt.f32.f16 %0, %1;" : "=f"(t) : "h"(v.bits));
  return t;
#else
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(v.bits & 0x7fffu) << 13;
  // Exponents 0 to 30 move by 112 through an exact product, which also normalises subnormals.
  const float scaled = bit_cast<float>(magnitude) * 5.192296858534828e+33f;  // 2^112
  const uint32_t finite = bit_cast<uint32_t>(scaled);
  const uint32_t special = magnitude | 0x7f800000u;
  return bit_cast<float>((magnitude >= 0x0f800000u ? special : finite) | sign);
#endif
}

FASTFLAT_HD Half to_half(float v) {
#ifdef __CUDA_ARCH__
  Half t;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(t.bits) : "f"(v));
  return t;
#else
  const uint32_t u = bit_cast<uint32_t>(v);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t a = u & 0x7fffffffu;
  // Normal results: rebias the exponent and round the 13 dropped bits; a carry out of 65504 gives infinity.
  const uint32_t normal = (a + 0xc8000fffu + ((a >> 13) & 1u)) >> 13;
  // Subnormal results: adding 0.5 aligns the unit in the last place with 2^-24, and the sum rounds to even.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(a) + 0.5f) - 0x3f000000u;
  const uint32_t special = a > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = a < 0x38800000u ? subnormal : normal;
  return {static_cast<uint16_t>((a >= 0x47800000u ? special : finite) | sign)};
#endif
}

// The arithmetic type of a storage type, and loads and stores between them.
template <class Storage>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class Storage>
using compute_t = typename ComputeOf<Storage>::type;

FASTFLAT_HD float load(float v) { return v; }
FASTFLAT_HD double load(double v) { return v; }
FASTFLAT_HD float load(Half v) { return to_float(v); }
FASTFLAT_HD float load(BFloat16 v) { return to_float(v); }

template <class Storage, class Compute>
FASTFLAT_HD Storage store(Compute v);
template <>
FASTFLAT_HD float store<float, float>(float v) {
  return v;
}
template <>
FASTFLAT_HD double store<double, double>(double v) {
  return v;
}
template <>
FASTFLAT_HD Half store<Half, float>(float v) {
  return to_half(v);
}
template <>
FASTFLAT_HD BFloat16 store<BFloat16, float>(float v) {
  return to_bfloat16(v);
}

}  // namespace fastflat

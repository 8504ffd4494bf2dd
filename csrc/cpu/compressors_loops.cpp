// SPDX-License-Identifier: Apache-2.0
// The loops of the compressors family (cpu/compressors.h: for which instruction sets). Data of 16 bits pass through
// buffers, a block at a time; codes are made a byte each and then packed eight at a time.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "core/geometry.h"
#include "cpu/compressors.h"

#if !defined(FASTFLAT_ISA_AVX512)
#include "cpu/isa_begin.h"
#include "math/compressors.h"
#include "math/convert.h"
#include "math/noise.h"

namespace fastflat::cpu {
namespace FASTFLAT_ISA {
namespace {

using namespace compressors;

#include "cpu/in_blocks.h"
#include "cpu/loops.h"
#include "cpu/noise_fill.h"

// One element.
template <class C>
inline C load_from(Storage storage, const void* data, int64_t at) {
  if constexpr (sizeof(C) == 4) {
    if (storage == bf16) return load(static_cast<const BFloat16*>(data)[at]);
    if (storage == f16) return load(static_cast<const Half*>(data)[at]);
  }
  return static_cast<const C*>(data)[at];
}
// p of n elements, at most `block`: where g lies, or in the buffer.
template <class C, class Call>
FASTFLAT_SHARED_CODE const C* corrected(const Call& call, int64_t at, int64_t n, C* __restrict buffer) {
  const C* const g = fetch(call.storage, call.g, at, n, buffer);
  if (!call.error) return g;
  const C* const e = static_cast<const C*>(call.error) + at;
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) buffer[j] = g[j] + e[j];
  return buffer;
}

template <class C>
struct KeyOf;
template <>
struct KeyOf<float> {
  using type = uint32_t;
  static constexpr type sign = 0x80000000u, nan = 0x7fc00000u;
  static constexpr int shift = 20;
};
template <>
struct KeyOf<double> {
  using type = uint64_t;
  static constexpr type sign = uint64_t{1} << 63, nan = uint64_t{0x7ff8} << 48;
  static constexpr int shift = 52;
};

// |p| as an integer with the same order, one NaN above all.
template <class C>
FASTFLAT_HD auto key_of(C p) {
  using K = KeyOf<C>;
  const auto bits = bit_cast<typename K::type>(p);
  return p == p ? static_cast<typename K::type>(bits & ~K::sign) : K::nan;
}

template <class C>
CompressorSums sums(const CompressorCall& call, int64_t begin, int64_t end) {
  BlockSum<C> sum, squares;
  typename KeyOf<C>::type most = 0;
  alignas(64) C buffer[block], term[block];
  for (int64_t i = begin; i < end; i += block) {
    const int64_t n = std::min(block, end - i);
    const C* const p = corrected(call, i, n, buffer);
    if (call.norm == mean) {
      for (int64_t j = 0; j < n; ++j) term[j] = std::fabs(p[j]);
      sum.add(term, n);
    }
    if (call.norm == l2 || (call.norm == largest && call.clip > 0.0)) {
      for (int64_t j = 0; j < n; ++j) term[j] = p[j] * p[j];
      squares.add(term, n);
    }
    if (call.norm == largest) {
      for (int64_t j = 0; j < n; ++j) {
        const auto key = key_of(p[j]);
        most = key > most ? key : most;
      }
    }
  }
  return {sum.total(), squares.total(), static_cast<double>(bit_cast<C>(most))};
}

// The units of n elements from `at` on, at most `block`, one an element.
template <class C>
FASTFLAT_SHARED_CODE void spread_units(const CompressorCall& call, const C* units, int64_t at, int64_t n, C* out) {
  for_runs({1, call.buckets(), call.bucket}, at, at + n,
           [&](int64_t i, int64_t length, int64_t bucket) { std::fill_n(out + (i - at), length, units[bucket]); });
}

// Eight codes, a byte each, in 8 * width bits, the first in the lowest; and back. Little-endian, as all targets are.
FASTFLAT_HD uint64_t mask_of(int bits, int every) {
  return ~uint64_t{0} / ((uint64_t{2} << (every - 1)) - 1) * ((uint64_t{1} << bits) - 1);
}

struct Packing {
  int width;
  uint64_t once, twice, whole, single;

  explicit Packing(int w)
      : width(w),
        once(mask_of(2 * w, 16)),
        twice(mask_of(4 * w, 32)),
        whole(w == 8 ? ~uint64_t{0} : (uint64_t{1} << (8 * w)) - 1),
        single(mask_of(w, 8)) {}

  FASTFLAT_HD uint64_t pack(uint64_t x) const {
    const int s = 8 - width;
    x = (x | x >> s) & once;
    x = (x | x >> 2 * s) & twice;
    return (x | x >> 4 * s) & whole;
  }
  FASTFLAT_HD uint64_t unpack(uint64_t x) const {
    const int s = 8 - width;
    x &= whole;
    x = (x | x << 4 * s) & twice;
    x = (x | x << 2 * s) & once;
    return (x | x << s) & single;
  }
};

FASTFLAT_SHARED_CODE void put_codes(const Packing& packing, const uint8_t* from, int64_t n, uint8_t* to) {
  const int64_t bytes = (n * packing.width + 7) / 8;
  if (packing.width == 8) return static_cast<void>(std::memcpy(to, from, bytes));
  alignas(64) uint8_t packed[block + 8];
  for (int64_t j = 0; j < n; j += 8) {
    uint64_t x;
    std::memcpy(&x, from + j, 8);
    x = packing.pack(x);
    std::memcpy(packed + j / 8 * packing.width, &x, 8);
  }
  std::memcpy(to, packed, bytes);
}

FASTFLAT_SHARED_CODE void get_codes(const Packing& packing, const uint8_t* from, int64_t n, uint8_t* to) {
  const int64_t bytes = (n * packing.width + 7) / 8;
  if (packing.width == 8) return static_cast<void>(std::memcpy(to, from, bytes));
  alignas(64) uint8_t packed[block + 8] = {};
  std::memcpy(packed, from, bytes);
  for (int64_t j = 0; j < n; j += 8) {
    uint64_t x;
    std::memcpy(&x, packed + j / 8 * packing.width, 8);
    x = packing.unpack(x);
    std::memcpy(to + j, &x, 8);
  }
}

template <class C>
void encode(const CompressorCall& call, int64_t begin, int64_t end) {
  const Packing packing(width_of(call.levels));
  const Grid grid = Grid::of(call.levels);
  const C levels = static_cast<C>(call.levels);
  const PhiloxState state = call.levels ? PhiloxState::make(call.state[0], call.state[1]) : PhiloxState{};
  C* const error = static_cast<C*>(call.error);
  alignas(64) C buffer[block], unit[block];
  alignas(64) float draw[block];
  alignas(64) int32_t stored[block];
  alignas(64) uint8_t code[block] = {};
  for (int64_t i = begin; i < end; i += block) {
    const int64_t n = std::min(block, end - i);
    const C* const p = corrected(call, i, n, buffer);
    spread_units(call, static_cast<const C*>(call.units), i, n, unit);
    if (call.levels == 0) {
      for (int64_t j = 0; j < n; ++j) stored[j] = stored_sign(p[j]);
    } else {
      fill_uniform(state, i, n, draw);
      for (int64_t j = 0; j < n; ++j) stored[j] = stored_level(p[j], unit[j], draw[j], levels);
    }
    if (error) {
      C* const e = error + i;
#pragma GCC ivdep
      for (int64_t j = 0; j < n; ++j) e[j] = left_over(p[j], e[j], unit[j], stored[j] * grid.step - grid.offset);
    }
    for (int64_t j = 0; j < n; ++j) code[j] = static_cast<uint8_t>(stored[j]);
    if (n % 8) std::memset(code + n, 0, 8 - n % 8);
    put_codes(packing, code, n, call.codes + i * packing.width / 8);
  }
}

template <class C>
void decode(const CompressorCall& call, int64_t begin, int64_t end) {
  const Packing packing(width_of(call.levels));
  const Grid grid = Grid::of(call.levels);
  const C factor = static_cast<C>(call.factor);
  const int64_t row = (call.numel * packing.width + 7) / 8, buckets = call.buckets();
  alignas(64) C buffer[block], sum[block], unit[block];
  alignas(64) uint8_t code[block];
  for (int64_t i = begin; i < end; i += block) {
    const int64_t n = std::min(block, end - i);
    std::fill_n(sum, n, C(0));
    for (int64_t k = 0; k < call.workers; ++k) {
      get_codes(packing, call.codes + k * row + i * packing.width / 8, n, code);
      spread_units(call, static_cast<const C*>(call.units) + k * buckets, i, n, unit);
      for (int64_t j = 0; j < n; ++j) sum[j] += unit[j] * static_cast<C>(code[j] * grid.step - grid.offset);
    }
    C* const out = target(call.storage, call.out, i, buffer);
    if (call.add) {
      const C* const before = fetch(call.storage, call.out, i, n, buffer);
#pragma GCC ivdep
      for (int64_t j = 0; j < n; ++j) out[j] = before[j] + sum[j] * factor;
    } else {
      for (int64_t j = 0; j < n; ++j) out[j] = sum[j] * factor;
    }
    deliver(call.storage, out, call.out, i, n);
  }
}

// p once count() has been there.
template <class C>
const C* counted(const TopCall& call, int64_t at, int64_t n, C* buffer) {
  return call.error ? static_cast<const C*>(call.error) + at : fetch(call.storage, call.g, at, n, buffer);
}

template <class C>
void count(const TopCall& call, int64_t begin, int64_t end, int lead, int64_t* counts) {
  using Key = typename KeyOf<C>::type;
  constexpr int shift = KeyOf<C>::shift;
  // Neighbours often share a bin: four counters of each, so that no addition waits for the one before. The last bin is
  // of those that begin otherwise.
  uint32_t of[4][top_bins + 1] = {};
  alignas(64) C buffer[block];
  alignas(64) uint16_t bins[block];
  for (int64_t i = begin; i < end; i += block) {
    const int64_t n = std::min(block, end - i);
    if (lead < 0) {
      const C* const p = corrected(call, i, n, buffer);
      if (call.error) std::memcpy(static_cast<C*>(call.error) + i, p, n * sizeof(C));
      for (int64_t j = 0; j < n; ++j) bins[j] = static_cast<uint16_t>(key_of(p[j]) >> shift);
    } else {
      const C* const p = counted(call, i, n, buffer);
      for (int64_t j = 0; j < n; ++j) {
        const Key key = key_of(p[j]), behind = (key >> (shift - 11)) & (top_bins - 1);
        bins[j] = static_cast<uint16_t>(key >> shift == static_cast<Key>(lead) ? behind : top_bins);
      }
    }
    int64_t j = 0;
    for (; j + 4 <= n; j += 4) {
      ++of[0][bins[j]];
      ++of[1][bins[j + 1]];
      ++of[2][bins[j + 2]];
      ++of[3][bins[j + 3]];
    }
    for (; j < n; ++j) ++of[0][bins[j]];
  }
  for (int b = 0; b < top_bins; ++b) counts[b] += int64_t{of[0][b]} + of[1][b] + of[2][b] + of[3][b];
}

template <class C>
void collect(const TopCall& call, int64_t begin, int64_t end, int lead, int part, std::vector<Candidate>& found) {
  using Key = typename KeyOf<C>::type;
  constexpr int shift = KeyOf<C>::shift;
  constexpr int64_t group = 32;
  const Key from = lead < 0 ? static_cast<Key>(part) << shift
                            : (static_cast<Key>(lead) << shift) + (static_cast<Key>(part) << (shift - 11));
  alignas(64) C buffer[block];
  alignas(64) Key keys[block];
  for (int64_t i = begin; i < end; i += block) {
    const int64_t n = std::min(block, end - i);
    const C* const p = counted(call, i, n, buffer);
    for (int64_t j = 0; j < n; ++j) keys[j] = key_of(p[j]);
    // Most groups hold none of the largest.
    for (int64_t first = 0; first < n; first += group) {
      const int64_t last = std::min(first + group, n);
      Key most = 0;
      for (int64_t j = first; j < last; ++j) most = keys[j] > most ? keys[j] : most;
      if (most < from) continue;
      for (int64_t j = first; j < last; ++j) {
        if (keys[j] >= from) found.push_back({keys[j], static_cast<int32_t>(i + j)});
      }
    }
  }
}

template <class C>
void take(const TopCall& call, const Candidate* chosen, int64_t k) {
  C* const error = static_cast<C*>(call.error);
  alignas(64) C made[block], buffer[block];
  for (int64_t i = 0; i < k; i += block) {
    const int64_t n = std::min(block, k - i);
    C* const p = target(call.storage, call.values, i, made);
    for (int64_t j = 0; j < n; ++j) {
      call.indices[i + j] = chosen[i + j].index;
      p[j] = error ? error[chosen[i + j].index] : load_from<C>(call.storage, call.g, chosen[i + j].index);
    }
    deliver(call.storage, p, call.values, i, n);
    if (!error) continue;
    const C* const sent = fetch(call.storage, call.values, i, n, buffer);
    for (int64_t j = 0; j < n; ++j) error[chosen[i + j].index] = left_of_largest(p[j], sent[j]);
  }
}

}  // namespace
}  // namespace FASTFLAT_ISA

#define FASTFLAT_COMPRESSOR_LOOPS(C)                                          \
  {FASTFLAT_ISA::sums<C>,  FASTFLAT_ISA::encode<C>,  FASTFLAT_ISA::decode<C>, \
   FASTFLAT_ISA::count<C>, FASTFLAT_ISA::collect<C>, FASTFLAT_ISA::take<C>}

const CompressorLoops FASTFLAT_TABLE(compressors) = FASTFLAT_COMPRESSOR_LOOPS(float);
#if !defined(FASTFLAT_ISA_AVX2)
const CompressorLoops compressors_double = FASTFLAT_COMPRESSOR_LOOPS(double);
#endif

}  // namespace fastflat::cpu

#include "cpu/isa_end.h"
#endif

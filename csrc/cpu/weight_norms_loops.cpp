// SPDX-License-Identifier: Apache-2.0
// The loops of the weight_norms family (cpu/weight_norms.h: for which instruction sets). Data of 16 bits pass through
// buffers, a block at a time.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/geometry.h"
#include "cpu/weight_norms.h"

#if !defined(FASTFLAT_ISA_AVX512)
#include "cpu/isa_begin.h"
#include "math/convert.h"
#include "math/weight_norms.h"

namespace fastflat::cpu {
namespace FASTFLAT_ISA {
namespace {

using namespace weight_norms;

#include "cpu/in_blocks.h"
#include "cpu/loops.h"

// body(values, place, count) for the blocks of n elements from `first` on.
template <class C, class Body>
inline void for_blocks(const WeightNormsCall& call, int64_t first, int64_t n, const Body& body) {
  alignas(64) C buffer[block];
  for (int64_t i = 0; i < n; i += block) {
    const int64_t count = std::min(block, n - i);
    body(fetch(call.storage, call.w, first + i, count, buffer), i, count);
  }
}

template <class C>
void reduce(const WeightNormsCall& call, int64_t begin, int64_t end, WeightShare& share) {
  const int64_t n = call.columns;
  C* const moments = static_cast<C*>(call.moments);
  alignas(64) C a[block], b[block];
  for (int64_t row = begin; row < end; ++row) {
    BlockSum<C> values, sizes, squares, cubes;
    C most = C(0);
    for_blocks<C>(call, row * n, n, [&](const C* w, int64_t at, int64_t count) {
      double* const columns = share.columns + at;
      for (int64_t j = 0; j < count; ++j) a[j] = magnitude_of(w[j]);
      for (int64_t j = 0; j < count; ++j) columns[j] += static_cast<double>(a[j]);
      values.add(w, count);
      sizes.add(a, count);
      alignas(64) C lane[lanes] = {};
      for (int64_t j = 0; j < count; j += lanes) {
        if (j + lanes > count) {
          for (int64_t l = j; l < count; ++l) most = a[l] > most ? a[l] : most;
          break;
        }
        for (int l = 0; l < lanes; ++l) lane[l] = a[j + l] > lane[l] ? a[j + l] : lane[l];
      }
      for (int l = 0; l < lanes; ++l) most = lane[l] > most ? lane[l] : most;
    });
    const C mean = static_cast<C>(values.total() / static_cast<double>(n));
    int64_t equal = 0;
    const bool counts = static_cast<double>(most) >= share.most;
    for_blocks<C>(call, row * n, n, [&](const C* w, int64_t, int64_t count) {
      for (int64_t j = 0; j < count; ++j) {
        const C d = w[j] - mean;
        a[j] = d * d;
        b[j] = (d * d) * d;
      }
      squares.add(a, count);
      cubes.add(b, count);
      if (!counts) return;
      int32_t found = 0;
      for (int64_t j = 0; j < count; ++j) found += magnitude_of(w[j]) == most ? 1 : 0;
      equal += found;
    });
    const C m2 = static_cast<C>(squares.total() / static_cast<double>(n));
    const C m3 = static_cast<C>(cubes.total() / static_cast<double>(n));
    moments[row] = mean;
    moments[call.rows + row] = m2;
    moments[2 * call.rows + row] = skewness(m2, m3);
    static_cast<C*>(call.row_l1)[row] = static_cast<C>(sizes.total());
    if (!counts) continue;
    if (static_cast<double>(most) > share.most) share.count = 0.0;
    share.most = static_cast<double>(most);
    share.count += static_cast<double>(equal);
  }
}

template <class C>
void reduce_bwd(const WeightNormsCall& call, int64_t begin, int64_t end) {
  const int64_t n = call.columns, rows = call.rows;
  const C *const g = static_cast<const C*>(call.g_moments), *const m = static_cast<const C*>(call.moments);
  const C *const absmax = static_cast<const C*>(call.absmax), *const g_col = static_cast<const C*>(call.g_col);
  const C of_most = *static_cast<const C*>(call.g_absmax) / absmax[1];
  alignas(64) C of_out[block];
  for (int64_t row = begin; row < end; ++row) {
    const auto gradient =
        RowGradient<C>::make(static_cast<C>(n), m[row], m[rows + row], m[2 * rows + row], g[row], g[rows + row],
                             g[2 * rows + row], static_cast<const C*>(call.g_row)[row], absmax[0], of_most);
    for_blocks<C>(call, row * n, n, [&](const C* w, int64_t at, int64_t count) {
      const RowGradient<C> own = gradient;
      C* const out = target(call.storage, call.out, row * n + at, of_out);
#pragma GCC ivdep
      for (int64_t j = 0; j < count; ++j) out[j] = own(w[j], g_col[at + j]);
      deliver(call.storage, out, call.out, row * n + at, count);
    });
  }
}

template <class C>
void saturate(const WeightNormsCall& call, int64_t begin, int64_t end) {
  const Saturate<C> rule{*static_cast<const C*>(call.alpha)};
  alignas(64) C of_out[block];
  for_blocks<C>(call, begin, end - begin, [&](const C* w, int64_t at, int64_t count) {
    const Saturate<C> own = rule;
    C* const out = target(call.storage, call.out, begin + at, of_out);
#pragma GCC ivdep
    for (int64_t j = 0; j < count; ++j) out[j] = own(w[j]);
    deliver(call.storage, out, call.out, begin + at, count);
  });
}

template <class C>
double saturate_bwd(const WeightNormsCall& call, int64_t begin, int64_t end) {
  const Saturate<C> rule{*static_cast<const C*>(call.alpha)};
  alignas(64) C of_g[block], of_out[block], of_alpha[block];
  BlockSum<C> sum;
  for_blocks<C>(call, begin, end - begin, [&](const C* w, int64_t at, int64_t count) {
    const Saturate<C> own = rule;
    const C* const g = fetch(call.storage, call.g, begin + at, count, of_g);
    C* const out = target(call.storage, call.out, begin + at, of_out);
#pragma GCC ivdep
    for (int64_t j = 0; j < count; ++j) out[j] = own.backward(g[j], w[j], of_alpha[j]);
    deliver(call.storage, out, call.out, begin + at, count);
    sum.add(of_alpha, count);
  });
  return sum.total();
}

}  // namespace
}  // namespace FASTFLAT_ISA

#define FASTFLAT_WEIGHT_LOOPS(C) \
  {FASTFLAT_ISA::reduce<C>, FASTFLAT_ISA::reduce_bwd<C>, FASTFLAT_ISA::saturate<C>, FASTFLAT_ISA::saturate_bwd<C>}

const WeightNormsLoops FASTFLAT_TABLE(weight_norms) = FASTFLAT_WEIGHT_LOOPS(float);
#if !defined(FASTFLAT_ISA_AVX2)
const WeightNormsLoops weight_norms_double = FASTFLAT_WEIGHT_LOOPS(double);
#endif

}  // namespace fastflat::cpu

#include "cpu/isa_end.h"
#endif

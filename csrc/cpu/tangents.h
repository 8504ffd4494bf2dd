// SPDX-License-Identifier: Apache-2.0
// What the glue (tangents.cpp) and the loops (tangents_loops.cpp) agree on. Tangents are [K, n], primals [n], n
// elements of a Geometry; they are walked tile by tile, all tangents of a tile behind one another.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/geometry.h"
#include "core/pairs.h"
#include "cpu/isa.h"

namespace fastflat::cpu {

// The elements as rows of whole periods of channels * inner, and rows as tiles: by the shape alone.
struct TangentTiles {
  int64_t n, row, rows;  // elements, those of a row (of the last one maybe fewer), and how many rows there are
  int64_t size, across;  // of a row's tiles: most columns of one, and how many there are
  int64_t deep;          // rows of a tile

  TangentTiles() = default;
  // `most`: elements of a tile; `columns`: most columns of one of several rows.
  TangentTiles(const Geometry& g, int64_t columns, int64_t most) {
    n = g.numel();
    const int64_t period = std::max<int64_t>(1, g.channels * g.inner);
    row = period * std::max<int64_t>(1, std::min(g.outer, columns / period));
    rows = (n + row - 1) / row;
    across = (row + columns - 1) / columns;
    size = std::min(row, ((row + across - 1) / across + 15) & ~int64_t{15});
    across = (row + size - 1) / size;
    deep = std::clamp<int64_t>(most / size, 1, std::max<int64_t>(rows, 1));
  }

  int64_t down() const { return (rows + deep - 1) / deep; }
  int64_t count() const { return across * down(); }
};

inline constexpr int64_t combine_tile = 1024;  // a few buffers of it stay in the nearest cache

struct CombineCall {
  const void *t0, *p0, *t1, *p1, *f0, *f1, *mask;  // null: absent
  const void *r0, *r1, *shift;                     // [K, C]
  void* out;
  bool first_of_channel, second_of_channel;
  int kind;
  Storage storage;
  int64_t count;  // K
  Geometry geometry;
  TangentTiles tiles;
  bool by_rows;  // tiles are numbered along rows, else along columns, whose coefficients are the same
};

// Runs of fewer elements are summed as columns, a few rows at a time.
inline constexpr int64_t short_runs = 16;
inline constexpr int64_t sums_columns = 1024, sums_rows = 4, sums_deep = 16;
inline constexpr int64_t sums_tile = 4096;  // of long runs

struct SumsCall {
  const void *t0, *p0, *t1, *p1, *mask;
  void* mapped;
  Storage storage;
  int64_t count;
  Geometry geometry;
  TangentTiles tiles;
  bool dots, totals;
};

// n elements of contiguous arrays; what is written may be what is read.
template <class C>
struct TangentLoops {
  void (*multiply)(C* out, const C* a, const C* b, int64_t n);
  void (*add)(C* out, const C* v, const C* a, int64_t n);
  void (*add_product)(C* out, const C* v, const C* a, const C* b, int64_t n);               // v + a b
  void (*add_products)(C* out, const C* a, const C* b, const C* c, const C* d, int64_t n);  // a b + c d
  // a b + c d + v
  void (*add_products_to)(C* out, const C* a, const C* b, const C* c, const C* d, const C* v, int64_t n);
  void (*factors)(int kind, const C* p, const C* g, int64_t n, C* first, C* second);  // room for whole vectors
  // Adds the sums of t p, or of t without p, over runs in the columns [column, column + n) to those of their channels.
  void (*runs)(const Geometry& g, const C* t, const C* p, int64_t column, int64_t n, double* sums);
  // The same down the columns of a matrix; strides from row to row.
  void (*columns)(C* sums, const C* t, int64_t of_t, const C* p, int64_t of_p, int64_t rows, int64_t n);
  void (*widen_sums)(const C* v, int64_t n, double* sums);  // adds v
};

struct TangentsLoops {
  TangentLoops<float> singles;
  TangentLoops<double> doubles;
  void (*widen[2])(const void* from, int64_t n, float* to);  // from bf16 and fp16
  void (*narrow[2])(const float* from, int64_t n, void* to);

  const TangentLoops<float>& of(float) const { return singles; }
  const TangentLoops<double>& of(double) const { return doubles; }
};

using TangentFactorsLoop = void (*)(int kind, const float* p, const float* g, int64_t n, float* first, float* second);

// Memory is their limit, wider vectors than those of AVX2 would add code and no speed: but for the factors.
#if defined(__x86_64__) && defined(__GNUC__)
extern const TangentsLoops tangents_loops_baseline, tangents_loops_avx2;
extern const TangentFactorsLoop tangents_factors_avx512;
inline const TangentsLoops& tangents_loops() {
  return isa() == Isa::baseline ? tangents_loops_baseline : tangents_loops_avx2;
}
inline TangentFactorsLoop tangents_factors(float) {
  return isa() == Isa::avx512 ? tangents_factors_avx512 : tangents_loops().singles.factors;
}
#else
extern const TangentsLoops tangents_loops_baseline;
inline const TangentsLoops& tangents_loops() { return tangents_loops_baseline; }
inline TangentFactorsLoop tangents_factors(float) { return tangents_loops().singles.factors; }
#endif
inline auto tangents_factors(double) { return tangents_loops().doubles.factors; }

}  // namespace fastflat::cpu

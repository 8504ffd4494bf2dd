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
  int64_t n, row, rows;   // elements, those of a row (of the last one maybe fewer), and how many rows there are
  int64_t size, across;   // of a row's tiles: most columns of one, and how many there are
  int64_t deep;           // rows of a tile

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

// Columns of a tile that is walked row by row.
inline constexpr int64_t sums_columns = 512, sums_tile = 4096;

struct SumsCall {
  const void *t0, *p0, *t1, *p1, *mask;
  void* mapped;
  Storage storage;
  int64_t count;
  Geometry geometry;
  TangentTiles tiles;
  bool dots, totals;
};

struct TangentsLoops {
  // Tangents [first, last) of tiles [begin, end); for fp32 arithmetic, and fp64.
  void (*combine[2])(const CombineCall&, int64_t first, int64_t last, int64_t begin, int64_t end);
  // Adds to dots and totals, [last - first, channels] each.
  void (*sums[2])(const SumsCall&, int64_t first, int64_t last, int64_t begin, int64_t end, double* dots,
                  double* totals);
};

FASTFLAT_LOOPS(TangentsLoops, tangents_loops)

}  // namespace fastflat::cpu

// SPDX-License-Identifier: Apache-2.0
// How a reduction over the elements of each scale is cut into pieces. A function of shape and element width only: the
// order of every sum, and so its bits, is the same on every GPU.
#pragma once

#include <cstdint>

#include "core/geometry.h"
#include "math/macros.h"

namespace fastflat::cuda {

struct ReducePlan {
  bool columns;  // a thread owns neighbouring columns of the matrix [rows, width]; else a team owns a run of one scale

  int team;       // threads that share a run: a power of two up to a warp, or the whole block
  int64_t chunk;  // elements of a run that one team takes
  int64_t chunks_per_run;

  int64_t width;  // of a row of partial sums: columns, or one a scale
  int64_t fold;   // periods of channels * inner in one row

  int64_t rows;   // rows that one piece walks (columns), or runs (teams)
  int64_t parts;  // partial sums a column or scale

  // Whether the first kernel already holds whole sums: no workspace and no second kernel.
  FASTFLAT_HD constexpr bool direct(const Geometry& g) const { return parts == 1 && width == g.channels; }
  FASTFLAT_HD constexpr int64_t partials() const { return parts * width; }
};

namespace plan {

inline constexpr int block = 256;
inline constexpr int warp = 32;
inline constexpr int64_t pieces = 4096;  // blocks or teams to aim at: several waves of the largest GPU
// Packs a thread sums by itself in fp32 before the tree takes over: at least 8, so that the tree is cheap; at most 64,
// so that the rounding error of a serial sum stays small.
inline constexpr int64_t packs_least = 8, packs_most = 64;
// Partial sums are written and read once. Below 2^22 elements they stay in the L2 cache and parallelism counts more;
// above, 8 packs' worth of rows keep them under 5 % of the traffic.
inline constexpr int64_t cached = int64_t(1) << 22;
// Runs shorter than this and off the vector grid waste most of a team.
inline constexpr int64_t short_run = 64, many_runs = 8;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t clamp(int64_t v, int64_t low, int64_t high) { return v < low ? low : v > high ? high : v; }

// Threads for a run of `inner` elements: one pack each, a whole block where a warp would walk more than packs_least.
constexpr int team_of(int64_t inner, int pack) {
  if (inner > packs_least * warp * pack) return block;
  int lanes = 1;
  while (lanes < warp && lanes * pack < inner) lanes *= 2;
  return lanes;
}

inline ReducePlan by_columns(const Geometry& g, int pack) {
  ReducePlan p{};
  p.columns = true;
  // Rows are whole periods: enough of them to fill a block and to make every row start on a pack.
  const int64_t period = g.channels * g.inner;
  int64_t aligned = 1;
  while (period * aligned % pack != 0) aligned *= 2;
  p.fold = aligned * ceil_div(block * pack, period * aligned);
  p.width = period * p.fold;
  const int64_t rows = ceil_div(g.outer, p.fold);
  const int64_t column_blocks = ceil_div(p.width, block * pack);
  const int64_t least = g.numel() < cached ? 4 : packs_least * (pack < 4 ? 4 : pack);
  p.rows = clamp(ceil_div(rows * column_blocks, pieces / 4), least, 4 * packs_most);
  p.parts = ceil_div(rows, p.rows);
  return p;
}

inline ReducePlan by_teams(const Geometry& g, int pack) {
  ReducePlan p{};
  p.team = team_of(g.inner, pack);
  p.fold = 1;
  p.width = g.channels;
  const int64_t step = static_cast<int64_t>(p.team) * pack;
  const int64_t piece = step * clamp(ceil_div(g.numel(), pieces * step), packs_least, packs_most);
  p.chunk = g.inner < piece ? ceil_div(g.inner, pack) * pack : piece;
  p.chunks_per_run = ceil_div(g.inner, p.chunk);
  p.rows = p.chunks_per_run > 1 ? 1 : clamp(piece / g.inner, 1, g.outer);
  p.parts = ceil_div(g.outer, p.rows) * p.chunks_per_run;
  return p;
}

}  // namespace plan

// `pack`: elements in 16 bytes of the narrowest stream. `g` is not empty.
inline ReducePlan plan_reduce(const Geometry& g, int pack) {
  const bool strided = g.outer > 1 && (g.inner == 1 || (g.outer >= plan::many_runs && g.inner < plan::short_run));
  return strided ? plan::by_columns(g, pack) : plan::by_teams(g, pack);
}

}  // namespace fastflat::cuda

// SPDX-License-Identifier: Apache-2.0
// What the glue (row_tangents.cpp) and the loops (row_tangents_loops.cpp) agree on.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/row_tangents.h"
#include "cpu/isa.h"

namespace fastflat::cpu {

// Rows that are walked at once, by the shape alone: long runs of memory, while their primals stay in the caches.
inline constexpr int64_t most_rows = 1024;
inline int64_t rows_at_once(int64_t D) {
  return std::max<int64_t>(1, std::min<int64_t>(most_rows, 4096 / std::max<int64_t>(D, 1)));
}

// Numbers of the compute type that a loop needs beside its tensors.
inline int64_t scratch_of(const RowTangentsCall& call) {
  return (call.storage == f32 || call.storage == f64 ? 3 : 8) * rows_at_once(call.D) * call.D;
}

// A part of a call: some of the tangents of some rows.
struct RowTangentsPart {
  int64_t first, last;  // tangents
  int64_t begin, end;   // rows
};

struct RowTangentsLoops {
  using Loop = void (*)(const RowTangentsCall&, const RowTangentsPart&, void* scratch);
  Loop norm, norm_bwd, softmax, softmax_bwd;
};

// Memory is what these loops wait for: double has one instruction set, which every processor has, and nothing is gained
// by the widest.
extern const RowTangentsLoops row_tangents_double;
#if defined(__x86_64__) && defined(__GNUC__)
extern const RowTangentsLoops row_tangents_baseline, row_tangents_avx2;
inline const RowTangentsLoops& row_tangents_float() {
  return isa() == Isa::baseline ? row_tangents_baseline : row_tangents_avx2;
}
#else
extern const RowTangentsLoops row_tangents_baseline;
inline const RowTangentsLoops& row_tangents_float() { return row_tangents_baseline; }
#endif

}  // namespace fastflat::cpu

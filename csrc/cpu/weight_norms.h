// SPDX-License-Identifier: Apache-2.0
// What the glue (weight_norms.cpp) and the loops (weight_norms_loops.cpp) agree on.
#pragma once

#include <cstdint>

#include "core/weight_norms.h"
#include "cpu/isa.h"

namespace fastflat::cpu {

// What rows leave behind: the sums of their columns, and the largest magnitude with its count.
struct WeightShare {
  double* columns;
  double most = 0.0, count = 0.0;
};

struct WeightNormsLoops {
  void (*reduce)(const WeightNormsCall&, int64_t begin, int64_t end, WeightShare&);  // rows
  void (*reduce_bwd)(const WeightNormsCall&, int64_t begin, int64_t end);            // rows
  void (*saturate)(const WeightNormsCall&, int64_t begin, int64_t end);              // elements
  double (*saturate_bwd)(const WeightNormsCall&, int64_t begin, int64_t end);        // elements; the share of alpha
};

// Double has one instruction set, which every processor has; memory is what these loops wait for.
extern const WeightNormsLoops weight_norms_double;
#if defined(__x86_64__) && defined(__GNUC__)
extern const WeightNormsLoops weight_norms_baseline, weight_norms_avx2;
inline const WeightNormsLoops& weight_norms_float() {
  return isa() == Isa::baseline ? weight_norms_baseline : weight_norms_avx2;
}
#else
extern const WeightNormsLoops weight_norms_baseline;
inline const WeightNormsLoops& weight_norms_float() { return weight_norms_baseline; }
#endif

}  // namespace fastflat::cpu

// SPDX-License-Identifier: Apache-2.0
// What the glue (sharpness.cpp) and the loops (sharpness_loops.cpp) agree on: one tensor of a list.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/stream.h"

namespace fastflat::cpu {

struct SumsCall {
  Stream g, other;
  int64_t kind;
  double eta;
};

struct AscentCall {
  Stream w, g, out, backup;  // without out the sum replaces w
  double scale, eta;
  int64_t metric;
  StreamDraws draws;
};

struct SharpnessLoops {
  // Elements [begin, end); the first for float32 arithmetic, the second for float64.
  void (*sums[2])(const SumsCall&, int64_t begin, int64_t end, double* result);
  void (*ascent[2])(const AscentCall&, int64_t begin, int64_t end);
};

FASTFLAT_LOOPS(SharpnessLoops, sharpness_loops)

}  // namespace fastflat::cpu

// SPDX-License-Identifier: Apache-2.0
// What the glue (descent.cpp) and the loops (descent_loops.cpp) agree on: one tensor of a list.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/stream.h"

namespace fastflat::cpu {

struct DescentCall {
  Stream source, w, out;  // weights before the ascent; the new ones; their copy in 16 bits
  Stream g, f;            // gradients of the second and the first pass
  Stream m, v, x;         // momentum or mean, squares, the largest of those
  Stream a;               // average
  const double* row;
  bool padam;
  double rate;  // LAMB: with the ratio of norms
  StreamDraws draws;
};

struct DescentLoops {
  // Elements [begin, end); the first for float32 arithmetic, the second for float64.
  using Map = void (*)(const DescentCall&, int64_t begin, int64_t end);
  Map sgd[2], adam[2], lamb[2];
  void (*lamb_moments[2])(const DescentCall&, int64_t begin, int64_t end, double* result);
};

FASTFLAT_LOOPS(DescentLoops, descent_loops)

}  // namespace fastflat::cpu

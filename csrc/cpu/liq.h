// SPDX-License-Identifier: Apache-2.0
// What the glue (liq.cpp) and the loops (liq_loops.cpp) agree on.
#pragma once

#include <cstdint>

#include "core/geometry.h"
#include "cpu/isa.h"

namespace fastflat::cpu {

// Everything that one call of an op of the family has in common. Pointers are null where a tensor is absent.
struct LiqCall {
  Geometry geometry;
  int64_t levels;
  double eps;
  const void* w;        // data
  const void* in;       // cotangent of y (backward) or tangent of w
  void* out;            // y, gw or ty
  const void* mean;     // compute type, one a channel
  const void* std;      // the same
  const void* clip;     // compute type, one value
  const void* tclip;    // the same
  const double* about;  // of the second moment: the means in double
};

// Loops over storage offsets [begin, end), or over whole channels [begin, end) where outer == 1. Sums are doubles, one
// a channel.
struct LiqLoops {
  using Map = void (*)(const LiqCall&, int64_t begin, int64_t end);
  using Reduce = void (*)(const LiqCall&, int64_t begin, int64_t end, double* sums);

  // By Pair (core/pairs.h): data and result. The cotangent has the type of the result, the tangent that of data.
  Map forward[6];
  Map tangent[6];
  Reduce backward_channels[6];  // of dL/dclip
  Reduce backward_range[6];
  // By Storage of w: of w, or of (w - about)^2.
  Reduce moment_channels[4];
  Reduce moment_range[4];
};

FASTFLAT_LOOPS(LiqLoops, liq_loops)

}  // namespace fastflat::cpu

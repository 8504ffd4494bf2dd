// SPDX-License-Identifier: Apache-2.0
// What the glue (fake_quantize.cpp) and the loops (fake_quantize_loops.cpp) agree on.
#pragma once

#include <cstdint>

#include "core/geometry.h"
#include "cpu/isa.h"

namespace fastflat::cpu {

// Everything that one call of an op of the family has in common. Pointers are null where a tensor is absent.
struct FakeQuantizeCall {
  Geometry geometry;
  int64_t qmin, qmax;
  double eps;
  int64_t rules;
  double factor;
  const void* x;           // data
  const void* in;          // cotangent of y (backward) or tangent of x
  void* out;               // y, gx or ty
  const void* scale;       // compute type, one a channel
  const void* zero_point;  // the same
  const void* ts;          // tangents of the two
  const void* tz;
};

// Loops over storage offsets [begin, end), or over channels where it says so. Sums are doubles, two a channel: of the
// scale gradient and of the cotangents outside the grid.
struct FakeQuantizeLoops {
  using Map = void (*)(const FakeQuantizeCall&, int64_t begin, int64_t end);
  using Reduce = void (*)(const FakeQuantizeCall&, int64_t begin, int64_t end, double* sums);

  // By Pair (core/storage.h): data and result. The cotangent has the type of the result; the tangent that of data
  // or, in tangent_of_result, of the result.
  Map forward[6];
  Map backward[6];              // gx alone
  Reduce backward_channels[6];  // outer == 1: whole channels [begin, end), sums of channel c at sums[2 c]
  Reduce backward_range[6];     // adds to sums[2 c]; begin is a multiple of channels * inner where inner < short_run
  Map tangent[6];
  Map tangent_of_result[6];
  // By Storage of x: largest magnitudes as doubles, exact. Over channels with outer == 1, or over a range.
  Reduce absmax_channels[4];
  Reduce absmax_range[4];
};

// Runs of equal scale shorter than this are walked with one scale an element.
inline constexpr int64_t short_run = 64;

FASTFLAT_LOOPS(FakeQuantizeLoops, fake_quantize_loops)

}  // namespace fastflat::cpu

// SPDX-License-Identifier: Apache-2.0
// What the glue (mixquant.cpp) and the loops (mixquant_loops.cpp) agree on.
#pragma once

#include <cstdint>

#include "core/geometry.h"
#include "cpu/isa.h"

namespace fastflat::cpu {

// Everything that one call of an op of the family has in common. Pointers are null where a tensor is absent; those of
// candidates are in the compute type, [candidates] or, scale and ts, [candidates, channels].
struct MixquantCall {
  Geometry geometry;
  int candidates;
  double eps;
  int64_t rules;
  const void* x;   // data
  const void* in;  // cotangent of y (backward) or tangent of x
  void* out;       // y, gx or ty
  const void* scale;
  const void* qmin;
  const void* qmax;
  const void* weight;
  const void* factor;
  const void* ts;  // tangents of scale and weight
  const void* tw;
};

// Loops over storage offsets [begin, end), or over channels where it says so. They add to sums: of the scales'
// gradients [candidates, channels] and of the weights' [candidates].
struct MixquantLoops {
  using Map = void (*)(const MixquantCall&, int64_t begin, int64_t end);
  using Reduce = void (*)(const MixquantCall&, int64_t begin, int64_t end, double* of_scale, double* of_weight);

  // By Pair (core/storage.h): data and result. The cotangent has the type of the result; the tangent that of data
  // or, in tangent_of_result, of the result.
  Map forward[6];
  Reduce backward_channels[6];  // outer == 1: whole channels [begin, end)
  Reduce backward_range[6];     // begin is a multiple of channels * inner where inner < mixed_run
  Map tangent[6];
  Map tangent_of_result[6];
};

// Runs of equal scale shorter than this are walked with one scale an element.
inline constexpr int64_t mixed_run = 64;

FASTFLAT_LOOPS(MixquantLoops, mixquant_loops)

}  // namespace fastflat::cpu

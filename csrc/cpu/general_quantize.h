// SPDX-License-Identifier: Apache-2.0
// What the glue (general_quantize.cpp) and the loops (general_quantize_loops.cpp) agree on.
#pragma once

#include <cstdint>

#include "core/geometry.h"
#include "cpu/isa.h"

namespace fastflat::cpu {

// Everything that one call of an op of the family has in common. Pointers are null where a tensor is absent; those of
// scales, tangents and scalars are in the compute type.
struct GeneralQuantizeCall {
  Geometry geometry;
  int64_t qmin, qmax;
  double eps;
  int64_t rules;
  double factor;
  bool drawn;            // there is noise
  int64_t seed, offset;  // of the draws
  double nu, a, delta;
  bool need_delta;
  bool narrow, half;  // x has 16 bits; they are fp16, not bf16
  const void* x;      // data
  const void* in;     // cotangent of y (backward) or tangent of x
  void* out;          // y, gx or ty
  const void* scale;
  const void* zero_point;
  const void* ts;
  const void* tz;
};

// Loops over storage offsets [begin, end), or over channels where it says so. Three sums a channel, as doubles: of the
// scale gradient, of the cotangents outside the grid, of the gradient of delta.
struct GeneralQuantizeLoops {
  using Map = void (*)(const GeneralQuantizeCall&, int64_t begin, int64_t end);
  using Reduce = void (*)(const GeneralQuantizeCall&, int64_t begin, int64_t end, double* sums);

  // By Pair (core/pairs.h): data and result. The cotangent has the type of the result; the tangent that of data or, in
  // tangent_of_result, of the result.
  Map forward[6];
  Map backward[6];              // gx alone
  Reduce backward_channels[6];  // outer == 1: whole channels [begin, end), sums of channel c at sums[3 c]
  Reduce backward_range[6];     // adds to sums[3 c]; begin is a multiple of channels * inner where inner < short_run
  Map tangent[6];
  Map tangent_of_result[6];
};

FASTFLAT_LOOPS(GeneralQuantizeLoops, general_quantize_loops)

}  // namespace fastflat::cpu

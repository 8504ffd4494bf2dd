// SPDX-License-Identifier: Apache-2.0
// What the glue (binarize.cpp) and the loops (binarize_loops.cpp) agree on.
#pragma once

#include <cstdint>

#include "core/geometry.h"
#include "cpu/isa.h"

namespace fastflat::cpu {

// Everything that one call of an op of the family has in common. Pointers are null where a tensor is absent.
struct BinarizeCall {
  Geometry geometry;
  double clip;
  const void* x;      // data
  const void* in;     // cotangent of y (backward) or tangent of x
  void* out;          // y, gx or ty
  const void* h;      // importance, compute type, in the layout of x
  const void* alpha;  // compute type, one a channel
  const void* k;      // of the gradient, or ta: the same; null where the term is absent
};

// Loops over storage offsets [begin, end), or over channels where it says so. Sums are doubles, two a channel: of the
// op's own terms and of h, the second left out without h.
struct BinarizeLoops {
  using Map = void (*)(const BinarizeCall&, int64_t begin, int64_t end);
  using Reduce = void (*)(const BinarizeCall&, int64_t begin, int64_t end, double* sums);

  // By Pair (core/pairs.h): data and result. The cotangent has the type of the result, the tangent that of data.
  Map forward[6];
  Map backward[6];
  Map tangent[6];
  // By Pair: of gy sign(x), over whole channels where outer == 1, or over a range.
  Reduce backward_channels[6];
  Reduce backward_range[6];
  // By Storage of x: of h|x|, and of h sign(x) tx.
  Reduce magnitude_channels[4];
  Reduce magnitude_range[4];
  Reduce tangent_channels[4];
  Reduce tangent_range[4];
};

FASTFLAT_LOOPS(BinarizeLoops, binarize_loops)

}  // namespace fastflat::cpu

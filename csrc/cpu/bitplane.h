// SPDX-License-Identifier: Apache-2.0
// What the glue (bitplane.cpp) and the loops (bitplane_loops.cpp) agree on.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace fastflat::cpu {

// Everything that one call of an op of the family has in common. Pointers are null where a tensor is absent.
struct BitplaneCall {
  int64_t n;  // elements of a plane
  int planes;
  bool hard_w, hard_m;
  const void* p;  // [planes, n]
  const void* q;
  const void* m;  // [planes], compute type
  const void* scale;
  const void* beta;
  const void* gw;  // [n]
  void* gp;        // [planes, n]
  void* gq;
  const void* tp;  // [planes, n]
  const void* tq;
  const void* tm;  // [planes]
  const void* ts;
  void* out;  // w or its tangent, [n]
};

struct BitplaneLoops {
  using Map = void (*)(const BitplaneCall&, int64_t begin, int64_t end);
  using Reduce = void (*)(const BitplaneCall&, int64_t begin, int64_t end, double* sums);
  using Finish = void (*)(const BitplaneCall&, const double* sums, void* gm, void* gs);

  // By Pair (core/pairs.h): planes and weight. Elements [begin, end) of every plane.
  Map forward[6];
  Reduce backward[6];  // adds D_b (math/bitplane.h) to sums[b]
  Map tangent[6];
  // By Storage of the planes: the gradients of m and s.
  Finish finish[4];
};

FASTFLAT_LOOPS(BitplaneLoops, bitplane_loops)

}  // namespace fastflat::cpu

// SPDX-License-Identifier: Apache-2.0
// Launchers of the tangents family. Tangents are [count, n], primals [n], n elements of a geometry; formulas:
// csrc/math/tangents.h and fastflat/_ops. Every launcher returns a cudaError_t.
#pragma once

#include <cstdint>

#include "cuda/types.h"

namespace fastflat::cuda {

// Null: absent. p0 and p1 are primals, or [channels] in the compute type.
struct CombineCall {
  Storage storage;
  int kind;
  Geometry geometry;
  int64_t count;
  bool first_of_channel, second_of_channel;
  const void *t0, *p0, *t1, *p1, *f0, *r0, *f1, *r1, *shift, *mask;
  void* out;
};

ErrorCode launch_tangents_combine(const CombineCall& call, StreamHandle stream);

// dots and totals are [count, channels] in the compute type, or null; without a mask nothing is mapped.
struct SumsCall {
  Storage storage;
  Geometry geometry;
  int64_t count;
  const void *t0, *p0, *t1, *p1, *mask;
  void *mapped, *dots, *totals;
};

// Numbers of the workspace, in the compute type, of the dots and as many of the totals.
int64_t tangents_sums_partials(const SumsCall& call);
ErrorCode launch_tangents_sums(const SumsCall& call, void* partials, StreamHandle stream);

}  // namespace fastflat::cuda

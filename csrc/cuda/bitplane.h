// SPDX-License-Identifier: Apache-2.0
// Launchers of the bitplane family. Planes are contiguous, [planes, n]; w is [n]; all aligned to 16 bytes. Formulas:
// csrc/math/bitplane.h and fastflat/_ops. The pair names the storage of the planes and of w. Every launcher returns a
// cudaError_t and does nothing for empty planes but write the sums.
#pragma once

#include <cstdint>

#include "cuda/types.h"

namespace fastflat::cuda {

struct BitplaneArguments {
  const void* p;
  const void* q;
  const void* m;      // [planes] in the compute type: f64 for f64 planes, else f32
  const void* scale;  // one number each, on the device
  const void* beta;
  int64_t n;
  int planes;
  bool hard_w, hard_m;
};

ErrorCode launch_bitplane(Pair pair, const BitplaneArguments& a, void* w, StreamHandle stream);

// gp, gq, gm and gs in one pass over the planes. The workspace has the bytes that the function below names.
ErrorCode launch_bitplane_bwd(Pair pair, const BitplaneArguments& a, const void* gw, void* gp, void* gq, void* gm,
                              void* gs, void* workspace, StreamHandle stream);
int64_t bitplane_bwd_workspace(Pair pair, const BitplaneArguments& a);

// tp, tq, tm, ts may be null; tp and tq have the storage of the planes.
ErrorCode launch_bitplane_jvp(Pair pair, const BitplaneArguments& a, const void* tp, const void* tq, const void* tm,
                              const void* ts, void* tw, StreamHandle stream);

}  // namespace fastflat::cuda

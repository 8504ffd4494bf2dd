// SPDX-License-Identifier: Apache-2.0
// Launchers of the liq family. Tensors are dense, in storage order, aligned to 16 bytes; formulas and conventions:
// csrc/math/liq.h and fastflat/_ops. The pair names the storage of w and of the result y, the cotangent has that of y.
// Every launcher returns a cudaError_t and does nothing for an empty tensor but write the moments and the sum.
#pragma once

#include <cstdint>

#include "cuda/types.h"

namespace fastflat::cuda {

// Device pointers to values in the compute type (f64 for f64 data, else f32).
struct LiqPoint {
  const void* mean;  // [channels]
  const void* std;   // [channels]
  const void* clip;  // one value
  int64_t levels;
  double eps;
};

// Mean and unbiased standard deviation of each channel, in the compute type; of the pair the storage of w counts.
ErrorCode launch_liq_moments(Pair pair, const Geometry& g, const void* w, void* mean, void* std, void* workspace,
                             StreamHandle stream);
int64_t liq_moments_workspace(Pair pair, const Geometry& g);

ErrorCode launch_liq(Pair pair, const Geometry& g, const LiqPoint& point, const void* w, void* y, StreamHandle stream);

// gw and gclip (one value) in one pass over the data.
ErrorCode launch_liq_bwd(Pair pair, const Geometry& g, const LiqPoint& point, const void* gy, const void* w, void* gw,
                         void* gclip, void* workspace, StreamHandle stream);
int64_t liq_bwd_workspace(Pair pair, const Geometry& g);

// tw (storage of w) and tclip (one value) may be null.
ErrorCode launch_liq_jvp(Pair pair, const Geometry& g, const LiqPoint& point, const void* tw, const void* tclip,
                         const void* w, void* ty, StreamHandle stream);

}  // namespace fastflat::cuda

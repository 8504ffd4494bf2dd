// SPDX-License-Identifier: Apache-2.0
// Launchers of the mixquant family. Tensors are dense, in storage order, aligned to 16 bytes; formulas and conventions:
// csrc/math/mixquant.h and fastflat/_ops. The pair names the storage of x and of the result y. Every launcher returns a
// cudaError_t and does nothing for an empty tensor but write the sums.
#pragma once

#include <cstdint>

#include "cuda/types.h"

namespace fastflat::cuda {

// The candidates of a call, in the compute type and on the device: [count], scales [count, channels].
struct Mixture {
  const void* scale;
  const void* qmin;
  const void* qmax;
  const void* weight;
  const void* factor;  // null where no op reads it
  int count;           // 1 to 8
  double eps;
  int64_t rules;
};

ErrorCode launch_mixquant(Pair pair, const Geometry& g, const Mixture& mixture, const void* x, void* y,
                          StreamHandle stream);

// gx, gs [count, channels] and gw [count] in one pass over the data. The workspace, aligned to 16 bytes, has the bytes
// that the function below names.
ErrorCode launch_mixquant_bwd(Pair pair, const Geometry& g, const Mixture& mixture, const void* gy, const void* x,
                              void* gx, void* gs, void* gw, void* workspace, StreamHandle stream);
int64_t mixquant_bwd_workspace(Pair pair, const Geometry& g, int count);

// tx, ts, tw may be null. tx has the storage of the result or of x.
ErrorCode launch_mixquant_jvp(Pair pair, bool tangent_of_result, const Geometry& g, const Mixture& mixture,
                              const void* tx, const void* ts, const void* tw, const void* x, void* ty,
                              StreamHandle stream);

}  // namespace fastflat::cuda

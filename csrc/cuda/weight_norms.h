// SPDX-License-Identifier: Apache-2.0
// Launchers of the weight_norms family; formulas: csrc/math/weight_norms.h and fastflat/_ops. Tensors are dense and
// start on 16 bytes. Every launcher returns a cudaError_t.
#pragma once

#include "core/weight_norms.h"
#include "cuda/types.h"

namespace fastflat::cuda {

ErrorCode launch_weight_norms_saturate(const WeightNormsCall& call, StreamHandle stream);

}  // namespace fastflat::cuda

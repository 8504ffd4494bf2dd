// SPDX-License-Identifier: Apache-2.0
// Launchers of the inputs family; formulas: csrc/math/inputs.h and fastflat/_ops. Every launcher returns a cudaError_t.
#pragma once

#include "core/inputs.h"
#include "cuda/types.h"

namespace fastflat::cuda {

ErrorCode launch_inputs_noise(const NoiseCall& call, StreamHandle stream);

}  // namespace fastflat::cuda

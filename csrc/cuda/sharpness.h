// SPDX-License-Identifier: Apache-2.0
// Launchers of the sharpness family. Tensors are dense, the streams of one in one layout; formulas:
// csrc/math/sharpness.h and fastflat/_ops. Numbers that decide, scales and states, stay on the device. Every launcher
// returns a cudaError_t.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/multi.h"
#include "cuda/types.h"

namespace fastflat::cuda {

// Of one tensor; `other` may be null where the kind of sum, its option, does not read it. `first` counts chunks.
namespace sums_of {
enum Stream : int { g, other, streams };
}
using SumsTensor = ListTensor<sums_of::streams>;

// Of one tensor; its option is the metric. The result goes to `out`, else it replaces w, of which `backup` keeps the
// bytes: both may be null. `first` counts random elements.
namespace ascent_of {
enum Stream : int { w, g, out, backup, streams };
}
using AscentTensor = ListTensor<ascent_of::streams>;

// The [T, 3] sums of a list; `partials` has three doubles a chunk.
ErrorCode launch_sharpness_sums(const std::vector<SumsTensor>& list, double eta, double* partials, double* sums,
                                StreamHandle stream);

// `result` has two numbers more than rho.
ErrorCode launch_sharpness_scale(const double* sums, int64_t tensors, const double* rho, int64_t count, double eps,
                                 bool linf, double* result, StreamHandle stream);

// `scale` has a number for each tensor; `state` may be null.
ErrorCode launch_sharpness_ascent(const std::vector<AscentTensor>& list, const double* scale, double eta,
                                  const int64_t* state, StreamHandle stream);

}  // namespace fastflat::cuda

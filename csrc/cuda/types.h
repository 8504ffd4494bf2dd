// SPDX-License-Identifier: Apache-2.0
// A cudaStream_t and a cudaError_t as they cross the bridge between the torch side (.cpp), which sees no CUDA header,
// and the kernel side (.cu), which sees no torch header.
#pragma once

#include "core/geometry.h"
#include "core/pairs.h"

namespace fastflat::cuda {

using StreamHandle = void*;
using ErrorCode = int;

}  // namespace fastflat::cuda

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/types.h"

namespace fastflat::cuda {

// y = x, `bytes` bytes of any storage type; both pointers aligned to 16 bytes.
ErrorCode launch_identity(const void* x, void* y, int64_t bytes, StreamHandle stream);

}  // namespace fastflat::cuda

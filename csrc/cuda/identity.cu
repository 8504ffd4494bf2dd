// SPDX-License-Identifier: Apache-2.0
#include "cuda/identity.h"

#include "cuda/map.cuh"
#include "math/identity.h"

namespace fastflat::cuda {
namespace {

struct Copy {
  struct Group {};

  __device__ __forceinline__ Group group(int64_t) const { return {}; }
  __device__ __forceinline__ void operator()(const Group&, uint8_t x, uint8_t& y) const { y = Identity{}(x); }
};

}  // namespace

// Bytes, so that one kernel serves every storage type.
ErrorCode launch_identity(const void* x, void* y, int64_t bytes, StreamHandle stream) {
  return launch_map<kAccess>({1, 1, bytes}, Copy{}, streams(static_cast<const uint8_t*>(x)),
                             streams(static_cast<uint8_t*>(y)), static_cast<cudaStream_t>(stream));
}

}  // namespace fastflat::cuda

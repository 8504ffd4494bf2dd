// SPDX-License-Identifier: Apache-2.0
// One tensor of a list, as the glue hands it to the kernels over lists (multi.cuh).
#pragma once

#include <cstdint>

#include "core/pairs.h"
#include "math/macros.h"

namespace fastflat::cuda {

// Elements that one block takes, at most: a multiple of every pack.
inline constexpr int64_t kListChunk = 16384;

FASTFLAT_HD constexpr int64_t list_chunks(int64_t size) { return (size + kListChunk - 1) / kListChunk; }

template <int streams>
struct ListTensor {
  void* at[streams] = {};  // null where the tensor has no such stream
  Storage storage[streams] = {};
  int64_t size = 0;
  int64_t first = 0;  // number of its first random element; of sums, of its first chunk
  int64_t option = 0;

  void set(int stream, void* data, Storage type) {
    at[stream] = data;
    storage[stream] = type;
  }
};

}  // namespace fastflat::cuda

// SPDX-License-Identifier: Apache-2.0
// The template op: what its glue (identity.cpp) and its loop (identity_loops.h) agree on.
#pragma once

#include <cstdint>

namespace fastflat::cpu {

struct IdentityLoops {
  // Copies units [begin, end) of `width` bytes each.
  void (*copy)(const void* x, void* y, int64_t width, int64_t begin, int64_t end);
};

}  // namespace fastflat::cpu

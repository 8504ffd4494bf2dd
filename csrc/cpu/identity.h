// SPDX-License-Identifier: Apache-2.0
// The template op: what its glue (identity.cpp) and its loop (identity_loops.cpp) agree on.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace fastflat::cpu {

struct IdentityLoops {
  // Copies units [begin, end) of `width` bytes each.
  void (*copy)(const void* x, void* y, int64_t width, int64_t begin, int64_t end);
};

FASTFLAT_LOOPS(IdentityLoops, identity_loops)

}  // namespace fastflat::cpu

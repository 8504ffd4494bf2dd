// SPDX-License-Identifier: Apache-2.0
// A stream of one tensor of a list, as glue and loops see it.
#pragma once

#include <cstdint>

#include "core/pairs.h"

namespace fastflat::cpu {

struct Stream {
  void* data = nullptr;  // null: the stream is absent
  Storage storage = f32;
  bool bypass = false;  // written past the caches

  explicit operator bool() const { return data != nullptr; }
};

// Draws of a tensor that is rounded stochastically.
struct StreamDraws {
  const int64_t* state = nullptr;  // null: round to nearest
  int64_t start = 0;               // number of the tensor's first element, a multiple of eight
};

}  // namespace fastflat::cpu

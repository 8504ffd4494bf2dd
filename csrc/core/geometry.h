// SPDX-License-Identifier: Apache-2.0
// Where the scale of an element lies: storage offset o of a dense tensor belongs to scale (o / inner) % channels.
#pragma once

#include <cstdint>

namespace fastflat {

struct Geometry {
  int64_t outer = 1;     // repetitions of all channels
  int64_t channels = 1;  // scales
  int64_t inner = 0;     // neighbouring elements that share one

  int64_t numel() const { return outer * channels * inner; }
};

}  // namespace fastflat

// SPDX-License-Identifier: Apache-2.0
// K tangents of R rows of D contiguous elements, as glue, loops and kernels of every device see them; no torch.
#pragma once

#include <cstdint>

#include "core/pairs.h"

namespace fastflat {

// Absent tensors are null.
struct RowTangentsCall {
  Storage storage = f32;
  int64_t K = -1, R = 0, D = 0;
  bool option = false;  // centered, or log
  // Tangents of rows [K, R, D], and of channels [K, D].
  const void *x = nullptr, *g = nullptr, *along_weight = nullptr, *along_bias = nullptr;
  // [R, D], [D], and in the compute type [R] and [K, R]. `normal` is the probabilities of a softmax.
  const void *normal = nullptr, *grad = nullptr, *weight = nullptr;
  const void *of_row = nullptr, *mean = nullptr, *scale = nullptr;
  void *out = nullptr, *new_mean = nullptr, *new_scale = nullptr;
};

}  // namespace fastflat

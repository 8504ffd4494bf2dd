// SPDX-License-Identifier: Apache-2.0
// Maps of a batch of inputs, as glue, loops and kernels of every device see them; no torch.
#pragma once

#include <cstdint>

#include "core/pairs.h"

namespace fastflat {

// `samples` of `length` elements each, contiguous; K copies of them come out.
struct NoiseCall {
  Storage storage = f32;
  int64_t K = 0, samples = 0, length = 0, law = 0;
  float most = 0.0f, keep = 1.0f;
  const void* x = nullptr;
  const int64_t* state = nullptr;  // seed and offset, where the data is
  void* noisy = nullptr;           // [K, samples, length]
  float* sigma = nullptr;          // [K, samples]
};

struct StepCall {
  Storage storage = f32;
  int64_t samples = 0, length = 0, norm = 0;
  double step = 0.0, eps = 0.0, low = 0.0, high = 0.0;
  const void *xa = nullptr, *x0 = nullptr, *g = nullptr;
  const bool* active = nullptr;  // [samples], or null for all
  void* out = nullptr;
};

}  // namespace fastflat

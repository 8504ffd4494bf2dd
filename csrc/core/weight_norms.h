// SPDX-License-Identifier: Apache-2.0
// Weight matrices, as glue, loops and kernels of every device see them; no torch.
#pragma once

#include <cstdint>

#include "core/pairs.h"

namespace fastflat {

// w [rows, columns]; everything but w, g and out is in the compute type.
struct WeightNormsCall {
  Storage storage = f32;
  int64_t rows = 0, columns = 0;
  const void *w = nullptr, *g = nullptr, *alpha = nullptr;
  // Results of a reduction, which its backward pass reads: [3, rows], [rows], [columns], [2].
  void *moments = nullptr, *row_l1 = nullptr, *col_l1 = nullptr, *absmax = nullptr;
  const void *g_moments = nullptr, *g_row = nullptr, *g_col = nullptr, *g_absmax = nullptr;
  void* out = nullptr;

  int64_t numel() const { return rows * columns; }
};

}  // namespace fastflat

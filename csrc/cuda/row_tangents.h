// SPDX-License-Identifier: Apache-2.0
// Launchers of the row_tangents family; formulas: csrc/math/row_tangents.h and fastflat/_ops. Every launcher returns a
// cudaError_t.
#pragma once

#include <cstdint>

#include "cuda/types.h"

namespace fastflat::cuda {

// K tangents of R rows of D contiguous elements. Absent tensors are null.
struct RowsOfTangents {
  Storage storage;
  int64_t K, R, D;
  bool option;  // centered, or log
  // Tangents of rows [K, R, D], and of channels [K, D].
  const void *x = nullptr, *g = nullptr, *along_weight = nullptr, *along_bias = nullptr;
  // [R, D], [D], and in the compute type [R] and [K, R].
  const void *normal = nullptr, *grad = nullptr, *weight = nullptr;
  const void *of_row = nullptr, *mean = nullptr, *scale = nullptr;
  void *out = nullptr, *new_mean = nullptr, *new_scale = nullptr;
};

ErrorCode launch_row_tangents_norm(const RowsOfTangents& call, StreamHandle stream);
ErrorCode launch_row_tangents_norm_bwd(const RowsOfTangents& call, StreamHandle stream);
ErrorCode launch_row_tangents_softmax(const RowsOfTangents& call, StreamHandle stream);
ErrorCode launch_row_tangents_softmax_bwd(const RowsOfTangents& call, StreamHandle stream);

}  // namespace fastflat::cuda

// SPDX-License-Identifier: Apache-2.0
// Launchers of the row_tangents family; formulas: csrc/math/row_tangents.h and fastflat/_ops. Every launcher returns a
// cudaError_t.
#pragma once

#include "core/row_tangents.h"
#include "cuda/types.h"

namespace fastflat::cuda {

ErrorCode launch_row_tangents_norm(const RowTangentsCall& call, StreamHandle stream);
ErrorCode launch_row_tangents_norm_bwd(const RowTangentsCall& call, StreamHandle stream);
ErrorCode launch_row_tangents_softmax(const RowTangentsCall& call, StreamHandle stream);
ErrorCode launch_row_tangents_softmax_bwd(const RowTangentsCall& call, StreamHandle stream);

}  // namespace fastflat::cuda

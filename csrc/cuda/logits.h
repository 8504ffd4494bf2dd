// SPDX-License-Identifier: Apache-2.0
// Launchers of the logits family; formulas: csrc/math/logits.h and fastflat/_ops. Every launcher returns a cudaError_t.
#pragma once

#include "core/logits.h"
#include "cuda/types.h"

namespace fastflat::cuda {

ErrorCode launch_logits_divergence(const LogitsCall& call, StreamHandle stream);
ErrorCode launch_logits_divergence_bwd(const LogitsCall& call, StreamHandle stream);
ErrorCode launch_logits_loss(const LogitsCall& call, StreamHandle stream);
ErrorCode launch_logits_loss_bwd(const LogitsCall& call, StreamHandle stream);
ErrorCode launch_logits_stats(const LogitsCall& call, StreamHandle stream);

}  // namespace fastflat::cuda

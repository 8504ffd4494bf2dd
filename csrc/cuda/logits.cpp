// SPDX-License-Identifier: Apache-2.0
// Divergences, losses and statistics of rows of logits. A scan is left to the fallback.
#include "cuda/logits.h"

#include "core/logits_checks.h"
#include "cuda/device.h"

namespace fastflat::cuda {
namespace {

struct Logits {
  static void run(LogitsOp which, const char* op, const Tensor& like, const LogitsCall& call) {
    const OnDevice device(like);
    using Launch = ErrorCode (*)(const LogitsCall&, StreamHandle);
    constexpr Launch launches[] = {launch_logits_divergence, launch_logits_divergence_bwd, launch_logits_loss,
                                   launch_logits_loss_bwd, launch_logits_stats};
    check_launch(op, launches[which](call, device.stream));
  }
};

}  // namespace
}  // namespace fastflat::cuda

STABLE_TORCH_LIBRARY_IMPL(fastflat, CUDA, m) {
  using Ops = fastflat::LogitsOps<fastflat::cuda::Logits>;
  m.impl("logits_divergence", TORCH_BOX(&Ops::divergence));
  m.impl("logits_divergence_bwd", TORCH_BOX(&Ops::divergence_bwd));
  m.impl("logits_loss", TORCH_BOX(&Ops::loss));
  m.impl("logits_loss_bwd", TORCH_BOX(&Ops::loss_bwd));
  m.impl("logits_stats", TORCH_BOX(&Ops::stats));
}

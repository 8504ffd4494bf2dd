// SPDX-License-Identifier: Apache-2.0
// The saturating nonlinearity. Sums over weights are left to the fallback.
#include "cuda/weight_norms.h"

#include "core/weight_norms_checks.h"
#include "cuda/device.h"

namespace fastflat::cuda {
namespace {

Tensor saturate(const Tensor& w, const Tensor& alpha) {
  constexpr auto op = "weight_norms_saturate";
  const OnDevice device(w);
  Weights weights(op, w, false);
  const Tensor from = aligned(weights.w);
  weights.call.w = from.const_data_ptr();
  weights.call.alpha = weights.take("alpha", alpha, weights.compute(), 1);
  Tensor y = weights.result();
  weights.call.out = y.mutable_data_ptr();
  check_launch(op, launch_weight_norms_saturate(weights.call, device.stream));
  return y;
}

}  // namespace
}  // namespace fastflat::cuda

STABLE_TORCH_LIBRARY_IMPL(fastflat, CUDA, m) { m.impl("weight_norms_saturate", TORCH_BOX(&fastflat::cuda::saturate)); }

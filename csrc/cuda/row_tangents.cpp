// SPDX-License-Identifier: Apache-2.0
// Tangents of layer norm, RMS norm, softmax and cross-entropy.
#include "cuda/row_tangents.h"

#include "core/row_tangents_checks.h"
#include "cuda/device.h"

namespace fastflat::cuda {
namespace {

template <const RowTangentsOp& op, ErrorCode (*launch)(const RowTangentsCall&, StreamHandle)>
void boxed(StableIValue* stack, uint64_t arguments, uint64_t) {
  RowTangents rows(op, stack, arguments);
  const OnDevice device(rows.like());
  rows.allocate();
  check_launch(op.name, launch(rows.call, device.stream));
  rows.leave(stack);
}

}  // namespace
}  // namespace fastflat::cuda

STABLE_TORCH_LIBRARY_IMPL(fastflat, CUDA, m) {
  using namespace fastflat::cuda;
  namespace ops = fastflat::row_tangents_ops;
  m.impl("row_tangents_norm", &boxed<ops::norm, launch_row_tangents_norm>);
  m.impl("row_tangents_norm_bwd", &boxed<ops::norm_bwd, launch_row_tangents_norm_bwd>);
  m.impl("row_tangents_softmax", &boxed<ops::softmax, launch_row_tangents_softmax>);
  m.impl("row_tangents_softmax_bwd", &boxed<ops::softmax_bwd, launch_row_tangents_softmax_bwd>);
}

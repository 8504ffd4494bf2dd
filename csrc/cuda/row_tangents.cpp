// SPDX-License-Identifier: Apache-2.0
// Tangents of layer norm, RMS norm, softmax and cross-entropy.
#include "cuda/row_tangents.h"

#include "core/row_tangents_checks.h"
#include "cuda/device.h"

namespace fastflat::cuda {
namespace {

const void* place(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

RowsOfTangents call_of(const RowTangents& sizes, bool option, const Tensor& normal, Tensor& out) {
  RowsOfTangents call{sizes.storage, sizes.K, sizes.R, sizes.D, option};
  call.normal = normal.const_data_ptr();
  call.out = out.mutable_data_ptr();
  return call;
}

std::tuple<Tensor, Tensor, Tensor> row_tangents_norm(const OptionalTensor& x, const Tensor& normal, const Tensor& inv,
                                                     const OptionalTensor& weight, const OptionalTensor& along_weight,
                                                     const OptionalTensor& along_bias, bool centered) {
  constexpr auto op = "row_tangents_norm";
  const auto sizes = check_norm(op, x, normal, inv, weight, along_weight, along_bias);
  const OnDevice device(normal);
  Tensor out = empty_dense(normal, {sizes.K, sizes.R, sizes.D}, sizes.own());
  Tensor mean = empty_dense(normal, {sizes.K, sizes.R}, sizes.compute());
  Tensor scale = empty_dense(normal, {sizes.K, sizes.R}, sizes.compute());
  RowsOfTangents call = call_of(sizes, centered, normal, out);
  call.x = place(x);
  call.of_row = inv.const_data_ptr();
  call.weight = place(weight);
  call.along_weight = place(along_weight);
  call.along_bias = place(along_bias);
  call.new_mean = mean.mutable_data_ptr();
  call.new_scale = scale.mutable_data_ptr();
  check_launch(op, launch_row_tangents_norm(call, device.stream));
  return {out, mean, scale};
}

Tensor row_tangents_norm_bwd(const OptionalTensor& g, const OptionalTensor& x, const OptionalTensor& mean,
                             const OptionalTensor& scale, const OptionalTensor& along_weight, const Tensor& normal,
                             const Tensor& grad, const Tensor& inv, const OptionalTensor& weight, bool centered) {
  constexpr auto op = "row_tangents_norm_bwd";
  const auto sizes = check_norm_bwd(op, g, x, mean, scale, along_weight, normal, grad, inv, weight);
  const OnDevice device(normal);
  Tensor out = empty_dense(normal, {sizes.K, sizes.R, sizes.D}, sizes.own());
  RowsOfTangents call = call_of(sizes, centered, normal, out);
  call.g = place(g);
  call.x = place(x);
  call.mean = place(mean);
  call.scale = place(scale);
  call.along_weight = place(along_weight);
  call.grad = grad.const_data_ptr();
  call.of_row = inv.const_data_ptr();
  call.weight = place(weight);
  check_launch(op, launch_row_tangents_norm_bwd(call, device.stream));
  return out;
}

Tensor row_tangents_softmax(const Tensor& t, const Tensor& p, const OptionalTensor& scale, bool log) {
  constexpr auto op = "row_tangents_softmax";
  const auto sizes = check_softmax(op, t, p, scale);
  const OnDevice device(p);
  Tensor out = empty_dense(p, {sizes.K, sizes.R, sizes.D}, sizes.own());
  RowsOfTangents call = call_of(sizes, log, p, out);
  call.x = t.const_data_ptr();
  call.of_row = place(scale);
  check_launch(op, launch_row_tangents_softmax(call, device.stream));
  return out;
}

Tensor row_tangents_softmax_bwd(const OptionalTensor& g, const OptionalTensor& along, const Tensor& p,
                                const Tensor& grad) {
  constexpr auto op = "row_tangents_softmax_bwd";
  const auto sizes = check_softmax_bwd(op, g, along, p, grad);
  const OnDevice device(p);
  Tensor out = empty_dense(p, {sizes.K, sizes.R, sizes.D}, sizes.own());
  RowsOfTangents call = call_of(sizes, false, p, out);
  call.g = place(g);
  call.x = place(along);
  call.grad = grad.const_data_ptr();
  check_launch(op, launch_row_tangents_softmax_bwd(call, device.stream));
  return out;
}

}  // namespace
}  // namespace fastflat::cuda

STABLE_TORCH_LIBRARY_IMPL(fastflat, CUDA, m) {
  m.impl("row_tangents_norm", TORCH_BOX(&fastflat::cuda::row_tangents_norm));
  m.impl("row_tangents_norm_bwd", TORCH_BOX(&fastflat::cuda::row_tangents_norm_bwd));
  m.impl("row_tangents_softmax", TORCH_BOX(&fastflat::cuda::row_tangents_softmax));
  m.impl("row_tangents_softmax_bwd", TORCH_BOX(&fastflat::cuda::row_tangents_softmax_bwd));
}

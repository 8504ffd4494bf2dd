// SPDX-License-Identifier: Apache-2.0
// Checks of the arguments that the sharpness and descent ops take beside their lists, for the glue of every device.
#pragma once

#include "core/lists.h"
#include "math/descent.h"

namespace fastflat {

inline const double* numbers(const Tensor& t) { return static_cast<const double*>(t.const_data_ptr()); }

inline void check_scale_arguments(const char* op, const Tensor& sums, const Tensor& rho) {
  STD_TORCH_CHECK(sums.dim() == 2 && sums.size(1) == 3, "fastflat::", op, ": sums must have shape [T, 3]");
  check_numbers(op, "sums", sums, sums.numel(), sums);
  check_numbers(op, "rho", rho, rho.numel(), sums);
}

inline void check_ascent_arguments(const char* op, const Tensors& ws, size_t tensors, bool into, bool kept,
                                   const Tensor& scale) {
  const int64_t count = static_cast<int64_t>(tensors);
  STD_TORCH_CHECK(!into || !kept, "fastflat::", op, ": outs and backup must not both be given");
  check_numbers(op, "scale", scale, scale.numel(), ws.empty() ? scale : ws[0]);
  STD_TORCH_CHECK(scale.numel() >= count, "fastflat::", op, ": scale must have at least ", count, " values, got ",
                  scale.numel());
}

inline void check_rows_arguments(const char* op, const Tensor& hyper, const Tensor& group, const Tensor& steps,
                                 const Tensor& mix, const std::optional<Tensor>& of_gradients,
                                 const std::optional<Tensor>& of_weights, int64_t rule) {
  const int64_t count = group.numel();
  STD_TORCH_CHECK(hyper.dim() == 2 && hyper.size(1) == hyper::columns, "fastflat::", op, ": hyper must have shape [G, ",
                  static_cast<int>(hyper::columns), "]");
  check_numbers(op, "hyper", hyper, hyper.numel(), hyper);
  check_numbers(op, "steps", steps, count, hyper);
  check_numbers(op, "mix", mix, 3, hyper);
  STD_TORCH_CHECK(group.scalar_type() == ScalarType::Long && group.is_contiguous(), "fastflat::", op,
                  ": group must be contiguous int64");
  STD_TORCH_CHECK(group.device() == hyper.device(), "fastflat::", op, ": group must be on the device of hyper");
  STD_TORCH_CHECK(rule >= rule_sgd && rule <= rule_lamb, "fastflat::", op, ": rule must lie in [0, 4], got ", rule);
  if (rule != rule_lars) return;
  STD_TORCH_CHECK(of_gradients && of_weights, "fastflat::", op, ": lars must have the sums of gradients and weights");
  check_numbers(op, "of_gradients", *of_gradients, 3 * count, hyper);
  check_numbers(op, "of_weights", *of_weights, 3 * count, hyper);
}

}  // namespace fastflat

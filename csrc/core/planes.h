// SPDX-License-Identifier: Apache-2.0
// Checks and shapes of bit planes, for the glue of every device.
#pragma once

#include "core/checks.h"
#include "core/tensor.h"

namespace fastflat {

inline void check_like_planes(const char* op, const char* name, const Tensor& t, const Tensor& p) {
  bool same = t.dim() == p.dim();
  for (int64_t d = 0; same && d < p.dim(); ++d) same = t.size(d) == p.size(d);
  STD_TORCH_CHECK(same, "fastflat::", op, ": ", name, " must have the shape of p");
  STD_TORCH_CHECK(t.scalar_type() == p.scalar_type(), "fastflat::", op, ": ", name, " must have the dtype of p");
  STD_TORCH_CHECK(t.device() == p.device(), "fastflat::", op, ": ", name, " must be on the device of p");
}

inline void check_planes(const char* op, const Tensor& p, const Tensor& q, int64_t most) {
  STD_TORCH_CHECK(p.dim() > 0 && p.size(0) >= 1 && p.size(0) <= most, "fastflat::", op,
                  ": p must have shape [N, ...] with 1 to ", most, " planes");
  check_like_planes(op, "q", q, p);
}

// A small tensor of `values` numbers in the compute type of p.
inline void check_small(const char* op, const char* name, const Tensor& t, const Tensor& p, int64_t values) {
  STD_TORCH_CHECK(t.scalar_type() == compute_type(p.scalar_type()), "fastflat::", op, ": ", name,
                  " must be float32 (float64 for float64 p)");
  STD_TORCH_CHECK(t.numel() == values, "fastflat::", op, ": ", name, " must have ", values,
                  values == 1 ? " value" : " values", ", got ", t.numel());
  STD_TORCH_CHECK(t.device() == p.device(), "fastflat::", op, ": ", name, " must be on the device of p");
}

inline std::vector<int64_t> plane_sizes(const Tensor& p) { return {p.sizes().begin() + 1, p.sizes().end()}; }

inline void check_like_plane(const char* op, const char* name, const Tensor& t, const Tensor& p) {
  bool same = t.dim() + 1 == p.dim();
  for (int64_t d = 0; same && d < t.dim(); ++d) same = t.size(d) == p.size(d + 1);
  STD_TORCH_CHECK(same, "fastflat::", op, ": ", name, " must have the shape of a plane of p");
  STD_TORCH_CHECK(t.device() == p.device(), "fastflat::", op, ": ", name, " must be on the device of p");
}

}  // namespace fastflat

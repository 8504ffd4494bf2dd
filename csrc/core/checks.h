// SPDX-License-Identifier: Apache-2.0
// What keeps memory safe when a raw op is called past fastflat.functional, whose checks say more.
#pragma once

#include "core/tensor.h"

namespace fastflat {

inline ScalarType compute_type(ScalarType storage) {
  return storage == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A scale or zero-point: as many values as the geometry has channels, in the compute type.
inline void check_parameter(const char* op, const char* name, const Tensor& p, const Tensor& x, int64_t values) {
  STD_TORCH_CHECK(p.scalar_type() == compute_type(x.scalar_type()), "fastflat::", op, ": ", name,
                  " must be float32 (float64 for float64 x)");
  STD_TORCH_CHECK(p.numel() == values, "fastflat::", op, ": ", name, " must have ", values, " values, got ", p.numel());
  STD_TORCH_CHECK(p.device() == x.device(), "fastflat::", op, ": ", name, " must be on the device of x");
}

inline void check_same_shape(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  bool same = t.dim() == x.dim();
  for (int64_t d = 0; same && d < x.dim(); ++d) same = t.size(d) == x.size(d);
  STD_TORCH_CHECK(same, "fastflat::", op, ": ", name, " must have the shape of x");
  STD_TORCH_CHECK(t.device() == x.device(), "fastflat::", op, ": ", name, " must be on the device of x");
}

inline void check_layout(const char* op, const Tensor& x, int64_t axis, int64_t group) {
  STD_TORCH_CHECK(axis < x.dim(), "fastflat::", op, ": axis must be less than ", x.dim(), ", got ", axis);
  STD_TORCH_CHECK(group <= 0 || (x.dim() > 0 && x.size(x.dim() - 1) % group == 0), "fastflat::", op,
                  ": group must divide the last axis of x, got ", group);
}

}  // namespace fastflat

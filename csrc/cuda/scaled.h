// SPDX-License-Identifier: Apache-2.0
// What the glue of quantizers has in common: the data as the kernels want it, with its scales and zero-points.
#pragma once

#include <vector>

#include "core/checks.h"
#include "cuda/device.h"

namespace fastflat::cuda {

inline const void* data(const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }

// The tensors live as long as this does.
struct Scaled {
  const char* op;
  Tensor x;
  Geometry geometry;
  std::optional<Tensor> scale, zero_point;

  Scaled(const char* op_, const Tensor& x_, const std::optional<Tensor>& scale_,
         const std::optional<Tensor>& zero_point_, int64_t axis, int64_t group)
      : op(op_), x(prepare(op_, x_, axis, group)), geometry(geometry_of(x, axis, group)) {
    scale = parameter("scale", scale_, geometry.channels);
    zero_point = parameter("zero_point", zero_point_, geometry.channels);
  }

  static Tensor prepare(const char* op, const Tensor& x, int64_t axis, int64_t group) {
    check_layout(op, x, axis, group);
    return aligned(dense(x, group > 0));
  }

  // A parameter of `values` values, contiguous.
  std::optional<Tensor> parameter(const char* name, const std::optional<Tensor>& p, int64_t values) const {
    if (!p) return std::nullopt;
    check_parameter(op, name, *p, x, values);
    return dense(*p, true);
  }

  // A cotangent or tangent in the storage order of x.
  Tensor along(const char* name, const Tensor& t) const {
    check_same_shape(op, name, t, x);
    return aligned(in_layout_of(t, x));
  }

  Tensor bytes(int64_t count) const { return empty_dense(x, {count}, ScalarType::Byte); }
};

}  // namespace fastflat::cuda

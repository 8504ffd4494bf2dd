// SPDX-License-Identifier: Apache-2.0
// The few things that the glue of every device needs from a tensor, on libtorch's stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "core/geometry.h"

namespace fastflat {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A new tensor on the device of `like`.
inline Tensor empty_strided(const Tensor& like, const int64_t* sizes, const int64_t* strides, int64_t dim,
                            ScalarType dtype) {
  int32_t device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, code, device_type, device_index, &handle));
  return Tensor(handle);
}

inline Tensor empty_dense(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= std::max<int64_t>(sizes[d], 1)) strides[d] = stride;
  return empty_strided(like, sizes.data(), strides.data(), static_cast<int64_t>(sizes.size()), dtype);
}

// The shape and strides of a dense `like` in another storage type; contiguous on wish, whatever axes of one element
// say.
inline Tensor empty_like(const Tensor& like, ScalarType dtype, bool contiguous = false) {
  const auto sizes = like.sizes(), strides = like.strides();
  if (contiguous) return empty_dense(like, {sizes.begin(), sizes.end()}, dtype);
  return empty_strided(like, sizes.data(), strides.data(), like.dim(), dtype);
}

// Whether the elements fill one block of memory without gaps or overlap, in any order of the axes.
inline bool is_dense(const Tensor& x) {
  if (x.is_contiguous()) return true;
  std::vector<std::pair<int64_t, int64_t>> axes;
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (x.size(d) != 1) axes.emplace_back(x.stride(d), x.size(d));
  }
  std::sort(axes.begin(), axes.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : axes) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// x itself where kernels can walk its storage, else one copy: in the layout of empty_like, contiguous for groups.
inline Tensor dense(const Tensor& x, bool contiguous) {
  if (x.is_contiguous()) return x.numel() == 0 ? torch::stable::clone(x) : x;
  if (contiguous) return torch::stable::contiguous(x);
  return is_dense(x) ? x : torch::stable::clone(x);
}

// Values of t in the layout of `like` (same shape): t itself, or one copy.
inline Tensor in_layout_of(const Tensor& t, const Tensor& like) {
  if (t.is_contiguous() && like.is_contiguous()) return t;
  bool same = true;
  for (int64_t d = 0; d < like.dim(); ++d) same &= like.size(d) == 1 || t.stride(d) == like.stride(d);
  if (same) return t;
  Tensor copy = empty_like(like, t.scalar_type());
  torch::stable::copy_(copy, t);
  return copy;
}

// Layout of the scales of a dense x; `group` wins over `axis`, negative axis means one scale.
inline Geometry geometry_of(const Tensor& x, int64_t axis, int64_t group) {
  const int64_t n = x.numel();
  if (group > 0) return {1, n / group, group};
  if (axis < 0) return {1, 1, n};
  const int64_t channels = x.size(axis);
  // An axis of one element may carry any stride.
  const int64_t inner = channels == 1 ? n : x.stride(axis);
  return {n == 0 ? 0 : n / (channels * inner), channels, inner};
}

inline std::vector<int64_t> scale_sizes(const Tensor& x, int64_t axis, int64_t group) {
  if (group > 0) {
    std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
    sizes.back() /= group;
    return sizes;
  }
  return axis < 0 ? std::vector<int64_t>{} : std::vector<int64_t>{x.size(axis)};
}

}  // namespace fastflat

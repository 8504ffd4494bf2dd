// SPDX-License-Identifier: Apache-2.0
// What calls for one tensor and for a list of tensors share: their description, and sums to gradients.
#pragma once

#include <cstdint>

#include "core/tensor.h"
#include "cpu/fake_quantize.h"
#include "math/fake_quantize.h"

namespace fastflat::cpu {

inline FakeQuantizeCall describe(const Tensor& x, int64_t qmin, int64_t qmax, int64_t axis, int64_t group, double eps,
                                 int64_t rules) {
  FakeQuantizeCall call{};
  call.geometry = geometry_of(x, axis, group);
  call.qmin = qmin;
  call.qmax = qmax;
  call.eps = eps;
  call.rules = rules;
  call.factor = 1.0;
  call.x = x.const_data_ptr();
  return call;
}

template <class C>
void finish(const FakeQuantizeCall& call, const double* sums, void* gs, void* gz) {
  const auto grid = IntegerGrid<C>::make(call.qmin, call.qmax, call.eps, call.factor, call.rules);
  for (int64_t c = 0; c < call.geometry.channels; ++c) {
    static_cast<C*>(gs)[c] = grid.scale_gradient(static_cast<C>(sums[2 * c]));
    if (!gz) continue;
    const auto group = grid.group(static_cast<const C*>(call.scale)[c]);
    static_cast<C*>(gz)[c] = grid.zero_gradient(static_cast<C>(sums[2 * c + 1]), group);
  }
}

// Sums, two a channel, to gradients of scale and zero-point (null: not wanted) in the compute type of `data`.
inline void finish(const FakeQuantizeCall& call, ScalarType data, const double* sums, void* gs, void* gz) {
  return data == ScalarType::Double ? finish<double>(call, sums, gs, gz) : finish<float>(call, sums, gs, gz);
}

}  // namespace fastflat::cpu

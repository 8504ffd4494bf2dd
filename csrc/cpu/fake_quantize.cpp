// SPDX-License-Identifier: Apache-2.0
// Glue of the fake_quantize family: layouts, allocation, threads. The loops are in fake_quantize_loops.cpp.
#include "cpu/fake_quantize.h"

#include "core/checks.h"
#include "core/storage.h"
#include "core/tensor.h"
#include "cpu/fake_quantize_call.h"
#include "cpu/scale_from_data.h"
#include "cpu/threads.h"
#include "math/fake_quantize.h"

namespace fastflat::cpu {
namespace {

Tensor fake_quantize(const Tensor& x_, const Tensor& scale, const std::optional<Tensor>& zero_point, int64_t qmin,
                     int64_t qmax, int64_t axis, int64_t group, double eps, int64_t rules,
                     std::optional<ScalarType> dtype) {
  constexpr auto op = "fake_quantize";
  check_layout(op, x_, axis, group);
  const Tensor x = dense(x_, group > 0);
  FakeQuantizeCall call = describe(x, qmin, qmax, axis, group, eps, rules);
  const ScaleTensors scales(op, scale, zero_point, x, call);
  const ScalarType result = dtype.value_or(x.scalar_type());
  const Pair pair = pair_of(op, x.scalar_type(), result);
  Tensor y = empty_like(x, result, group > 0);
  call.out = y.mutable_data_ptr();
  map(fake_quantize_loops().forward[pair], call);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> fake_quantize_bwd(const Tensor& gy_, const Tensor& x_, const Tensor& scale,
                                                     const std::optional<Tensor>& zero_point, int64_t qmin,
                                                     int64_t qmax, int64_t axis, int64_t group, double eps,
                                                     int64_t rules, double factor, bool need_scale) {
  constexpr auto op = "fake_quantize_bwd";
  check_layout(op, x_, axis, group);
  check_same_shape(op, "gy", gy_, x_);
  const Tensor x = dense(x_, group > 0);
  const Tensor gy = in_layout_of(gy_, x);
  FakeQuantizeCall call = describe(x, qmin, qmax, axis, group, eps, rules);
  const ScaleTensors scales(op, scale, zero_point, x, call);
  call.factor = factor;
  const Pair pair = pair_of(op, x.scalar_type(), gy.scalar_type());
  Tensor gx = empty_like(x, x.scalar_type(), group > 0);
  call.in = gy.const_data_ptr();
  call.out = gx.mutable_data_ptr();
  const std::vector<int64_t> none{0}, all(scale.sizes().begin(), scale.sizes().end());
  const bool need_zero = need_scale && zero_point;
  Tensor gs = empty_dense(scale, need_scale ? all : none, scale.scalar_type());
  Tensor gz = empty_dense(scale, need_zero ? all : none, scale.scalar_type());
  if (!need_scale) {
    map(fake_quantize_loops().backward[pair], call);
    return {gx, gs, gz};
  }
  std::vector<double> sums(2 * call.geometry.channels, 0.0);
  reduce(fake_quantize_loops().backward_channels[pair], fake_quantize_loops().backward_range[pair], call, 2,
         sums.data(), std::plus<double>());
  void* to_zero = need_zero ? gz.mutable_data_ptr() : nullptr;
  finish(call, x.scalar_type(), sums.data(), gs.mutable_data_ptr(), to_zero);
  return {gx, gs, gz};
}

Tensor fake_quantize_jvp(const std::optional<Tensor>& tx_, const std::optional<Tensor>& ts_,
                         const std::optional<Tensor>& tz_, const Tensor& x_, const Tensor& scale,
                         const std::optional<Tensor>& zero_point, int64_t qmin, int64_t qmax, int64_t axis,
                         int64_t group, double eps, int64_t rules, double factor, std::optional<ScalarType> dtype) {
  constexpr auto op = "fake_quantize_jvp";
  check_layout(op, x_, axis, group);
  const Tensor x = dense(x_, group > 0);
  FakeQuantizeCall call = describe(x, qmin, qmax, axis, group, eps, rules);
  const ScaleTensors scales(op, scale, zero_point, x, call);
  call.factor = factor;
  const ScalarType result = dtype.value_or(x.scalar_type());
  const Pair pair = pair_of(op, x.scalar_type(), result);
  const Tangents tangents(op, tx_, ts_, tz_, x, result, call.geometry.channels);
  tangents.point(call);
  Tensor ty = empty_like(x, result, group > 0);
  call.out = ty.mutable_data_ptr();
  map(tangents.of_result ? fake_quantize_loops().tangent_of_result[pair] : fake_quantize_loops().tangent[pair], call);
  return ty;
}

// Scales of the channels [begin, end).
template <class C>
void store_scales(const double* absmax, int64_t begin, int64_t end, int64_t qmax, void* scale) {
  for (int64_t c = begin; c < end; ++c) {
    static_cast<C*>(scale)[c] = absmax_scale(static_cast<C>(absmax[c]), static_cast<C>(qmax));
  }
}

std::tuple<Tensor, Tensor> fake_quantize_absmax(const Tensor& x_, int64_t qmin, int64_t qmax, int64_t axis,
                                                int64_t group, double eps, int64_t rules,
                                                std::optional<ScalarType> dtype) {
  constexpr auto op = "fake_quantize_absmax";
  check_layout(op, x_, axis, group);
  const Tensor x = dense(x_, group > 0);
  FakeQuantizeCall call = describe(x, qmin, qmax, axis, group, eps, rules);
  const ScalarType result = dtype.value_or(x.scalar_type());
  const Pair pair = pair_of(op, x.scalar_type(), result);
  const Storage storage = storage_of(op, "x", x.scalar_type());
  const ScalarType compute = compute_type(x.scalar_type());
  Tensor y = empty_like(x, result, group > 0);
  Tensor scale = empty_dense(x, scale_sizes(x, axis, group), compute);
  call.scale = scale.const_data_ptr();
  call.out = y.mutable_data_ptr();
  const auto store = compute == ScalarType::Double ? store_scales<double> : store_scales<float>;
  scale_from_data(
      storage, call,
      [=, to = scale.mutable_data_ptr()](const double* absmax, int64_t begin, int64_t end) {
        store(absmax, begin, end, qmax, to);
      },
      fake_quantize_loops().forward[pair], call);
  return {y, scale};
}

}  // namespace
}  // namespace fastflat::cpu

STABLE_TORCH_LIBRARY_IMPL(fastflat, CPU, m) {
  m.impl("fake_quantize", TORCH_BOX(&fastflat::cpu::fake_quantize));
  m.impl("fake_quantize_bwd", TORCH_BOX(&fastflat::cpu::fake_quantize_bwd));
  m.impl("fake_quantize_jvp", TORCH_BOX(&fastflat::cpu::fake_quantize_jvp));
  m.impl("fake_quantize_absmax", TORCH_BOX(&fastflat::cpu::fake_quantize_absmax));
}

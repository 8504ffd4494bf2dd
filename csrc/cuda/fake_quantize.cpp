// SPDX-License-Identifier: Apache-2.0
// Glue of the fake_quantize family: layouts, allocation, device and stream. The kernels are in fake_quantize.cu.
#include "cuda/fake_quantize.h"

#include "core/storage.h"
#include "cuda/scaled.h"

namespace fastflat::cuda {
namespace {

// What the ops of the family share.
struct QuantizeCall : Scaled {
  Quantizer quantizer;

  QuantizeCall(const char* op_, const Tensor& x_, const std::optional<Tensor>& scale_,
               const std::optional<Tensor>& zero_point_, int64_t qmin, int64_t qmax, int64_t axis, int64_t group,
               double eps, int64_t rules, double factor)
      : Scaled(op_, x_, scale_, zero_point_, axis, group),
        quantizer{data(scale), data(zero_point), qmin, qmax, eps, factor, rules} {}
};

Tensor fake_quantize(const Tensor& x, const Tensor& scale, const std::optional<Tensor>& zero_point, int64_t qmin,
                     int64_t qmax, int64_t axis, int64_t group, double eps, int64_t rules,
                     std::optional<ScalarType> dtype) {
  constexpr auto op = "fake_quantize";
  const OnDevice device(x);
  const QuantizeCall call(op, x, scale, zero_point, qmin, qmax, axis, group, eps, rules, 1.0);
  const ScalarType result = dtype.value_or(x.scalar_type());
  const Pair pair = pair_of(op, x.scalar_type(), result);
  Tensor y = empty_like(call.x, result, group > 0);
  check_launch(op, launch_fake_quantize(pair, call.geometry, call.quantizer, call.x.const_data_ptr(),
                                        y.mutable_data_ptr(), device.stream));
  return y;
}

std::tuple<Tensor, Tensor, Tensor> fake_quantize_bwd(const Tensor& gy_, const Tensor& x, const Tensor& scale,
                                                     const std::optional<Tensor>& zero_point, int64_t qmin,
                                                     int64_t qmax, int64_t axis, int64_t group, double eps,
                                                     int64_t rules, double factor, bool need_scale) {
  constexpr auto op = "fake_quantize_bwd";
  const OnDevice device(x);
  const QuantizeCall call(op, x, scale, zero_point, qmin, qmax, axis, group, eps, rules, factor);
  const Tensor gy = call.along("gy", gy_);
  const Pair pair = pair_of(op, x.scalar_type(), gy.scalar_type());
  Tensor gx = empty_like(call.x, x.scalar_type(), group > 0);
  const std::vector<int64_t> none{0}, all(scale.sizes().begin(), scale.sizes().end());
  const bool need_zero = need_scale && zero_point;
  Tensor gs = empty_dense(scale, need_scale ? all : none, scale.scalar_type());
  Tensor gz = empty_dense(scale, need_zero ? all : none, scale.scalar_type());
  const void* from = call.x.const_data_ptr();
  void* to = gx.mutable_data_ptr();
  if (!need_scale) {
    check_launch(op, launch_fake_quantize_ste(pair, call.geometry, call.quantizer, gy.const_data_ptr(), from, to,
                                              device.stream));
    return {gx, gs, gz};
  }
  Tensor workspace = call.bytes(fake_quantize_bwd_workspace(pair, call.geometry));
  check_launch(op, launch_fake_quantize_bwd(pair, call.geometry, call.quantizer, gy.const_data_ptr(), from, to,
                                            gs.mutable_data_ptr(), need_zero ? gz.mutable_data_ptr() : nullptr,
                                            workspace.mutable_data_ptr(), device.stream));
  return {gx, gs, gz};
}

Tensor fake_quantize_jvp(const std::optional<Tensor>& tx_, const std::optional<Tensor>& ts_,
                         const std::optional<Tensor>& tz_, const Tensor& x, const Tensor& scale,
                         const std::optional<Tensor>& zero_point, int64_t qmin, int64_t qmax, int64_t axis,
                         int64_t group, double eps, int64_t rules, double factor, std::optional<ScalarType> dtype) {
  constexpr auto op = "fake_quantize_jvp";
  const OnDevice device(x);
  const QuantizeCall call(op, x, scale, zero_point, qmin, qmax, axis, group, eps, rules, factor);
  const ScalarType result = dtype.value_or(x.scalar_type());
  const Pair pair = pair_of(op, x.scalar_type(), result);
  const auto tx = tx_ ? std::optional(call.along("tx", *tx_)) : std::nullopt;
  const auto ts = call.parameter("ts", ts_, call.geometry.channels);
  const auto tz = call.parameter("tz", tz_, call.geometry.channels);
  const bool of_result = tx && tx->scalar_type() != x.scalar_type();
  STD_TORCH_CHECK(!of_result || tx->scalar_type() == result, "fastflat::", op,
                  ": tx must have the dtype of x or of the result");
  Tensor ty = empty_like(call.x, result, group > 0);
  check_launch(op, launch_fake_quantize_jvp(pair, of_result, call.geometry, call.quantizer, data(tx), data(ts),
                                            data(tz), call.x.const_data_ptr(), ty.mutable_data_ptr(), device.stream));
  return ty;
}

std::tuple<Tensor, Tensor> fake_quantize_absmax(const Tensor& x, int64_t qmin, int64_t qmax, int64_t axis,
                                                int64_t group, double eps, int64_t rules,
                                                std::optional<ScalarType> dtype) {
  constexpr auto op = "fake_quantize_absmax";
  const OnDevice device(x);
  const QuantizeCall call(op, x, std::nullopt, std::nullopt, qmin, qmax, axis, group, eps, rules, 1.0);
  const ScalarType result = dtype.value_or(x.scalar_type());
  const Pair pair = pair_of(op, x.scalar_type(), result);
  Tensor y = empty_like(call.x, result, group > 0);
  Tensor scale = empty_dense(x, scale_sizes(x, axis, group), compute_type(x.scalar_type()));
  Tensor workspace = call.bytes(fake_quantize_absmax_workspace(pair, call.geometry));
  check_launch(op, launch_fake_quantize_absmax(pair, call.geometry, call.quantizer, call.x.const_data_ptr(),
                                               y.mutable_data_ptr(), scale.mutable_data_ptr(),
                                               workspace.mutable_data_ptr(), device.stream));
  return {y, scale};
}

}  // namespace
}  // namespace fastflat::cuda

STABLE_TORCH_LIBRARY_IMPL(fastflat, CUDA, m) {
  m.impl("fake_quantize", TORCH_BOX(&fastflat::cuda::fake_quantize));
  m.impl("fake_quantize_bwd", TORCH_BOX(&fastflat::cuda::fake_quantize_bwd));
  m.impl("fake_quantize_jvp", TORCH_BOX(&fastflat::cuda::fake_quantize_jvp));
  m.impl("fake_quantize_absmax", TORCH_BOX(&fastflat::cuda::fake_quantize_absmax));
}

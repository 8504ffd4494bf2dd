// SPDX-License-Identifier: Apache-2.0
// Glue of the fake_quantize family: layouts, allocation, device and stream. The kernels are in fake_quantize.cu.
#include "cuda/fake_quantize.h"

#include "core/checks.h"
#include "core/storage.h"
#include "cuda/device.h"

namespace fastflat::cuda {
namespace {

const void* data(const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }

std::optional<Tensor> parameter(const char* op, const char* name, const std::optional<Tensor>& p, const Tensor& x,
                                const Geometry& g) {
  if (!p) return std::nullopt;
  check_parameter(op, name, *p, x, g.channels);
  return dense(*p, true);
}

// What the ops of the family share: x as the kernels want it, the grid, scale and zero-point. The tensors live as long
// as this does.
struct Call {
  const char* op;
  Tensor x;
  Geometry geometry;
  std::optional<Tensor> scale, zero_point;
  Quantizer quantizer;

  Call(const char* op_, const Tensor& x_, const std::optional<Tensor>& scale_, const std::optional<Tensor>& zero_point_,
       int64_t qmin, int64_t qmax, int64_t axis, int64_t group, double eps, int64_t rules, double factor)
      : op(op_), x(prepare(op_, x_, axis, group)), geometry(geometry_of(x, axis, group)) {
    scale = parameter(op, "scale", scale_, x, geometry);
    zero_point = parameter(op, "zero_point", zero_point_, x, geometry);
    quantizer = {data(scale), data(zero_point), qmin, qmax, eps, factor, rules};
  }

  static Tensor prepare(const char* op, const Tensor& x, int64_t axis, int64_t group) {
    check_layout(op, x, axis, group);
    return aligned(dense(x, group > 0));
  }

  // A cotangent or tangent in the storage order of x.
  Tensor along(const char* name, const Tensor& t) const {
    check_same_shape(op, name, t, x);
    return aligned(in_layout_of(t, x));
  }

  Tensor bytes(int64_t count) const { return empty_dense(x, {count}, ScalarType::Byte); }
};

Tensor fake_quantize(const Tensor& x, const Tensor& scale, const std::optional<Tensor>& zero_point, int64_t qmin,
                     int64_t qmax, int64_t axis, int64_t group, double eps, int64_t rules,
                     std::optional<ScalarType> dtype) {
  constexpr auto op = "fake_quantize";
  const OnDevice device(x);
  const Call call(op, x, scale, zero_point, qmin, qmax, axis, group, eps, rules, 1.0);
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
  const Call call(op, x, scale, zero_point, qmin, qmax, axis, group, eps, rules, factor);
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
  const Call call(op, x, scale, zero_point, qmin, qmax, axis, group, eps, rules, factor);
  const ScalarType result = dtype.value_or(x.scalar_type());
  const Pair pair = pair_of(op, x.scalar_type(), result);
  const auto tx = tx_ ? std::optional(call.along("tx", *tx_)) : std::nullopt;
  const auto ts = parameter(op, "ts", ts_, x, call.geometry);
  const auto tz = parameter(op, "tz", tz_, x, call.geometry);
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
  const Call call(op, x, std::nullopt, std::nullopt, qmin, qmax, axis, group, eps, rules, 1.0);
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

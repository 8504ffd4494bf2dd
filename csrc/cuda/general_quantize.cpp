// SPDX-License-Identifier: Apache-2.0
// Glue of the general_quantize family: layouts, allocation, device and stream. The kernels are in general_quantize.cu.
#include "cuda/general_quantize.h"

#include "core/storage.h"
#include "cuda/scaled.h"
#include "math/general_quantize.h"

namespace fastflat::cuda {
namespace {

using MaybeTensor = std::optional<Tensor>;

// What the ops of the family share. Scalars and the state of the draws stay on the device.
struct GeneralCall : Scaled {
  MaybeTensor state, nu, a, delta;
  GeneralQuantizer quantizer;

  GeneralCall(const char* op_, const Tensor& x_, const Tensor& scale_, const MaybeTensor& zero_point_,
              const MaybeTensor& state_, const MaybeTensor& nu_, const MaybeTensor& a_, const MaybeTensor& delta_,
              int64_t qmin, int64_t qmax, int64_t axis, int64_t group, double eps, int64_t rules, double factor)
      : Scaled(op_, x_, scale_, zero_point_, axis, group) {
    const bool rounded = rules & rules::compute_input;
    STD_TORCH_CHECK(!rounded || x.element_size() == 2, "fastflat::", op,
                    ": rules may ask for rounding to the type of x only where x has 16 bits");
    STD_TORCH_CHECK(!rounded || !GeneralGrid<float>::floats(rules), "fastflat::", op,
                    ": rules may not ask for rounding to the type of x on a minifloat grid");
    nu = parameter("nu", nu_, 1);
    a = parameter("a", a_, 1);
    delta = parameter("delta", delta_, 1);
    if (noise_of(rules) != Noise::none) state = checked_state(state_);
    quantizer = {data(scale),
                 data(zero_point),
                 static_cast<const int64_t*>(data(state)),
                 data(nu),
                 data(a),
                 data(delta),
                 qmin,
                 qmax,
                 eps,
                 factor,
                 rules};
  }

  MaybeTensor checked_state(const MaybeTensor& given) const {
    STD_TORCH_CHECK(given.has_value(), "fastflat::", op, ": state must be given with rules that draw noise");
    STD_TORCH_CHECK(given->numel() == 2 && given->scalar_type() == ScalarType::Long && given->is_contiguous(),
                    "fastflat::", op, ": state must be a contiguous int64 tensor of 2 values");
    STD_TORCH_CHECK(given->device() == x.device(), "fastflat::", op, ": state must be on the device of x");
    return given;
  }
};

Tensor general_quantize(const Tensor& x, const Tensor& scale, const MaybeTensor& zero_point, const MaybeTensor& state,
                        const MaybeTensor& nu, const MaybeTensor& a, int64_t qmin, int64_t qmax, int64_t axis,
                        int64_t group, double eps, int64_t rules, std::optional<ScalarType> dtype) {
  constexpr auto op = "general_quantize";
  const OnDevice device(x);
  const GeneralCall call(op, x, scale, zero_point, state, nu, a, {}, qmin, qmax, axis, group, eps, rules, 1.0);
  const ScalarType result = dtype.value_or(x.scalar_type());
  const Pair pair = pair_of(op, x.scalar_type(), result);
  Tensor y = empty_like(call.x, result, group > 0);
  check_launch(op, launch_general_quantize(pair, call.geometry, call.quantizer, call.x.const_data_ptr(),
                                           y.mutable_data_ptr(), device.stream));
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> general_quantize_bwd(const Tensor& gy_, const Tensor& x, const Tensor& scale,
                                                                const MaybeTensor& zero_point, const MaybeTensor& state,
                                                                const MaybeTensor& nu, const MaybeTensor& a,
                                                                const MaybeTensor& delta, int64_t qmin, int64_t qmax,
                                                                int64_t axis, int64_t group, double eps, int64_t rules,
                                                                double factor, bool need_scale, bool need_delta) {
  constexpr auto op = "general_quantize_bwd";
  const OnDevice device(x);
  const GeneralCall call(op, x, scale, zero_point, state, nu, a, delta, qmin, qmax, axis, group, eps, rules, factor);
  const Tensor gy = call.along("gy", gy_);
  const Pair pair = pair_of(op, x.scalar_type(), gy.scalar_type());
  Tensor gx = empty_like(call.x, x.scalar_type(), group > 0);
  const std::vector<int64_t> none{0}, all(scale.sizes().begin(), scale.sizes().end());
  const bool need_zero = need_scale && zero_point, of_delta = need_delta && delta;
  Tensor gs = empty_dense(scale, need_scale ? all : none, scale.scalar_type());
  Tensor gz = empty_dense(scale, need_zero ? all : none, scale.scalar_type());
  Tensor gd = empty_dense(scale, of_delta ? std::vector<int64_t>{} : none, scale.scalar_type());
  const void* from = call.x.const_data_ptr();
  void* to = gx.mutable_data_ptr();
  if (!need_scale && !of_delta) {
    check_launch(op, launch_general_quantize_gx(pair, call.geometry, call.quantizer, gy.const_data_ptr(), from, to,
                                                device.stream));
    return {gx, gs, gz, gd};
  }
  Tensor workspace = call.bytes(general_quantize_bwd_workspace(pair, call.geometry, of_delta));
  const auto target = [](bool wanted, Tensor& t) { return wanted ? t.mutable_data_ptr() : nullptr; };
  check_launch(op, launch_general_quantize_bwd(pair, call.geometry, call.quantizer, gy.const_data_ptr(), from, to,
                                               target(need_scale, gs), target(need_zero, gz), target(of_delta, gd),
                                               workspace.mutable_data_ptr(), device.stream));
  return {gx, gs, gz, gd};
}

Tensor general_quantize_jvp(const MaybeTensor& tx_, const MaybeTensor& ts_, const MaybeTensor& tz_, const Tensor& x,
                            const Tensor& scale, const MaybeTensor& zero_point, const MaybeTensor& state,
                            const MaybeTensor& nu, const MaybeTensor& a, int64_t qmin, int64_t qmax, int64_t axis,
                            int64_t group, double eps, int64_t rules, double factor, std::optional<ScalarType> dtype) {
  constexpr auto op = "general_quantize_jvp";
  const OnDevice device(x);
  const GeneralCall call(op, x, scale, zero_point, state, nu, a, {}, qmin, qmax, axis, group, eps, rules, factor);
  const ScalarType result = dtype.value_or(x.scalar_type());
  const Pair pair = pair_of(op, x.scalar_type(), result);
  const auto tx = tx_ ? std::optional(call.along("tx", *tx_)) : std::nullopt;
  const auto ts = call.parameter("ts", ts_, call.geometry.channels);
  const auto tz = call.parameter("tz", tz_, call.geometry.channels);
  const bool of_result = tx && tx->scalar_type() != x.scalar_type();
  STD_TORCH_CHECK(!of_result || tx->scalar_type() == result, "fastflat::", op,
                  ": tx must have the dtype of x or of the result");
  Tensor ty = empty_like(call.x, result, group > 0);
  check_launch(op,
               launch_general_quantize_jvp(pair, of_result, call.geometry, call.quantizer, data(tx), data(ts), data(tz),
                                           call.x.const_data_ptr(), ty.mutable_data_ptr(), device.stream));
  return ty;
}

std::tuple<Tensor, Tensor> general_quantize_dynamic(const Tensor& x, const MaybeTensor& state, const MaybeTensor& nu,
                                                    const MaybeTensor& a, const MaybeTensor& outer_, int64_t qmin,
                                                    int64_t qmax, int64_t axis, int64_t group, double eps,
                                                    int64_t rules, std::optional<ScalarType> dtype) {
  constexpr auto op = "general_quantize_dynamic";
  const OnDevice device(x);
  check_layout(op, x, axis, group);
  Tensor scale = empty_dense(x, scale_sizes(x, axis, group), compute_type(x.scalar_type()));
  const GeneralCall call(op, x, scale, {}, state, nu, a, {}, qmin, qmax, axis, group, eps, rules, 1.0);
  const MaybeTensor outer = call.parameter("outer", outer_, 1);
  const ScalarType result = dtype.value_or(x.scalar_type());
  const Pair pair = pair_of(op, x.scalar_type(), result);
  Tensor y = empty_like(call.x, result, group > 0);
  Tensor workspace = call.bytes(general_quantize_scale_workspace(pair, call.geometry));
  check_launch(op,
               launch_general_quantize_scale(pair, call.geometry, call.quantizer, data(outer), call.x.const_data_ptr(),
                                             scale.mutable_data_ptr(), workspace.mutable_data_ptr(), device.stream));
  check_launch(op, launch_general_quantize(pair, call.geometry, call.quantizer, call.x.const_data_ptr(),
                                           y.mutable_data_ptr(), device.stream));
  return {y, scale};
}

}  // namespace
}  // namespace fastflat::cuda

STABLE_TORCH_LIBRARY_IMPL(fastflat, CUDA, m) {
  m.impl("general_quantize", TORCH_BOX(&fastflat::cuda::general_quantize));
  m.impl("general_quantize_bwd", TORCH_BOX(&fastflat::cuda::general_quantize_bwd));
  m.impl("general_quantize_jvp", TORCH_BOX(&fastflat::cuda::general_quantize_jvp));
  m.impl("general_quantize_dynamic", TORCH_BOX(&fastflat::cuda::general_quantize_dynamic));
}

// SPDX-License-Identifier: Apache-2.0
// Glue of the mixquant family: layouts, allocation, device and stream. The kernels are in mixquant.cu.
#include "cuda/mixquant.h"

#include "core/checks.h"
#include "core/storage.h"
#include "cuda/device.h"
#include "math/mixquant.h"

namespace fastflat::cuda {
namespace {

// x as the kernels want it and the candidates, contiguous and checked; the copies live as long as this does.
struct MixedCall {
  const char* op;
  Tensor x;
  Geometry geometry;
  Mixture mixture{};
  std::vector<Tensor> held;

  MixedCall(const char* op_, const Tensor& x_, const Tensor& scale, const Tensor& qmin, const Tensor& qmax,
            const Tensor& weight, int64_t axis, int64_t group, double eps, int64_t rules)
      : op(op_), x(prepare(op_, x_, axis, group)), geometry(geometry_of(x, axis, group)) {
    const int64_t n = weight.numel();
    STD_TORCH_CHECK(n >= 1 && n <= most_candidates, "fastflat::", op, ": weight must name from 1 to ", most_candidates,
                    " candidates, got ", n);
    mixture.count = static_cast<int>(n);
    mixture.eps = eps;
    mixture.rules = rules;
    mixture.scale = of_scales("scale", scale);
    mixture.qmin = of_candidates("qmin", qmin);
    mixture.qmax = of_candidates("qmax", qmax);
    mixture.weight = of_candidates("weight", weight);
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

  const void* of_scales(const char* name, const Tensor& t) {
    return parameter(name, t, mixture.count * geometry.channels);
  }
  const void* of_candidates(const char* name, const Tensor& t) { return parameter(name, t, mixture.count); }

  const void* parameter(const char* name, const Tensor& t, int64_t values) {
    check_parameter(op, name, t, x, values);
    held.push_back(dense(t, true));
    return held.back().const_data_ptr();
  }
};

Tensor mixquant(const Tensor& x, const Tensor& scale, const Tensor& qmin, const Tensor& qmax, const Tensor& weight,
                int64_t axis, int64_t group, double eps, int64_t rules, std::optional<ScalarType> dtype) {
  constexpr auto op = "mixquant";
  const OnDevice device(x);
  const MixedCall call(op, x, scale, qmin, qmax, weight, axis, group, eps, rules);
  const ScalarType result = dtype.value_or(x.scalar_type());
  const Pair pair = pair_of(op, x.scalar_type(), result);
  Tensor y = empty_like(call.x, result, group > 0);
  check_launch(op, launch_mixquant(pair, call.geometry, call.mixture, call.x.const_data_ptr(), y.mutable_data_ptr(),
                                   device.stream));
  return y;
}

std::tuple<Tensor, Tensor, Tensor> mixquant_bwd(const Tensor& gy_, const Tensor& x, const Tensor& scale,
                                                const Tensor& qmin, const Tensor& qmax, const Tensor& weight,
                                                const Tensor& factor, int64_t axis, int64_t group, double eps,
                                                int64_t rules) {
  constexpr auto op = "mixquant_bwd";
  const OnDevice device(x);
  MixedCall call(op, x, scale, qmin, qmax, weight, axis, group, eps, rules);
  call.mixture.factor = call.of_candidates("factor", factor);
  const Tensor gy = call.along("gy", gy_);
  const Pair pair = pair_of(op, x.scalar_type(), gy.scalar_type());
  Tensor gx = empty_like(call.x, x.scalar_type(), group > 0);
  Tensor gs = empty_like(scale, scale.scalar_type(), true), gw = empty_like(weight, weight.scalar_type(), true);
  Tensor workspace =
      empty_dense(x, {mixquant_bwd_workspace(pair, call.geometry, call.mixture.count)}, ScalarType::Byte);
  check_launch(op, launch_mixquant_bwd(pair, call.geometry, call.mixture, gy.const_data_ptr(), call.x.const_data_ptr(),
                                       gx.mutable_data_ptr(), gs.mutable_data_ptr(), gw.mutable_data_ptr(),
                                       workspace.mutable_data_ptr(), device.stream));
  return {gx, gs, gw};
}

Tensor mixquant_jvp(const std::optional<Tensor>& tx_, const std::optional<Tensor>& ts, const std::optional<Tensor>& tw,
                    const Tensor& x, const Tensor& scale, const Tensor& qmin, const Tensor& qmax, const Tensor& weight,
                    const Tensor& factor, int64_t axis, int64_t group, double eps, int64_t rules,
                    std::optional<ScalarType> dtype) {
  constexpr auto op = "mixquant_jvp";
  const OnDevice device(x);
  MixedCall call(op, x, scale, qmin, qmax, weight, axis, group, eps, rules);
  call.mixture.factor = call.of_candidates("factor", factor);
  const ScalarType result = dtype.value_or(x.scalar_type());
  const Pair pair = pair_of(op, x.scalar_type(), result);
  const auto tx = tx_ ? std::optional(call.along("tx", *tx_)) : std::nullopt;
  const bool of_result = tx && tx->scalar_type() != x.scalar_type();
  STD_TORCH_CHECK(!of_result || tx->scalar_type() == result, "fastflat::", op,
                  ": tx must have the dtype of x or of the result");
  const void* of_scale = ts ? call.of_scales("ts", *ts) : nullptr;
  const void* of_weight = tw ? call.of_candidates("tw", *tw) : nullptr;
  Tensor ty = empty_like(call.x, result, group > 0);
  check_launch(op,
               launch_mixquant_jvp(pair, of_result, call.geometry, call.mixture, tx ? tx->const_data_ptr() : nullptr,
                                   of_scale, of_weight, call.x.const_data_ptr(), ty.mutable_data_ptr(), device.stream));
  return ty;
}

}  // namespace
}  // namespace fastflat::cuda

STABLE_TORCH_LIBRARY_IMPL(fastflat, CUDA, m) {
  m.impl("mixquant", TORCH_BOX(&fastflat::cuda::mixquant));
  m.impl("mixquant_bwd", TORCH_BOX(&fastflat::cuda::mixquant_bwd));
  m.impl("mixquant_jvp", TORCH_BOX(&fastflat::cuda::mixquant_jvp));
}

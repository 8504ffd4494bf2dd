// SPDX-License-Identifier: Apache-2.0
// Glue of the liq family: layouts, allocation, device and stream. The kernels are in liq.cu.
#include "cuda/liq.h"

#include "core/storage.h"
#include "cuda/scaled.h"

namespace fastflat::cuda {
namespace {

using MaybeTensor = std::optional<Tensor>;

// What the ops on given moments share: x is w.
struct LiqCall : Scaled {
  MaybeTensor mean, std, clip;
  LiqPoint point;

  LiqCall(const char* op_, const Tensor& w, const Tensor& mean_, const Tensor& std_, const Tensor& clip_,
          int64_t levels, int64_t axis, double eps)
      : Scaled(op_, w, {}, {}, axis, 0) {
    mean = parameter("mean", mean_, geometry.channels);
    std = parameter("std", std_, geometry.channels);
    clip = parameter("clip", clip_, 1);
    point = {data(mean), data(std), data(clip), levels, eps};
  }
};

std::tuple<Tensor, Tensor> liq_moments(const Tensor& w, int64_t axis) {
  constexpr auto op = "liq_moments";
  const OnDevice device(w);
  const Scaled call(op, w, {}, {}, axis, 0);
  const Pair pair = pair_of(op, w.scalar_type(), w.scalar_type());
  const auto shape = scale_sizes(w, axis, 0);
  Tensor mean = empty_dense(w, shape, compute_type(w.scalar_type()));
  Tensor std = empty_dense(w, shape, compute_type(w.scalar_type()));
  Tensor workspace = call.bytes(liq_moments_workspace(pair, call.geometry));
  check_launch(op, launch_liq_moments(pair, call.geometry, call.x.const_data_ptr(), mean.mutable_data_ptr(),
                                      std.mutable_data_ptr(), workspace.mutable_data_ptr(), device.stream));
  return {mean, std};
}

Tensor liq(const Tensor& w, const Tensor& mean, const Tensor& std, const Tensor& clip, int64_t levels, int64_t axis,
           double eps, std::optional<ScalarType> dtype) {
  constexpr auto op = "liq";
  const OnDevice device(w);
  const LiqCall call(op, w, mean, std, clip, levels, axis, eps);
  const ScalarType result = dtype.value_or(w.scalar_type());
  const Pair pair = pair_of(op, w.scalar_type(), result);
  Tensor y = empty_like(call.x, result);
  check_launch(
      op, launch_liq(pair, call.geometry, call.point, call.x.const_data_ptr(), y.mutable_data_ptr(), device.stream));
  return y;
}

std::tuple<Tensor, Tensor> liq_bwd(const Tensor& gy_, const Tensor& w, const Tensor& mean, const Tensor& std,
                                   const Tensor& clip, int64_t levels, int64_t axis, double eps) {
  constexpr auto op = "liq_bwd";
  const OnDevice device(w);
  const LiqCall call(op, w, mean, std, clip, levels, axis, eps);
  const Tensor gy = call.along("gy", gy_);
  const Pair pair = pair_of(op, w.scalar_type(), gy.scalar_type());
  Tensor gw = empty_like(call.x, w.scalar_type());
  Tensor gclip = empty_dense(clip, {}, clip.scalar_type());
  Tensor workspace = call.bytes(liq_bwd_workspace(pair, call.geometry));
  check_launch(
      op, launch_liq_bwd(pair, call.geometry, call.point, gy.const_data_ptr(), call.x.const_data_ptr(),
                         gw.mutable_data_ptr(), gclip.mutable_data_ptr(), workspace.mutable_data_ptr(), device.stream));
  return {gw, gclip};
}

Tensor liq_jvp(const MaybeTensor& tw_, const MaybeTensor& tclip_, const Tensor& w, const Tensor& mean,
               const Tensor& std, const Tensor& clip, int64_t levels, int64_t axis, double eps,
               std::optional<ScalarType> dtype) {
  constexpr auto op = "liq_jvp";
  const OnDevice device(w);
  const LiqCall call(op, w, mean, std, clip, levels, axis, eps);
  const ScalarType result = dtype.value_or(w.scalar_type());
  const Pair pair = pair_of(op, w.scalar_type(), result);
  const MaybeTensor tw = tw_ ? MaybeTensor(call.along("tw", *tw_)) : std::nullopt;
  STD_TORCH_CHECK(!tw || tw->scalar_type() == w.scalar_type(), "fastflat::", op, ": tw must have the dtype of w");
  const MaybeTensor tclip = call.parameter("tclip", tclip_, 1);
  Tensor ty = empty_like(call.x, result);
  check_launch(op, launch_liq_jvp(pair, call.geometry, call.point, data(tw), data(tclip), call.x.const_data_ptr(),
                                  ty.mutable_data_ptr(), device.stream));
  return ty;
}

}  // namespace
}  // namespace fastflat::cuda

STABLE_TORCH_LIBRARY_IMPL(fastflat, CUDA, m) {
  m.impl("liq_moments", TORCH_BOX(&fastflat::cuda::liq_moments));
  m.impl("liq", TORCH_BOX(&fastflat::cuda::liq));
  m.impl("liq_bwd", TORCH_BOX(&fastflat::cuda::liq_bwd));
  m.impl("liq_jvp", TORCH_BOX(&fastflat::cuda::liq_jvp));
}

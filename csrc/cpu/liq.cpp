// SPDX-License-Identifier: Apache-2.0
// Glue of the liq family: layouts, allocation, threads. The loops are in liq_loops.cpp.
#include "cpu/liq.h"

#include <cmath>
#include <functional>

#include "core/checks.h"
#include "core/storage.h"
#include "core/tensor.h"
#include "cpu/threads.h"

namespace fastflat::cpu {
namespace {

// A call on dense tensors, checked; the copies live as long as this does.
struct Point {
  Tensor w, mean, std, clip;
  LiqCall call{};

  Point(const char* op, const Tensor& w_, const Tensor& mean_, const Tensor& std_, const Tensor& clip_, int64_t levels,
        int64_t axis, double eps)
      : w(dense(w_, false)), mean(dense(mean_, true)), std(dense(std_, true)), clip(clip_) {
    call.geometry = geometry_of(w, axis, 0);
    check_parameter(op, "mean", mean, w, call.geometry.channels);
    check_parameter(op, "std", std, w, call.geometry.channels);
    check_parameter(op, "clip", clip, w, 1);
    call.levels = levels;
    call.eps = eps;
    call.w = w.const_data_ptr();
    call.mean = mean.const_data_ptr();
    call.std = std.const_data_ptr();
    call.clip = clip.const_data_ptr();
  }
};

template <class C>
void store_all(const std::vector<double>& from, Tensor& to) {
  C* out = static_cast<C*>(to.mutable_data_ptr());
  for (size_t c = 0; c < from.size(); ++c) out[c] = static_cast<C>(from[c]);
}

void store_all(const std::vector<double>& from, Tensor& to) {
  to.scalar_type() == ScalarType::Double ? store_all<double>(from, to) : store_all<float>(from, to);
}

std::tuple<Tensor, Tensor> liq_moments(const Tensor& w_, int64_t axis) {
  constexpr auto op = "liq_moments";
  check_layout(op, w_, axis, 0);
  const Tensor w = dense(w_, false);
  const Storage storage = storage_of(op, "w", w.scalar_type());
  LiqCall call{};
  call.geometry = geometry_of(w, axis, 0);
  call.w = w.const_data_ptr();
  const LiqLoops& loops = liq_loops();
  const int64_t count = call.geometry.outer * call.geometry.inner;
  const auto sums = [&] {
    std::vector<double> s(call.geometry.channels, 0.0);
    reduce(loops.moment_channels[storage], loops.moment_range[storage], call, 1, s.data(), std::plus<double>());
    return s;
  };
  std::vector<double> mean = sums();
  for (double& m : mean) m /= static_cast<double>(std::max<int64_t>(count, 1));
  call.about = mean.data();
  std::vector<double> deviation = sums();
  for (double& d : deviation) d = std::sqrt(d / static_cast<double>(std::max<int64_t>(count - 1, 1)));
  const ScalarType compute = compute_type(w.scalar_type());
  Tensor means = empty_dense(w, scale_sizes(w, axis, 0), compute);
  Tensor stds = empty_dense(w, scale_sizes(w, axis, 0), compute);
  store_all(mean, means);
  store_all(deviation, stds);
  return {means, stds};
}

Tensor liq(const Tensor& w, const Tensor& mean, const Tensor& std, const Tensor& clip, int64_t levels, int64_t axis,
           double eps, std::optional<ScalarType> dtype) {
  constexpr auto op = "liq";
  check_layout(op, w, axis, 0);
  Point point(op, w, mean, std, clip, levels, axis, eps);
  const ScalarType result = dtype.value_or(w.scalar_type());
  const Pair pair = pair_of(op, w.scalar_type(), result);
  Tensor y = empty_like(point.w, result);
  point.call.out = y.mutable_data_ptr();
  map(liq_loops().forward[pair], point.call);
  return y;
}

std::tuple<Tensor, Tensor> liq_bwd(const Tensor& gy_, const Tensor& w, const Tensor& mean, const Tensor& std,
                                   const Tensor& clip, int64_t levels, int64_t axis, double eps) {
  constexpr auto op = "liq_bwd";
  check_layout(op, w, axis, 0);
  check_same_shape(op, "gy", gy_, w);
  Point point(op, w, mean, std, clip, levels, axis, eps);
  const Tensor gy = in_layout_of(gy_, point.w);
  const Pair pair = pair_of(op, w.scalar_type(), gy.scalar_type());
  Tensor gw = empty_like(point.w, w.scalar_type());
  Tensor gclip = empty_dense(clip, {}, clip.scalar_type());
  point.call.in = gy.const_data_ptr();
  point.call.out = gw.mutable_data_ptr();
  std::vector<double> sums(point.call.geometry.channels, 0.0);
  reduce(liq_loops().backward_channels[pair], liq_loops().backward_range[pair], point.call, 1, sums.data(),
         std::plus<double>());
  double total = 0.0;
  for (const double s : sums) total += s;
  store_all({total}, gclip);
  return {gw, gclip};
}

Tensor liq_jvp(const std::optional<Tensor>& tw_, const std::optional<Tensor>& tclip, const Tensor& w,
               const Tensor& mean, const Tensor& std, const Tensor& clip, int64_t levels, int64_t axis, double eps,
               std::optional<ScalarType> dtype) {
  constexpr auto op = "liq_jvp";
  check_layout(op, w, axis, 0);
  Point point(op, w, mean, std, clip, levels, axis, eps);
  const ScalarType result = dtype.value_or(w.scalar_type());
  const Pair pair = pair_of(op, w.scalar_type(), result);
  std::optional<Tensor> tw;
  if (tw_) {
    check_same_shape(op, "tw", *tw_, w);
    STD_TORCH_CHECK(tw_->scalar_type() == w.scalar_type(), "fastflat::", op, ": tw must have the dtype of w");
    tw = in_layout_of(*tw_, point.w);
  }
  if (tclip) check_parameter(op, "tclip", *tclip, w, 1);
  point.call.in = data(tw);
  point.call.tclip = data(tclip);
  Tensor ty = empty_like(point.w, result);
  point.call.out = ty.mutable_data_ptr();
  map(liq_loops().tangent[pair], point.call);
  return ty;
}

}  // namespace
}  // namespace fastflat::cpu

STABLE_TORCH_LIBRARY_IMPL(fastflat, CPU, m) {
  m.impl("liq_moments", TORCH_BOX(&fastflat::cpu::liq_moments));
  m.impl("liq", TORCH_BOX(&fastflat::cpu::liq));
  m.impl("liq_bwd", TORCH_BOX(&fastflat::cpu::liq_bwd));
  m.impl("liq_jvp", TORCH_BOX(&fastflat::cpu::liq_jvp));
}

// SPDX-License-Identifier: Apache-2.0
// Lists of tensors in one call: one device guard and one stream, the launches of fake_quantize for each tensor.
#include "cuda/fake_quantize.h"

#include "core/storage.h"
#include "cuda/scaled.h"

namespace fastflat::cuda {
namespace {

using Tensors = std::vector<Tensor>;
using MaybeTensors = std::vector<std::optional<Tensor>>;
using Integers = std::vector<int64_t>;
using Numbers = std::vector<double>;

// The lists of a call, of one length.
struct Lists {
  const char* op;
  const Tensors &xs, &scales;
  const MaybeTensors& zero_points;
  const Integers &qmin, &qmax, &axis, &group;
  const Numbers& eps;
  const Integers& rules;

  void check() const {
    const size_t n = xs.size();
    const bool same = scales.size() == n && (zero_points.empty() || zero_points.size() == n) && qmin.size() == n &&
                      qmax.size() == n && axis.size() == n && group.size() == n && eps.size() == n && rules.size() == n;
    STD_TORCH_CHECK(same, "fastflat::", op, ": all lists must be as long as xs, ", n, "; zero_points may be empty");
    for (const Tensor& x : xs) {
      STD_TORCH_CHECK(x.device() == xs[0].device(), "fastflat::", op, ": xs must be on one device");
    }
  }

  Scaled data_of(size_t i) const {
    return {op, xs[i], scales[i], zero_points.empty() ? std::nullopt : zero_points[i], axis[i], group[i]};
  }

  Quantizer quantizer_of(const Scaled& x, size_t i, double factor) const {
    return {data(x.scale), data(x.zero_point), qmin[i], qmax[i], eps[i], factor, rules[i]};
  }
};

Tensors fake_quantize_list(const Tensors& xs, const Tensors& scales, const MaybeTensors& zero_points,
                           const Integers& qmin, const Integers& qmax, const Integers& axis, const Integers& group,
                           const Numbers& eps, const Integers& rules, std::optional<ScalarType> dtype) {
  constexpr auto op = "fake_quantize_list";
  const Lists lists{op, xs, scales, zero_points, qmin, qmax, axis, group, eps, rules};
  lists.check();
  Tensors ys;
  if (xs.empty()) return ys;
  const OnDevice device(xs[0]);
  ys.reserve(xs.size());
  for (size_t i = 0; i < xs.size(); ++i) {
    const Scaled x = lists.data_of(i);
    const ScalarType result = dtype.value_or(xs[i].scalar_type());
    const Pair pair = pair_of(op, xs[i].scalar_type(), result);
    ys.push_back(empty_like(x.x, result, group[i] > 0));
    check_launch(op, launch_fake_quantize(pair, x.geometry, lists.quantizer_of(x, i, 1.0), x.x.const_data_ptr(),
                                          ys[i].mutable_data_ptr(), device.stream));
  }
  return ys;
}

std::tuple<Tensors, Tensors, Tensors> fake_quantize_list_bwd(const Tensors& gys, const Tensors& xs,
                                                             const Tensors& scales, const MaybeTensors& zero_points,
                                                             const Integers& qmin, const Integers& qmax,
                                                             const Integers& axis, const Integers& group,
                                                             const Numbers& eps, const Integers& rules,
                                                             const Numbers& factor, const Integers& need_scale) {
  constexpr auto op = "fake_quantize_list_bwd";
  const Lists lists{op, xs, scales, zero_points, qmin, qmax, axis, group, eps, rules};
  lists.check();
  const size_t count = xs.size();
  STD_TORCH_CHECK(gys.size() == count && factor.size() == count && need_scale.size() == count, "fastflat::", op,
                  ": gys, factor and need_scale must be as long as xs, ", count);
  Tensors gxs, gss, gzs;
  if (xs.empty()) return {gxs, gss, gzs};
  bool any_scale = false, any_zero = false;
  for (size_t i = 0; i < count; ++i) {
    any_scale |= need_scale[i] != 0;
    any_zero |= need_scale[i] && !zero_points.empty() && zero_points[i];
  }
  const OnDevice device(xs[0]);
  const std::vector<int64_t> none{0};
  for (size_t i = 0; i < count; ++i) {
    const Scaled x = lists.data_of(i);
    const Tensor gy = x.along("gy", gys[i]);
    const Pair pair = pair_of(op, xs[i].scalar_type(), gy.scalar_type());
    const Quantizer quantizer = lists.quantizer_of(x, i, factor[i]);
    const void* from = x.x.const_data_ptr();
    gxs.push_back(empty_like(x.x, xs[i].scalar_type(), group[i] > 0));
    void* to = gxs[i].mutable_data_ptr();
    const std::vector<int64_t> all(scales[i].sizes().begin(), scales[i].sizes().end());
    const bool need_zero = need_scale[i] && x.zero_point;
    if (any_scale) gss.push_back(empty_dense(scales[i], need_scale[i] ? all : none, scales[i].scalar_type()));
    if (any_zero) gzs.push_back(empty_dense(scales[i], need_zero ? all : none, scales[i].scalar_type()));
    if (!need_scale[i]) {
      check_launch(op,
                   launch_fake_quantize_ste(pair, x.geometry, quantizer, gy.const_data_ptr(), from, to, device.stream));
      continue;
    }
    Tensor workspace = x.bytes(fake_quantize_bwd_workspace(pair, x.geometry));
    check_launch(op, launch_fake_quantize_bwd(
                         pair, x.geometry, quantizer, gy.const_data_ptr(), from, to, gss[i].mutable_data_ptr(),
                         need_zero ? gzs[i].mutable_data_ptr() : nullptr, workspace.mutable_data_ptr(), device.stream));
  }
  return {gxs, gss, gzs};
}

}  // namespace
}  // namespace fastflat::cuda

STABLE_TORCH_LIBRARY_IMPL(fastflat, CUDA, m) {
  m.impl("fake_quantize_list", TORCH_BOX(&fastflat::cuda::fake_quantize_list));
  m.impl("fake_quantize_list_bwd", TORCH_BOX(&fastflat::cuda::fake_quantize_list_bwd));
}

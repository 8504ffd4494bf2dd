// SPDX-License-Identifier: Apache-2.0
// Glue of the binarize family: layouts, allocation, threads. The loops are in binarize_loops.cpp.
#include "cpu/binarize.h"

#include <functional>

#include "core/checks.h"
#include "core/expand.h"
#include "core/storage.h"
#include "core/tensor.h"
#include "cpu/threads.h"
#include "math/binarize.h"

namespace fastflat::cpu {
namespace {

using Reduce = BinarizeLoops::Reduce;

BinarizeCall describe(const Tensor& x, double clip, int64_t axis, int64_t group) {
  BinarizeCall call{};
  call.geometry = geometry_of(x, axis, group);
  call.clip = clip;
  call.x = x.const_data_ptr();
  return call;
}

// The importance, an element for each of x in its layout.
std::optional<Tensor> importance(const char* op, const std::optional<Tensor>& h, const Tensor& x, BinarizeCall& call) {
  if (!h) return h;
  const Tensor full = expanded(op, "h", *h, x);
  call.h = full.const_data_ptr();
  return full;
}

// For each channel the op's sum on wish, plus a cotangent of alpha, over sum h.
template <class C>
void divide(const BinarizeCall& call, const std::vector<double>& sums, bool with_sum, const void* more, void* result) {
  const Geometry& g = call.geometry;
  const double count = static_cast<double>(g.outer) * static_cast<double>(g.inner);
  for (int64_t c = 0; c < g.channels; ++c) {
    const double extra = more ? static_cast<double>(static_cast<const C*>(more)[c]) : 0.0;
    const double total = call.h ? sums[2 * c + 1] : count;
    static_cast<C*>(result)[c] = Binarize<C>::quotient((with_sum ? sums[2 * c] : 0.0) + extra, total);
  }
}

// A tensor with a value a channel: quotients of the sums that the loops form.
Tensor quotients(const BinarizeCall& call, Reduce channels, Reduce range, const std::vector<int64_t>& sizes,
                 const Tensor& x, bool with_sum, const void* more) {
  std::vector<double> sums(2 * call.geometry.channels, 0.0);
  if (with_sum || call.h) reduce(channels, range, call, 2, sums.data(), std::plus<double>());
  const ScalarType compute = compute_type(x.scalar_type());
  Tensor result = empty_dense(x, sizes, compute);
  if (compute == ScalarType::Double) {
    divide<double>(call, sums, with_sum, more, result.mutable_data_ptr());
  } else {
    divide<float>(call, sums, with_sum, more, result.mutable_data_ptr());
  }
  return result;
}

std::tuple<Tensor, Tensor> binarize(const Tensor& x_, const std::optional<Tensor>& h_, int64_t axis, int64_t group,
                                    std::optional<ScalarType> dtype) {
  constexpr auto op = "binarize";
  check_layout(op, x_, axis, group);
  const Tensor x = dense(x_, group > 0);
  BinarizeCall call = describe(x, 0, axis, group);
  const auto h = importance(op, h_, x, call);
  const ScalarType result = dtype.value_or(x.scalar_type());
  const Pair pair = pair_of(op, x.scalar_type(), result);
  const Storage storage = storage_of(op, "x", x.scalar_type());
  const BinarizeLoops& loops = binarize_loops();
  const Tensor alpha = quotients(call, loops.magnitude_channels[storage], loops.magnitude_range[storage],
                                 scale_sizes(x, axis, group), x, true, nullptr);
  Tensor y = empty_like(x, result, group > 0);
  call.alpha = alpha.const_data_ptr();
  call.out = y.mutable_data_ptr();
  map(loops.forward[pair], call);
  return {y, alpha};
}

Tensor binarize_bwd(const Tensor& gy_, const std::optional<Tensor>& ga_, const Tensor& x_,
                    const std::optional<Tensor>& h_, const Tensor& alpha_, double clip, bool through_alpha,
                    int64_t axis, int64_t group) {
  constexpr auto op = "binarize_bwd";
  check_layout(op, x_, axis, group);
  check_same_shape(op, "gy", gy_, x_);
  const Tensor x = dense(x_, group > 0);
  const Tensor gy = in_layout_of(gy_, x), alpha = dense(alpha_, true);
  BinarizeCall call = describe(x, clip, axis, group);
  check_parameter(op, "alpha", alpha, x, call.geometry.channels);
  const Pair pair = pair_of(op, x.scalar_type(), gy.scalar_type());
  call.alpha = alpha.const_data_ptr();
  call.in = gy.const_data_ptr();
  const BinarizeLoops& loops = binarize_loops();
  std::optional<Tensor> h, ga, k;
  if (ga_) {
    ga = dense(*ga_, true);
    check_parameter(op, "ga", *ga, x, call.geometry.channels);
  }
  if (through_alpha || ga) {
    h = importance(op, h_, x, call);
    k = quotients(call, loops.backward_channels[pair], loops.backward_range[pair], scale_sizes(x, axis, group), x,
                  through_alpha, data(ga));
  }
  call.k = data(k);
  Tensor gx = empty_like(x, x.scalar_type(), group > 0);
  call.out = gx.mutable_data_ptr();
  map(loops.backward[pair], call);
  return gx;
}

std::tuple<Tensor, Tensor> binarize_jvp(const Tensor& tx_, const Tensor& x_, const std::optional<Tensor>& h_,
                                        const Tensor& alpha_, double clip, bool through_alpha, int64_t axis,
                                        int64_t group, std::optional<ScalarType> dtype) {
  constexpr auto op = "binarize_jvp";
  check_layout(op, x_, axis, group);
  check_same_shape(op, "tx", tx_, x_);
  STD_TORCH_CHECK(tx_.scalar_type() == x_.scalar_type(), "fastflat::", op, ": tx must have the dtype of x");
  const Tensor x = dense(x_, group > 0);
  const Tensor tx = in_layout_of(tx_, x), alpha = dense(alpha_, true);
  BinarizeCall call = describe(x, clip, axis, group);
  check_parameter(op, "alpha", alpha, x, call.geometry.channels);
  const auto h = importance(op, h_, x, call);
  const ScalarType result = dtype.value_or(x.scalar_type());
  const Pair pair = pair_of(op, x.scalar_type(), result);
  const Storage storage = storage_of(op, "x", x.scalar_type());
  call.alpha = alpha.const_data_ptr();
  call.in = tx.const_data_ptr();
  const BinarizeLoops& loops = binarize_loops();
  const Tensor ta = quotients(call, loops.tangent_channels[storage], loops.tangent_range[storage],
                              scale_sizes(x, axis, group), x, true, nullptr);
  if (through_alpha) call.k = ta.const_data_ptr();
  Tensor ty = empty_like(x, result, group > 0);
  call.out = ty.mutable_data_ptr();
  map(loops.tangent[pair], call);
  return {ty, ta};
}

}  // namespace
}  // namespace fastflat::cpu

STABLE_TORCH_LIBRARY_IMPL(fastflat, CPU, m) {
  m.impl("binarize", TORCH_BOX(&fastflat::cpu::binarize));
  m.impl("binarize_bwd", TORCH_BOX(&fastflat::cpu::binarize_bwd));
  m.impl("binarize_jvp", TORCH_BOX(&fastflat::cpu::binarize_jvp));
}

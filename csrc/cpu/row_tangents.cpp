// SPDX-License-Identifier: Apache-2.0
// Tangents of layer norm, RMS norm, softmax and cross-entropy.
#include "cpu/row_tangents.h"

#include <cstring>
#include <memory>

#include "core/row_tangents_checks.h"

namespace fastflat::cpu {
namespace {

// Elements that make a thread worth waking.
constexpr int64_t grain = 32768;
// Parts that a call is cut into at least, where it is large: by its tangents if it has few rows.
constexpr int64_t least_parts = 16;

const void* data(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

RowTangentsCall call_of(const RowTangents& sizes, bool option, const Tensor& normal) {
  RowTangentsCall call{sizes.K, sizes.R, sizes.D, sizes.storage, option};
  call.normal = normal.const_data_ptr();
  return call;
}

// Threads share out tiles of rows. Every sum lies within one part, whatever the parts are.
void run(const RowTangentsCall& call, RowTangentsLoops::Loop RowTangentsLoops::* which) {
  const auto loop = (call.storage == f64 ? row_tangents_double : row_tangents_float()).*which;
  const int64_t bytes = call.scratch() * (call.storage == f64 ? 8 : 4);
  const auto work = [&](const RowTangentsPart& part) {
    const std::unique_ptr<char[]> scratch(new char[bytes + 64]);
    loop(call, part, scratch.get() + (-reinterpret_cast<intptr_t>(scratch.get()) & 63));
  };
  const int64_t all = call.K * call.R * call.D;
  if (all == 0) return;
  if (all <= grain) return work({0, call.K, 0, call.R});
  const int64_t rows = rows_at_once(call.D), tiles = (call.R + rows - 1) / rows;
  const int64_t groups = tiles >= least_parts ? 1 : std::min(call.K, least_parts / tiles);
  const int64_t share = (call.K + groups - 1) / groups;
  const int64_t parts_of_grain = std::max<int64_t>(1, grain / (share * rows * call.D));
  torch::stable::parallel_for(0, tiles * groups, parts_of_grain, [&](int64_t begin, int64_t end) {
    if (groups == 1) return work({0, call.K, begin * rows, std::min(call.R, end * rows)});
    for (int64_t i = begin; i < end; ++i) {
      const int64_t tile = i / groups, first = i % groups * share;
      if (first >= call.K) continue;
      work({first, std::min(call.K, first + share), tile * rows, std::min(call.R, (tile + 1) * rows)});
    }
  });
}

Tensor zeros(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  Tensor t = empty_dense(like, sizes, dtype);
  std::memset(t.mutable_data_ptr(), 0, t.numel() * (dtype == ScalarType::Double ? 8 : 4));
  return t;
}

std::tuple<Tensor, Tensor, Tensor> row_tangents_norm(const OptionalTensor& x, const Tensor& normal, const Tensor& inv,
                                                     const OptionalTensor& weight, const OptionalTensor& along_weight,
                                                     const OptionalTensor& along_bias, bool centered) {
  const auto sizes = check_norm("row_tangents_norm", x, normal, inv, weight, along_weight, along_bias);
  RowTangentsCall call = call_of(sizes, centered, normal);
  Tensor out = empty_dense(normal, {sizes.K, sizes.R, sizes.D}, sizes.own());
  Tensor mean = zeros(normal, {sizes.K, sizes.R}, sizes.compute());
  Tensor scale = zeros(normal, {sizes.K, sizes.R}, sizes.compute());
  call.x = data(x);
  call.of_row = inv.const_data_ptr();
  call.weight = data(weight);
  call.along_weight = data(along_weight);
  call.along_bias = data(along_bias);
  call.out = out.mutable_data_ptr();
  call.new_mean = mean.mutable_data_ptr();
  call.new_scale = scale.mutable_data_ptr();
  run(call, &RowTangentsLoops::norm);
  return {out, mean, scale};
}

Tensor row_tangents_norm_bwd(const OptionalTensor& g, const OptionalTensor& x, const OptionalTensor& mean,
                             const OptionalTensor& scale, const OptionalTensor& along_weight, const Tensor& normal,
                             const Tensor& grad, const Tensor& inv, const OptionalTensor& weight, bool centered) {
  const auto sizes =
      check_norm_bwd("row_tangents_norm_bwd", g, x, mean, scale, along_weight, normal, grad, inv, weight);
  RowTangentsCall call = call_of(sizes, centered, normal);
  Tensor out = empty_dense(normal, {sizes.K, sizes.R, sizes.D}, sizes.own());
  call.g = data(g);
  call.x = data(x);
  call.mean = data(mean);
  call.scale = data(scale);
  call.along_weight = data(along_weight);
  call.grad = grad.const_data_ptr();
  call.of_row = inv.const_data_ptr();
  call.weight = data(weight);
  call.out = out.mutable_data_ptr();
  run(call, &RowTangentsLoops::norm_bwd);
  return out;
}

Tensor row_tangents_softmax(const Tensor& t, const Tensor& p, const OptionalTensor& scale, bool log) {
  const auto sizes = check_softmax("row_tangents_softmax", t, p, scale);
  RowTangentsCall call = call_of(sizes, log, p);
  Tensor out = empty_dense(p, {sizes.K, sizes.R, sizes.D}, sizes.own());
  call.x = t.const_data_ptr();
  call.of_row = data(scale);
  call.out = out.mutable_data_ptr();
  run(call, &RowTangentsLoops::softmax);
  return out;
}

Tensor row_tangents_softmax_bwd(const OptionalTensor& g, const OptionalTensor& along, const Tensor& p,
                                const Tensor& grad) {
  const auto sizes = check_softmax_bwd("row_tangents_softmax_bwd", g, along, p, grad);
  RowTangentsCall call = call_of(sizes, false, p);
  Tensor out = empty_dense(p, {sizes.K, sizes.R, sizes.D}, sizes.own());
  call.g = data(g);
  call.x = data(along);
  call.grad = grad.const_data_ptr();
  call.out = out.mutable_data_ptr();
  run(call, &RowTangentsLoops::softmax_bwd);
  return out;
}

}  // namespace
}  // namespace fastflat::cpu

STABLE_TORCH_LIBRARY_IMPL(fastflat, CPU, m) {
  m.impl("row_tangents_norm", TORCH_BOX(&fastflat::cpu::row_tangents_norm));
  m.impl("row_tangents_norm_bwd", TORCH_BOX(&fastflat::cpu::row_tangents_norm_bwd));
  m.impl("row_tangents_softmax", TORCH_BOX(&fastflat::cpu::row_tangents_softmax));
  m.impl("row_tangents_softmax_bwd", TORCH_BOX(&fastflat::cpu::row_tangents_softmax_bwd));
}

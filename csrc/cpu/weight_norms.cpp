// SPDX-License-Identifier: Apache-2.0
// Moments and norms of weights, and the saturating nonlinearity.
#include "cpu/weight_norms.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "core/weight_norms_checks.h"

namespace fastflat::cpu {
namespace {

// Elements that make a thread worth waking; parts of a reduction, by the shape alone.
constexpr int64_t grain = 32768;
constexpr int64_t most_parts = 64;

const WeightNormsLoops& loops(Storage storage) { return storage == f64 ? weight_norms_double : weight_norms_float(); }

// Parts [begin, end) of `size` each.
template <class Work>
void share(int64_t parts, int64_t size, const Work& work) {
  const int64_t least = std::max<int64_t>(1, grain / std::max<int64_t>(size, 1));
  if (parts <= least) {
    if (parts) work(0, parts);
  } else {
    torch::stable::parallel_for(0, parts, least, work);
  }
}

void put(void* to, Storage storage, int64_t at, double value) {
  if (storage == f64) {
    static_cast<double*>(to)[at] = value;
  } else {
    static_cast<float*>(to)[at] = static_cast<float>(value);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> reduce(const Tensor& w) {
  Weights weights("weight_norms_reduce", w, true);
  WeightNormsCall& call = weights.call;
  const auto make = [&](const std::vector<int64_t>& sizes) { return empty_dense(weights.w, sizes, weights.compute()); };
  Tensor moments = make({3, call.rows}), row_l1 = make({call.rows}), col_l1 = make({call.columns}), absmax = make({2});
  call.moments = moments.mutable_data_ptr();
  call.row_l1 = row_l1.mutable_data_ptr();
  const int64_t of_part = std::max<int64_t>(1, (call.rows + most_parts - 1) / most_parts);
  const int64_t parts = (call.rows + of_part - 1) / of_part;
  std::vector<double> columns(parts * call.columns, 0.0);
  std::vector<WeightShare> shares(parts);
  share(parts, of_part * call.columns, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      shares[p].columns = columns.data() + p * call.columns;
      loops(call.storage).reduce(call, p * of_part, std::min(call.rows, (p + 1) * of_part), shares[p]);
    }
  });
  WeightShare all{};
  for (const WeightShare& s : shares) {
    if (s.most > all.most) all = {nullptr, s.most, 0.0};
    all.count += s.most == all.most ? s.count : 0.0;
  }
  for (int64_t c = 0; c < call.columns; ++c) {
    double sum = 0.0;
    for (int64_t p = 0; p < parts; ++p) sum += columns[p * call.columns + c];
    put(col_l1.mutable_data_ptr(), call.storage, c, sum);
  }
  put(absmax.mutable_data_ptr(), call.storage, 0, all.most);
  put(absmax.mutable_data_ptr(), call.storage, 1, all.count);
  return {moments, row_l1, col_l1, absmax};
}

Tensor reduce_bwd(const Tensor& g_moments, const Tensor& g_row, const Tensor& g_col, const Tensor& g_absmax,
                  const Tensor& w, const Tensor& moments, const Tensor& absmax) {
  Weights weights("weight_norms_reduce_bwd", w, true);
  WeightNormsCall& call = weights.call;
  const ScalarType compute = weights.compute();
  call.g_moments = weights.take("g_moments", g_moments, compute, 3 * call.rows);
  call.g_row = weights.take("g_row", g_row, compute, call.rows);
  call.g_col = weights.take("g_col", g_col, compute, call.columns);
  call.g_absmax = weights.take("g_absmax", g_absmax, compute, 1);
  call.moments = const_cast<void*>(weights.take("moments", moments, compute, 3 * call.rows));
  call.absmax = const_cast<void*>(weights.take("absmax", absmax, compute, 2));
  Tensor gw = weights.result();
  call.out = gw.mutable_data_ptr();
  share(call.rows, call.columns, [&](int64_t begin, int64_t end) { loops(call.storage).reduce_bwd(call, begin, end); });
  return gw;
}

Tensor saturate(const Tensor& w, const Tensor& alpha) {
  Weights weights("weight_norms_saturate", w, false);
  WeightNormsCall& call = weights.call;
  call.alpha = weights.take("alpha", alpha, weights.compute(), 1);
  Tensor y = weights.result();
  call.out = y.mutable_data_ptr();
  share(call.numel(), 1, [&](int64_t begin, int64_t end) { loops(call.storage).saturate(call, begin, end); });
  return y;
}

std::tuple<Tensor, Tensor> saturate_bwd(const Tensor& gy, const Tensor& w, const Tensor& alpha) {
  Weights weights("weight_norms_saturate_bwd", w, false);
  WeightNormsCall& call = weights.call;
  call.g = weights.take("gy", gy, w.scalar_type(), call.numel());
  call.alpha = weights.take("alpha", alpha, weights.compute(), 1);
  Tensor gw = weights.result(), galpha = empty_like(alpha, alpha.scalar_type(), true);
  call.out = gw.mutable_data_ptr();
  const int64_t parts = (call.numel() + grain - 1) / grain;
  std::vector<double> shares(parts, 0.0);
  share(parts, grain, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      shares[p] = loops(call.storage).saturate_bwd(call, p * grain, std::min(call.numel(), (p + 1) * grain));
    }
  });
  double sum = 0.0;
  for (const double s : shares) sum += s;
  put(galpha.mutable_data_ptr(), call.storage, 0, sum);
  return {gw, galpha};
}

}  // namespace
}  // namespace fastflat::cpu

STABLE_TORCH_LIBRARY_IMPL(fastflat, CPU, m) {
  m.impl("weight_norms_reduce", TORCH_BOX(&fastflat::cpu::reduce));
  m.impl("weight_norms_reduce_bwd", TORCH_BOX(&fastflat::cpu::reduce_bwd));
  m.impl("weight_norms_saturate", TORCH_BOX(&fastflat::cpu::saturate));
  m.impl("weight_norms_saturate_bwd", TORCH_BOX(&fastflat::cpu::saturate_bwd));
}

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

// Threads share out tiles of rows. Every sum lies within one part, whatever the parts are.
void run(const RowTangentsCall& call, RowTangentsLoops::Loop RowTangentsLoops::* which) {
  const auto loop = (call.storage == f64 ? row_tangents_double : row_tangents_float()).*which;
  const int64_t number = call.storage == f64 ? 8 : 4, bytes = scratch_of(call) * number;
  const int64_t all = call.K * call.R * call.D;
  if (call.new_mean && (!call.x || all == 0)) {
    std::memset(call.new_mean, 0, call.K * call.R * number);
    std::memset(call.new_scale, 0, call.K * call.R * number);
  }
  if (all == 0) return;
  const auto work = [&](const RowTangentsPart& part) {
    const std::unique_ptr<char[]> scratch(new char[bytes + 64]);
    loop(call, part, scratch.get() + (-reinterpret_cast<intptr_t>(scratch.get()) & 63));
  };
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

template <const RowTangentsOp& op, RowTangentsLoops::Loop RowTangentsLoops::* loop>
void boxed(StableIValue* stack, uint64_t arguments, uint64_t) {
  RowTangents rows(op, stack, arguments);
  rows.allocate();
  run(rows.call, loop);
  rows.leave(stack);
}

}  // namespace
}  // namespace fastflat::cpu

STABLE_TORCH_LIBRARY_IMPL(fastflat, CPU, m) {
  using namespace fastflat::cpu;
  namespace ops = fastflat::row_tangents_ops;
  m.impl("row_tangents_norm", &boxed<ops::norm, &RowTangentsLoops::norm>);
  m.impl("row_tangents_norm_bwd", &boxed<ops::norm_bwd, &RowTangentsLoops::norm_bwd>);
  m.impl("row_tangents_softmax", &boxed<ops::softmax, &RowTangentsLoops::softmax>);
  m.impl("row_tangents_softmax_bwd", &boxed<ops::softmax_bwd, &RowTangentsLoops::softmax_bwd>);
}

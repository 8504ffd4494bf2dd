// SPDX-License-Identifier: Apache-2.0
// Glue that the quantizer families share: threads over a call with a Geometry, and its scale tensors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "core/checks.h"
#include "core/tensor.h"
#include "cpu/fake_quantize.h"

namespace fastflat::cpu {

// Elements that make a thread worth waking.
inline constexpr int64_t grain = 32768;
// Tasks of a reduction over shared channels: a number that depends on the shape only, so that sums do too.
inline constexpr int64_t task_size = 65536;
inline constexpr int64_t most_tasks = 256;
inline constexpr int64_t most_sums = int64_t{1} << 20;

inline const void* data(const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }

template <class Call>
void map(void (*loop)(const Call&, int64_t begin, int64_t end), const Call& call) {
  const int64_t n = call.geometry.numel();
  if (n <= grain) {
    if (n > 0) loop(call, 0, n);
    return;
  }
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { loop(call, begin, end); });
}

// How a reduction is cut into pieces: by the shape alone, so that the order of every sum is too.
struct Cut {
  bool by_channel;  // pieces are channels (outer == 1); otherwise ranges of elements, each with numbers of all channels
  int64_t pieces;
  int64_t size;  // elements of a piece; the last range may be shorter

  explicit Cut(const Geometry& g) {
    by_channel = g.outer == 1 && (g.channels >= 64 || g.inner < short_run);
    if (by_channel) {
      pieces = g.channels;
      size = g.inner;
      return;
    }
    const int64_t n = g.numel();
    const int64_t unit = g.inner < short_run ? g.channels * g.inner : 1;
    const int64_t tasks = std::min({(n + task_size - 1) / task_size, most_tasks, most_sums / g.channels + 1});
    const int64_t units = n / unit;
    const int64_t per_task = (units + tasks - 1) / tasks;
    pieces = (units + per_task - 1) / per_task;
    size = per_task * unit;
  }
};

// One or two numbers a channel: threads share out the pieces, and numbers of ranges are combined in their order.
template <class Call, class Combine>
void reduce(void (*channels)(const Call&, int64_t begin, int64_t end, double* result),
            void (*range)(const Call&, int64_t begin, int64_t end, double* result), const Call& call, int64_t width,
            double* result, const Combine& combine) {
  const Geometry& g = call.geometry;
  const int64_t n = g.numel();
  if (n == 0) return;
  const Cut cut(g);
  const int64_t per_thread = std::max<int64_t>(1, grain / std::max<int64_t>(cut.size, 1));
  if (cut.by_channel) {
    torch::stable::parallel_for(0, cut.pieces, per_thread,
                                [&](int64_t begin, int64_t end) { channels(call, begin, end, result); });
    return;
  }
  if (cut.pieces == 1) return range(call, 0, n, result);
  const int64_t numbers = width * g.channels;
  std::vector<double> partial(cut.pieces * numbers, 0.0);
  torch::stable::parallel_for(0, cut.pieces, per_thread, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      range(call, t * cut.size, std::min(n, (t + 1) * cut.size), partial.data() + t * numbers);
    }
  });
  for (int64_t t = 0; t < cut.pieces; ++t) {
    for (int64_t i = 0; i < numbers; ++i) result[i] = combine(result[i], partial[t * numbers + i]);
  }
}

// Scale and zero-point, contiguous and checked; the copies live as long as this does.
struct ScaleTensors {
  Tensor scale;
  std::optional<Tensor> zero_point;

  template <class Call>
  ScaleTensors(const char* op, const Tensor& scale_, const std::optional<Tensor>& zero_point_, const Tensor& x,
               Call& call)
      : scale(dense(scale_, true)) {
    check_parameter(op, "scale", scale, x, call.geometry.channels);
    call.scale = scale.const_data_ptr();
    if (!zero_point_) return;
    zero_point = dense(*zero_point_, true);
    check_parameter(op, "zero_point", *zero_point, x, call.geometry.channels);
    call.zero_point = zero_point->const_data_ptr();
  }
};

// The tangents of a call: dense, checked, each of them optional.
struct Tangents {
  std::optional<Tensor> tx, ts, tz;
  bool of_result = false;  // tx has the type of the result, which is not that of x

  Tangents(const char* op, const std::optional<Tensor>& tx_, const std::optional<Tensor>& ts_,
           const std::optional<Tensor>& tz_, const Tensor& x, ScalarType result, int64_t scales) {
    if (tx_) {
      check_same_shape(op, "tx", *tx_, x);
      tx = in_layout_of(*tx_, x);
      of_result = tx->scalar_type() != x.scalar_type();
      STD_TORCH_CHECK(!of_result || tx->scalar_type() == result, "fastflat::", op,
                      ": tx must have the dtype of x or of the result");
    }
    if (ts_) {
      ts = dense(*ts_, true);
      check_parameter(op, "ts", *ts, x, scales);
    }
    if (tz_) {
      tz = dense(*tz_, true);
      check_parameter(op, "tz", *tz, x, scales);
    }
  }

  template <class Call>
  void point(Call& call) const {
    call.in = data(tx);
    call.ts = data(ts);
    call.tz = data(tz);
  }
};

}  // namespace fastflat::cpu

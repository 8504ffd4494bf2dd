// SPDX-License-Identifier: Apache-2.0
// Glue of the mixquant family: layouts, allocation, threads. The loops are in mixquant_loops.cpp.
#include "cpu/mixquant.h"

#include "core/checks.h"
#include "core/storage.h"
#include "core/tensor.h"
#include "cpu/threads.h"
#include "math/mixquant.h"

namespace fastflat::cpu {
namespace {

// A call with the tensors that describe its candidates, contiguous and checked; the copies live as long as this does.
struct Mixed {
  const char* op;
  Tensor x;
  MixquantCall call{};
  std::vector<Tensor> held;

  Mixed(const char* op_, const Tensor& x_, const Tensor& scale, const Tensor& qmin, const Tensor& qmax,
        const Tensor& weight, int64_t axis, int64_t group, double eps, int64_t rules)
      : op(op_), x(prepare(op_, x_, axis, group)) {
    const int64_t n = weight.numel();
    STD_TORCH_CHECK(n >= 1 && n <= most_candidates, "fastflat::", op, ": weight must name from 1 to ", most_candidates,
                    " candidates, got ", n);
    call.geometry = geometry_of(x, axis, group);
    call.candidates = static_cast<int>(n);
    call.eps = eps;
    call.rules = rules;
    call.x = x.const_data_ptr();
    call.scale = of_scales("scale", scale);
    call.qmin = of_candidates("qmin", qmin);
    call.qmax = of_candidates("qmax", qmax);
    call.weight = of_candidates("weight", weight);
  }

  static Tensor prepare(const char* op, const Tensor& x, int64_t axis, int64_t group) {
    check_layout(op, x, axis, group);
    return dense(x, group > 0);
  }

  const void* of_scales(const char* name, const Tensor& t) {
    return parameter(name, t, call.candidates * call.geometry.channels);
  }
  const void* of_candidates(const char* name, const Tensor& t) { return parameter(name, t, call.candidates); }

  const void* parameter(const char* name, const Tensor& t, int64_t values) {
    check_parameter(op, name, t, x, values);
    held.push_back(dense(t, true));
    return held.back().const_data_ptr();
  }
};

Tensor mixquant(const Tensor& x, const Tensor& scale, const Tensor& qmin, const Tensor& qmax, const Tensor& weight,
                int64_t axis, int64_t group, double eps, int64_t rules, std::optional<ScalarType> dtype) {
  constexpr auto op = "mixquant";
  Mixed mixed(op, x, scale, qmin, qmax, weight, axis, group, eps, rules);
  const ScalarType result = dtype.value_or(x.scalar_type());
  const Pair pair = pair_of(op, x.scalar_type(), result);
  Tensor y = empty_like(mixed.x, result, group > 0);
  mixed.call.out = y.mutable_data_ptr();
  map(mixquant_loops().forward[pair], mixed.call);
  return y;
}

// Sums in tasks of a fixed size: their number depends on the shape only, and their sums are added in their order.
// Where each channel is one run a task takes whole channels, and scales need no partial sums.
void reduce(Pair pair, const MixquantCall& call, double* of_scale, double* of_weight) {
  const Geometry& g = call.geometry;
  const int64_t n = g.numel();
  if (n == 0) return;
  const bool by_channels = g.outer == 1 && (g.channels >= 64 || g.inner < mixed_run);
  const int64_t unit = by_channels ? g.inner : g.inner < mixed_run ? g.channels * g.inner : 1;
  const int64_t scales = by_channels ? 0 : call.candidates * g.channels;
  const int64_t most = by_channels ? n : std::min(most_tasks, most_sums / std::max<int64_t>(scales, 1) + 1);
  const int64_t units = n / unit;
  int64_t tasks = std::min((n + task_size - 1) / task_size, most);
  const int64_t per_task = (units + tasks - 1) / tasks;
  tasks = (units + per_task - 1) / per_task;
  const int64_t numbers = scales + call.candidates;
  std::vector<double> partial(tasks * numbers, 0.0);
  const auto loop = (by_channels ? mixquant_loops().backward_channels : mixquant_loops().backward_range)[pair];
  const int64_t step = by_channels ? 1 : unit;
  torch::stable::parallel_for(0, tasks, std::max<int64_t>(1, grain / (per_task * unit)),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t t = begin; t < end; ++t) {
                                  double* of_task = partial.data() + t * numbers;
                                  loop(call, t * per_task * step, std::min(units, (t + 1) * per_task) * step,
                                       by_channels ? of_scale : of_task + call.candidates, of_task);
                                }
                              });
  for (int64_t t = 0; t < tasks; ++t) {
    const double* of_task = partial.data() + t * numbers;
    for (int64_t j = 0; j < call.candidates; ++j) of_weight[j] += of_task[j];
    for (int64_t i = 0; i < scales; ++i) of_scale[i] += of_task[call.candidates + i];
  }
}

template <class C>
void finish(const MixquantCall& call, const std::vector<double>& of_scale, const std::vector<double>& of_weight,
            void* gs, void* gw) {
  const int64_t channels = call.geometry.channels;
  for (int64_t j = 0; j < call.candidates; ++j) {
    static_cast<C*>(gw)[j] = static_cast<C>(of_weight[j]);
    const C weight = static_cast<const C*>(call.weight)[j], factor = static_cast<const C*>(call.factor)[j];
    for (int64_t i = j * channels; i < (j + 1) * channels; ++i) {
      static_cast<C*>(gs)[i] = mixture_scale_gradient(static_cast<C>(of_scale[i]), weight, factor);
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> mixquant_bwd(const Tensor& gy_, const Tensor& x, const Tensor& scale,
                                                const Tensor& qmin, const Tensor& qmax, const Tensor& weight,
                                                const Tensor& factor, int64_t axis, int64_t group, double eps,
                                                int64_t rules) {
  constexpr auto op = "mixquant_bwd";
  Mixed mixed(op, x, scale, qmin, qmax, weight, axis, group, eps, rules);
  MixquantCall& call = mixed.call;
  call.factor = mixed.of_candidates("factor", factor);
  check_same_shape(op, "gy", gy_, x);
  const Tensor gy = in_layout_of(gy_, mixed.x);
  const Pair pair = pair_of(op, x.scalar_type(), gy.scalar_type());
  Tensor gx = empty_like(mixed.x, x.scalar_type(), group > 0);
  Tensor gs = empty_like(scale, scale.scalar_type(), true), gw = empty_like(weight, weight.scalar_type(), true);
  call.in = gy.const_data_ptr();
  call.out = gx.mutable_data_ptr();
  std::vector<double> of_scale(call.candidates * call.geometry.channels, 0.0), of_weight(call.candidates, 0.0);
  reduce(pair, call, of_scale.data(), of_weight.data());
  if (compute_type(x.scalar_type()) == ScalarType::Double) {
    finish<double>(call, of_scale, of_weight, gs.mutable_data_ptr(), gw.mutable_data_ptr());
  } else {
    finish<float>(call, of_scale, of_weight, gs.mutable_data_ptr(), gw.mutable_data_ptr());
  }
  return {gx, gs, gw};
}

Tensor mixquant_jvp(const std::optional<Tensor>& tx_, const std::optional<Tensor>& ts, const std::optional<Tensor>& tw,
                    const Tensor& x, const Tensor& scale, const Tensor& qmin, const Tensor& qmax, const Tensor& weight,
                    const Tensor& factor, int64_t axis, int64_t group, double eps, int64_t rules,
                    std::optional<ScalarType> dtype) {
  constexpr auto op = "mixquant_jvp";
  Mixed mixed(op, x, scale, qmin, qmax, weight, axis, group, eps, rules);
  MixquantCall& call = mixed.call;
  call.factor = mixed.of_candidates("factor", factor);
  if (ts) call.ts = mixed.of_scales("ts", *ts);
  if (tw) call.tw = mixed.of_candidates("tw", *tw);
  const ScalarType result = dtype.value_or(x.scalar_type());
  const Pair pair = pair_of(op, x.scalar_type(), result);
  const Tangents tangents(op, tx_, std::nullopt, std::nullopt, mixed.x, result, call.geometry.channels);
  call.in = data(tangents.tx);
  Tensor ty = empty_like(mixed.x, result, group > 0);
  call.out = ty.mutable_data_ptr();
  map((tangents.of_result ? mixquant_loops().tangent_of_result : mixquant_loops().tangent)[pair], call);
  return ty;
}

}  // namespace
}  // namespace fastflat::cpu

STABLE_TORCH_LIBRARY_IMPL(fastflat, CPU, m) {
  m.impl("mixquant", TORCH_BOX(&fastflat::cpu::mixquant));
  m.impl("mixquant_bwd", TORCH_BOX(&fastflat::cpu::mixquant_bwd));
  m.impl("mixquant_jvp", TORCH_BOX(&fastflat::cpu::mixquant_jvp));
}

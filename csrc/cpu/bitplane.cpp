// SPDX-License-Identifier: Apache-2.0
// Glue of the bitplane family: layouts, allocation, threads. The loops are in bitplane_loops.cpp.
#include "cpu/bitplane.h"

#include "core/planes.h"
#include "core/storage.h"
#include "core/tensor.h"
#include "math/bitplane.h"

namespace fastflat::cpu {
namespace {

// Latents, 2 N of them an element, that make a thread worth waking: a sigmoid is some thirty operations.
constexpr int64_t grain = 8192;
// Elements of a task of the backward pass: a number that depends on the shape only, so that sums do too.
constexpr int64_t task_size = 16384;
constexpr int64_t most_tasks = 1024;

// Planes and small tensors, contiguous and checked; the copies live as long as this does.
struct Arguments {
  Tensor p, q, m, scale, beta;
  std::optional<Tensor> gw, tp, tq, tm, ts;
  BitplaneCall call{};

  Arguments(const char* op, const Tensor& p_, const Tensor& q_, const Tensor& m_, const Tensor& scale_,
            const Tensor& beta_, bool hard_w, bool hard_m)
      : p(checked(op, p_, q_)), q(dense(q_, true)), m(dense(m_, true)), scale(scale_), beta(beta_) {
    check_small(op, "m", m, p, p.size(0));
    check_small(op, "scale", scale, p, 1);
    check_small(op, "beta", beta, p, 1);
    call.planes = static_cast<int>(p.size(0));
    call.n = p.numel() / call.planes;
    call.hard_w = hard_w;
    call.hard_m = hard_m;
    call.p = p.const_data_ptr();
    call.q = q.const_data_ptr();
    call.m = m.const_data_ptr();
    call.scale = scale.const_data_ptr();
    call.beta = beta.const_data_ptr();
  }

  static Tensor checked(const char* op, const Tensor& p, const Tensor& q) {
    check_planes(op, p, q, most_planes);
    storage_of(op, "p", p.scalar_type());
    return dense(p, true);
  }

  int64_t elements_a_thread() const { return std::max<int64_t>(1, grain / (2 * call.planes)); }
};

void map(BitplaneLoops::Map loop, const Arguments& a) {
  const int64_t n = a.call.n, least = a.elements_a_thread();
  if (n <= least) {
    if (n > 0) loop(a.call, 0, n);
    return;
  }
  torch::stable::parallel_for(0, n, least, [&](int64_t begin, int64_t end) { loop(a.call, begin, end); });
}

Tensor bitplane(const Tensor& p, const Tensor& q, const Tensor& m, const Tensor& scale, const Tensor& beta, bool hard_w,
                bool hard_m, std::optional<ScalarType> dtype) {
  constexpr auto op = "bitplane";
  Arguments a(op, p, q, m, scale, beta, hard_w, hard_m);
  const ScalarType result = dtype.value_or(p.scalar_type());
  const Pair pair = pair_of(op, p.scalar_type(), result);
  Tensor w = empty_dense(p, plane_sizes(p), result);
  a.call.out = w.mutable_data_ptr();
  map(bitplane_loops().forward[pair], a);
  return w;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bitplane_bwd(const Tensor& gw_, const Tensor& p, const Tensor& q,
                                                        const Tensor& m, const Tensor& scale, const Tensor& beta,
                                                        bool hard_w, bool hard_m) {
  constexpr auto op = "bitplane_bwd";
  Arguments a(op, p, q, m, scale, beta, hard_w, hard_m);
  check_like_plane(op, "gw", gw_, p);
  const Pair pair = pair_of(op, p.scalar_type(), gw_.scalar_type());
  const Tensor gw = dense(gw_, true);
  Tensor gp = empty_like(p, p.scalar_type(), true), gq = empty_like(p, p.scalar_type(), true);
  Tensor gm = empty_like(m, m.scalar_type(), true), gs = empty_like(scale, scale.scalar_type(), true);
  a.call.gw = gw.const_data_ptr();
  a.call.gp = gp.mutable_data_ptr();
  a.call.gq = gq.mutable_data_ptr();
  const int64_t n = a.call.n, planes = a.call.planes;
  const int64_t per_task =
      task_size * std::max<int64_t>(1, (n + task_size * most_tasks - 1) / (task_size * most_tasks));
  const int64_t tasks = (n + per_task - 1) / per_task;
  const auto loop = bitplane_loops().backward[pair];
  std::vector<double> partial(std::max<int64_t>(tasks, 1) * planes, 0.0);
  if (tasks == 1) {
    loop(a.call, 0, n, partial.data());
  } else if (tasks > 1) {
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        loop(a.call, t * per_task, std::min(n, (t + 1) * per_task), partial.data() + t * planes);
      }
    });
    for (int64_t t = 1; t < tasks; ++t) {
      for (int64_t b = 0; b < planes; ++b) partial[b] += partial[t * planes + b];
    }
  }
  bitplane_loops().finish[storage_of(op, "p", p.scalar_type())](a.call, partial.data(), gm.mutable_data_ptr(),
                                                                gs.mutable_data_ptr());
  return {gp, gq, gm, gs};
}

const void* data(const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }

std::optional<Tensor> planes_tangent(const char* op, const char* name, const std::optional<Tensor>& t,
                                     const Tensor& p) {
  if (!t) return std::nullopt;
  check_like_planes(op, name, *t, p);
  return dense(*t, true);
}

std::optional<Tensor> small_tangent(const char* op, const char* name, const std::optional<Tensor>& t, const Tensor& p,
                                    int64_t values) {
  if (!t) return std::nullopt;
  check_small(op, name, *t, p, values);
  return dense(*t, true);
}

Tensor bitplane_jvp(const std::optional<Tensor>& tp, const std::optional<Tensor>& tq, const std::optional<Tensor>& tm,
                    const std::optional<Tensor>& ts, const Tensor& p, const Tensor& q, const Tensor& m,
                    const Tensor& scale, const Tensor& beta, bool hard_w, bool hard_m,
                    std::optional<ScalarType> dtype) {
  constexpr auto op = "bitplane_jvp";
  Arguments a(op, p, q, m, scale, beta, hard_w, hard_m);
  a.tp = planes_tangent(op, "tp", tp, p);
  a.tq = planes_tangent(op, "tq", tq, p);
  a.tm = small_tangent(op, "tm", tm, p, a.call.planes);
  a.ts = small_tangent(op, "ts", ts, p, 1);
  a.call.tp = data(a.tp);
  a.call.tq = data(a.tq);
  a.call.tm = data(a.tm);
  a.call.ts = data(a.ts);
  const ScalarType result = dtype.value_or(p.scalar_type());
  const Pair pair = pair_of(op, p.scalar_type(), result);
  Tensor tw = empty_dense(p, plane_sizes(p), result);
  a.call.out = tw.mutable_data_ptr();
  map(bitplane_loops().tangent[pair], a);
  return tw;
}

}  // namespace
}  // namespace fastflat::cpu

STABLE_TORCH_LIBRARY_IMPL(fastflat, CPU, m) {
  m.impl("bitplane", TORCH_BOX(&fastflat::cpu::bitplane));
  m.impl("bitplane_bwd", TORCH_BOX(&fastflat::cpu::bitplane_bwd));
  m.impl("bitplane_jvp", TORCH_BOX(&fastflat::cpu::bitplane_jvp));
}

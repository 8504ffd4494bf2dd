// SPDX-License-Identifier: Apache-2.0
// Glue of the bitplane family: layouts, allocation, device and stream. The kernels are in bitplane.cu.
#include "cuda/bitplane.h"

#include "core/planes.h"
#include "core/storage.h"
#include "cuda/device.h"
#include "math/bitplane.h"

namespace fastflat::cuda {
namespace {

const void* data(const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }

Tensor prepared(const Tensor& t) { return aligned(dense(t, true)); }

// Planes and small tensors as the kernels want them; they live as long as this does.
struct Call {
  Tensor p, q, m;
  BitplaneArguments arguments;

  Call(const char* op, const Tensor& p_, const Tensor& q_, const Tensor& m_, const Tensor& scale, const Tensor& beta,
       bool hard_w, bool hard_m)
      : p(checked(op, p_, q_)), q(prepared(q_)), m(dense(m_, true)) {
    const int64_t planes = p.size(0);
    check_small(op, "m", m, p, planes);
    check_small(op, "scale", scale, p, 1);
    check_small(op, "beta", beta, p, 1);
    arguments = {p.const_data_ptr(),
                 q.const_data_ptr(),
                 m.const_data_ptr(),
                 scale.const_data_ptr(),
                 beta.const_data_ptr(),
                 p.numel() / planes,
                 static_cast<int>(planes),
                 hard_w,
                 hard_m};
  }

  static Tensor checked(const char* op, const Tensor& p, const Tensor& q) {
    check_planes(op, p, q, most_planes);
    storage_of(op, "p", p.scalar_type());
    return prepared(p);
  }
};

Tensor bitplane(const Tensor& p, const Tensor& q, const Tensor& m, const Tensor& scale, const Tensor& beta, bool hard_w,
                bool hard_m, std::optional<ScalarType> dtype) {
  constexpr auto op = "bitplane";
  const OnDevice device(p);
  const Call call(op, p, q, m, scale, beta, hard_w, hard_m);
  const ScalarType result = dtype.value_or(p.scalar_type());
  const Pair pair = pair_of(op, p.scalar_type(), result);
  Tensor w = empty_dense(p, plane_sizes(p), result);
  check_launch(op, launch_bitplane(pair, call.arguments, w.mutable_data_ptr(), device.stream));
  return w;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bitplane_bwd(const Tensor& gw_, const Tensor& p, const Tensor& q,
                                                        const Tensor& m, const Tensor& scale, const Tensor& beta,
                                                        bool hard_w, bool hard_m) {
  constexpr auto op = "bitplane_bwd";
  const OnDevice device(p);
  const Call call(op, p, q, m, scale, beta, hard_w, hard_m);
  check_like_plane(op, "gw", gw_, p);
  const Pair pair = pair_of(op, p.scalar_type(), gw_.scalar_type());
  const Tensor gw = prepared(gw_);
  Tensor gp = empty_like(p, p.scalar_type(), true), gq = empty_like(p, p.scalar_type(), true);
  Tensor gm = empty_like(m, m.scalar_type(), true), gs = empty_like(scale, scale.scalar_type(), true);
  Tensor workspace = empty_dense(p, {bitplane_bwd_workspace(pair, call.arguments)}, ScalarType::Byte);
  check_launch(op, launch_bitplane_bwd(pair, call.arguments, gw.const_data_ptr(), gp.mutable_data_ptr(),
                                       gq.mutable_data_ptr(), gm.mutable_data_ptr(), gs.mutable_data_ptr(),
                                       workspace.mutable_data_ptr(), device.stream));
  return {gp, gq, gm, gs};
}

std::optional<Tensor> planes_tangent(const char* op, const char* name, const std::optional<Tensor>& t,
                                     const Tensor& p) {
  if (!t) return std::nullopt;
  check_like_planes(op, name, *t, p);
  return prepared(*t);
}

std::optional<Tensor> small_tangent(const char* op, const char* name, const std::optional<Tensor>& t, const Tensor& p,
                                    int64_t values) {
  if (!t) return std::nullopt;
  check_small(op, name, *t, p, values);
  return dense(*t, true);
}

Tensor bitplane_jvp(const std::optional<Tensor>& tp_, const std::optional<Tensor>& tq_,
                    const std::optional<Tensor>& tm_, const std::optional<Tensor>& ts_, const Tensor& p,
                    const Tensor& q, const Tensor& m, const Tensor& scale, const Tensor& beta, bool hard_w, bool hard_m,
                    std::optional<ScalarType> dtype) {
  constexpr auto op = "bitplane_jvp";
  const OnDevice device(p);
  const Call call(op, p, q, m, scale, beta, hard_w, hard_m);
  const auto tp = planes_tangent(op, "tp", tp_, p), tq = planes_tangent(op, "tq", tq_, p);
  const auto tm = small_tangent(op, "tm", tm_, p, p.size(0)), ts = small_tangent(op, "ts", ts_, p, 1);
  const ScalarType result = dtype.value_or(p.scalar_type());
  const Pair pair = pair_of(op, p.scalar_type(), result);
  Tensor tw = empty_dense(p, plane_sizes(p), result);
  check_launch(op, launch_bitplane_jvp(pair, call.arguments, data(tp), data(tq), data(tm), data(ts),
                                       tw.mutable_data_ptr(), device.stream));
  return tw;
}

}  // namespace
}  // namespace fastflat::cuda

STABLE_TORCH_LIBRARY_IMPL(fastflat, CUDA, m) {
  m.impl("bitplane", TORCH_BOX(&fastflat::cuda::bitplane));
  m.impl("bitplane_bwd", TORCH_BOX(&fastflat::cuda::bitplane_bwd));
  m.impl("bitplane_jvp", TORCH_BOX(&fastflat::cuda::bitplane_jvp));
}

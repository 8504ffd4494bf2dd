// SPDX-License-Identifier: Apache-2.0
// Element-wise and channel-wise work on K tangents at once.
#include "cuda/tangents.h"

#include <tuple>

#include "core/tangent_checks.h"
#include "cuda/device.h"

namespace fastflat::cuda {
namespace {

Tensor tangents_combine(const MaybeTensor& t0, const MaybeTensor& p0, const MaybeTensor& t1, const MaybeTensor& p1,
                        const MaybeTensor& f0, const MaybeTensor& r0, const MaybeTensor& f1, const MaybeTensor& r1,
                        const MaybeTensor& shift, const MaybeTensor& mask, int64_t kind) {
  constexpr auto op = "tangents_combine";
  MaybeTensor out;
  const CombineTraits traits = check_combine(op, {t0, p0, t1, p1, f0, r0, f1, r1, shift, mask}, kind, &out);
  const OnDevice device(*out);
  CombineCall call{};
  call.storage = traits.storage;
  call.kind = static_cast<int>(kind);
  call.geometry = traits.geometry;
  call.count = traits.count;
  call.first_of_channel = traits.first_of_channel;
  call.second_of_channel = traits.second_of_channel;
  call.t0 = data_of(t0);
  call.p0 = data_of(p0);
  call.t1 = data_of(t1);
  call.p1 = data_of(p1);
  call.f0 = data_of(f0);
  call.r0 = data_of(r0);
  call.f1 = data_of(f1);
  call.r1 = data_of(r1);
  call.shift = data_of(shift);
  call.mask = data_of(mask);
  call.out = out->mutable_data_ptr();
  check_launch(op, launch_tangents_combine(call, device.stream));
  return *out;
}

std::tuple<Tensor, Tensor, Tensor> tangents_sums(const Tensor& t0, const MaybeTensor& p0, const MaybeTensor& t1,
                                                 const MaybeTensor& p1, const MaybeTensor& mask, bool total) {
  constexpr auto op = "tangents_sums";
  const SumsTensors tensors{t0, p0, t1, p1, mask};
  const SumsTraits traits = check_sums(op, tensors);
  const OnDevice device(t0);
  auto results = sums_results(tensors, traits, total);
  auto& [mapped, dots, totals] = results;
  SumsCall call{};
  call.storage = traits.storage;
  call.geometry = traits.geometry;
  call.count = traits.count;
  call.t0 = t0.const_data_ptr();
  call.p0 = data_of(p0);
  call.t1 = data_of(t1);
  call.p1 = data_of(p1);
  call.mask = data_of(mask);
  call.mapped = mapped.mutable_data_ptr();
  call.dots = p0 ? dots.mutable_data_ptr() : nullptr;
  call.totals = total ? totals.mutable_data_ptr() : nullptr;
  Tensor partials = empty_dense(t0, {2 * tangents_sums_partials(call)}, compute_type(t0.scalar_type()));
  check_launch(op, launch_tangents_sums(call, partials.mutable_data_ptr(), device.stream));
  return results;
}

}  // namespace
}  // namespace fastflat::cuda

STABLE_TORCH_LIBRARY_IMPL(fastflat, CUDA, m) {
  m.impl("tangents_combine", TORCH_BOX(&fastflat::cuda::tangents_combine));
  m.impl("tangents_sums", TORCH_BOX(&fastflat::cuda::tangents_sums));
}

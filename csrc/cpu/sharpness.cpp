// SPDX-License-Identifier: Apache-2.0
// Norms and the ascent over a list of tensors.
#include "cpu/sharpness.h"

#include <cmath>
#include <limits>

#include "core/list_checks.h"
#include "cpu/multi.h"
#include "math/sharpness.h"

namespace fastflat::cpu {
namespace {

Tensor sharpness_sums(const Tensors& gs, const Tensors& others, const Integers& kind, double eta) {
  constexpr auto op = "sharpness_sums";
  STD_TORCH_CHECK(!gs.empty(), "fastflat::", op, ": gs must hold a tensor");
  Lists lists(op, "gs", gs, false);
  std::vector<SumsCall> calls(lists.count());
  for (size_t t = 0; t < lists.count(); ++t) {
    calls[t] = {lists.weight(t), {}, lists.value("kind", kind, t, 3), eta};
    STD_TORCH_CHECK(calls[t].kind == sum_gradient || !others.empty(), "fastflat::", op,
                    ": others must not be empty for kind ", calls[t].kind);
  }
  lists.add("others", others, Lists::partner, false, true,
            [&](size_t t, void* data, Storage s) { calls[t].other = {data, s}; });
  const ListWork work(lists);
  std::vector<double> of_units(3 * work.units().size());
  const auto& loops = sharpness_loops().sums;
  work.run([&](int64_t i) {
    const ListUnit& u = work.units()[i];
    loops[lists.is_double(u.tensor)](calls[u.tensor], u.begin, u.end, &of_units[3 * i]);
  });
  return gather_sums(gs[0], lists.count(), work, of_units);
}

Tensor sharpness_scale(const Tensor& sums, const Tensor& rho, double eps, bool linf) {
  constexpr auto op = "sharpness_scale";
  check_scale_arguments(op, sums, rho);
  const int64_t count = rho.numel();
  Tensor result = empty_dense(sums, {count + 2}, ScalarType::Double);
  const double* from = numbers(sums);
  const double* radius = numbers(rho);
  double* to = static_cast<double*>(result.mutable_data_ptr());
  double total = 0.0;
  for (int64_t t = 0; t < sums.size(0); ++t) total += from[3 * t];
  for (int64_t k = 0; k < count; ++k) to[k] = ascent_scale(radius[k], total, eps, linf);
  to[count] = std::sqrt(total);
  to[count + 1] = to[count] <= std::numeric_limits<double>::max() ? 0.0 : 1.0;
  return result;
}

void sharpness_ascent_(const Tensors& ws, const Tensors& gs, const Tensors& outs, const std::optional<Tensor>& backup,
                       const Integers& at, const Tensor& scale, const Integers& metric, double eta,
                       const std::optional<Tensor>& state) {
  constexpr auto op = "sharpness_ascent_";
  const bool into = !outs.empty();
  Lists lists(op, "ws", ws, !into);
  check_ascent_arguments(op, ws, lists.count(), into, backup.has_value(), scale);
  const double* scales = numbers(scale);
  const auto places = lists.places(backup, at, true);
  const bool beyond = lists.beyond();
  std::vector<AscentCall> calls(lists.count());
  for (size_t t = 0; t < lists.count(); ++t) {
    calls[t] = {lists.weight(t), {}, {}, {}, scales[t], eta, lists.value("metric", metric, t, 3), {}};
    if (places[t]) calls[t].backup = {places[t], lists.weight(t).storage, beyond};
  }
  lists.add("gs", gs, Lists::partner, false, false, [&](size_t t, void* data, Storage s) { calls[t].g = {data, s}; });
  lists.add("outs", outs, Lists::copy, true, true,
            [&](size_t t, void* data, Storage s) { calls[t].out = {data, s, beyond}; });
  const int64_t* random = lists.draw(state, [&](size_t t, int64_t first) { calls[t].draws.start = first; });
  for (AscentCall& call : calls) call.draws.state = random;
  const ListWork work(lists);
  const auto& loops = sharpness_loops().ascent;
  work.run(
      [&](int64_t i) {
        const ListUnit& u = work.units()[i];
        loops[lists.is_double(u.tensor)](calls[u.tensor], u.begin, u.end);
      },
      true);
  lists.finish();
}

}  // namespace
}  // namespace fastflat::cpu

STABLE_TORCH_LIBRARY_IMPL(fastflat, CPU, m) {
  m.impl("sharpness_sums", TORCH_BOX(&fastflat::cpu::sharpness_sums));
  m.impl("sharpness_scale", TORCH_BOX(&fastflat::cpu::sharpness_scale));
  m.impl("sharpness_ascent_", TORCH_BOX(&fastflat::cpu::sharpness_ascent_));
}

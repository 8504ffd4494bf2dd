// SPDX-License-Identifier: Apache-2.0
// Norms and the ascent over a list of tensors.
#include "cpu/sharpness.h"

#include "cpu/multi.h"
#include "math/sharpness.h"

namespace fastflat::cpu {
namespace {

using Integers = std::vector<int64_t>;

bool is_double(const Tensor& t) { return t.scalar_type() == ScalarType::Double; }

Tensor sharpness_sums(const Tensors& gs, const Tensors& others, const Integers& kind, double eta) {
  constexpr auto op = "sharpness_sums";
  STD_TORCH_CHECK(!gs.empty(), "fastflat::", op, ": gs must hold a tensor");
  check_lengths(op, "others", others.size(), gs.size(), true);
  check_lengths(op, "kind", kind.size(), gs.size(), false);
  std::vector<SumsCall> calls;
  Tensors alive;
  calls.reserve(gs.size());
  alive.reserve(2 * gs.size());
  for (size_t t = 0; t < gs.size(); ++t) {
    SumsCall call{{}, {}, kind[t], eta};
    const bool partner = kind[t] != sum_gradient;
    alive.push_back(dense(partner && !others.empty() ? others[t] : gs[t], false));
    const Tensor like = alive.back();
    if (partner) {
      STD_TORCH_CHECK(!others.empty(), "fastflat::", op, ": others must not be empty for kind ", kind[t]);
      check_partner(op, "others", others[t], gs[t]);
      call.other = stream_of(op, "others", like);
    }
    alive.push_back(in_layout_of(gs[t], like));
    call.g = stream_of(op, "gs", alive.back());
    calls.push_back(call);
  }
  const ListWork work(gs);
  std::vector<double> of_units(3 * work.units().size());
  const auto& loops = sharpness_loops().sums;
  work.run([&](int64_t i) {
    const ListUnit& u = work.units()[i];
    loops[is_double(gs[u.tensor])](calls[u.tensor], u.begin, u.end, &of_units[3 * i]);
  });
  return gather_sums(gs, work, of_units);
}

Tensor sharpness_scale(const Tensor& sums, const Tensor& rho, double eps, bool linf) {
  constexpr auto op = "sharpness_scale";
  STD_TORCH_CHECK(sums.dim() == 2 && sums.size(1) == 3, "fastflat::", op, ": sums must have shape [T, 3]");
  check_numbers(op, "sums", sums, sums.numel());
  check_numbers(op, "rho", rho, rho.numel());
  const int64_t groups = rho.numel();
  Tensor result = empty_dense(sums, {groups + 2}, ScalarType::Double);
  const double* from = static_cast<const double*>(sums.const_data_ptr());
  const double* of_group = static_cast<const double*>(rho.const_data_ptr());
  double* to = static_cast<double*>(result.mutable_data_ptr());
  double total = 0.0;
  for (int64_t t = 0; t < sums.size(0); ++t) total += from[3 * t];
  for (int64_t k = 0; k < groups; ++k) to[k] = ascent_scale(of_group[k], total, eps, linf);
  to[groups] = std::sqrt(total);
  to[groups + 1] = to[groups] <= std::numeric_limits<double>::max() ? 0.0 : 1.0;
  return result;
}

void sharpness_ascent_(const Tensors& ws, const Tensors& gs, const Tensors& outs, const Tensor& scale,
                       const Integers& row, const Integers& metric, double eta, int64_t mode,
                       const std::optional<Tensor>& state) {
  constexpr auto op = "sharpness_ascent_";
  const size_t count = ws.size();
  STD_TORCH_CHECK(mode >= ascent_backup && mode <= ascent_inplace, "fastflat::", op, ": mode must be 0, 1 or 2, got ",
                  mode);
  check_lengths(op, "gs", gs.size(), count, false);
  check_lengths(op, "outs", outs.size(), mode == ascent_inplace ? 0 : count, false);
  check_lengths(op, "row", row.size(), count, false);
  check_lengths(op, "metric", metric.size(), count, false);
  check_numbers(op, "scale", scale, scale.numel());
  const int64_t* random = random_state(op, state);
  const auto starts = random_starts(ws);
  const double* scales = static_cast<const double*>(scale.const_data_ptr());
  std::vector<AscentCall> calls;
  std::vector<Changed> weights, results;
  Tensors alive;
  calls.reserve(count);
  weights.reserve(count);
  results.reserve(count);
  alive.reserve(count);
  int64_t bytes = 0;
  for (size_t t = 0; t < count; ++t) {
    const Tensor& w = ws[t];
    check_partner(op, "gs", gs[t], w);
    STD_TORCH_CHECK(row[t] >= 0 && row[t] < scale.numel(), "fastflat::", op, ": row must lie in [0, ", scale.numel(),
                    "), got ", row[t]);
    weights.emplace_back(w);
    const Tensor& like = weights.back().tensor();
    alive.push_back(in_layout_of(gs[t], like));
    AscentCall call{stream_of(op, "ws", like), stream_of(op, "gs", alive.back()), {}, scales[row[t]], eta,
                    metric[t],                 mode,                              {random, starts[t]}};
    if (mode != ascent_inplace) {
      check_same_shape(op, "outs", outs[t], w);
      if (mode == ascent_backup) {
        STD_TORCH_CHECK(outs[t].scalar_type() == w.scalar_type(), "fastflat::", op, ": outs must have the dtype of ws");
      } else {
        pair_of(op, w.scalar_type(), outs[t].scalar_type());
      }
      results.emplace_back(outs[t], like);
      call.out = stream_of(op, "outs", results.back().tensor());
    }
    bytes += w.numel() * static_cast<int64_t>(w.element_size());
    calls.push_back(call);
  }
  for (AscentCall& call : calls) call.out.bypass = bytes > beyond_caches;
  const ListWork work(ws);
  const auto& loops = sharpness_loops().ascent;
  work.run(
      [&](int64_t i) {
        const ListUnit& u = work.units()[i];
        loops[is_double(ws[u.tensor])](calls[u.tensor], u.begin, u.end);
      },
      true);
  if (mode != ascent_into) {
    for (Changed& w : weights) w.finish();
  }
  for (Changed& r : results) r.finish();
}

}  // namespace
}  // namespace fastflat::cpu

STABLE_TORCH_LIBRARY_IMPL(fastflat, CPU, m) {
  m.impl("sharpness_sums", TORCH_BOX(&fastflat::cpu::sharpness_sums));
  m.impl("sharpness_scale", TORCH_BOX(&fastflat::cpu::sharpness_scale));
  m.impl("sharpness_ascent_", TORCH_BOX(&fastflat::cpu::sharpness_ascent_));
}

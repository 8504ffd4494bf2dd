// SPDX-License-Identifier: Apache-2.0
// Norms and the ascent over a list of tensors.
#include "cuda/sharpness.h"

#include "core/list_checks.h"
#include "cuda/device.h"
#include "math/sharpness.h"

namespace fastflat::cuda {
namespace {

constexpr int64_t kinds = sum_scaled + 1, metrics = metric_linf + 1;

Tensor sharpness_sums(const Tensors& gs, const Tensors& others, const Integers& kind, double eta) {
  constexpr auto op = "sharpness_sums";
  STD_TORCH_CHECK(!gs.empty(), "fastflat::", op, ": gs must hold a tensor");
  TensorLists lists(op, "gs", gs, false);
  std::vector<SumsTensor> list(gs.size());
  int64_t chunks = 0;
  for (size_t t = 0; t < gs.size(); ++t) {
    SumsTensor& tensor = list[t];
    tensor.option = lists.value("kind", kind, t, kinds);
    STD_TORCH_CHECK(tensor.option == sum_gradient || !others.empty(), "fastflat::", op,
                    ": others must not be empty for kind ", tensor.option);
    tensor.size = lists.view(t).numel;
    tensor.first = chunks;
    tensor.set(sums_of::g, lists.data(t), lists.view(t).storage);
    chunks += list_chunks(tensor.size);
  }
  lists.add("others", others, TensorLists::partner, false, true, [&](size_t t, void* data, Storage storage) {
    if (list[t].option != sum_gradient) list[t].set(sums_of::other, data, storage);
  });
  const OnDevice device(gs[0]);
  Tensor partials = empty_dense(gs[0], {chunks, 3}, ScalarType::Double);
  Tensor sums = empty_dense(gs[0], {static_cast<int64_t>(gs.size()), 3}, ScalarType::Double);
  check_launch(op, launch_sharpness_sums(list, eta, static_cast<double*>(partials.mutable_data_ptr()),
                                         static_cast<double*>(sums.mutable_data_ptr()), device.stream));
  return sums;
}

Tensor sharpness_scale(const Tensor& sums, const Tensor& rho, double eps, bool linf) {
  constexpr auto op = "sharpness_scale";
  check_scale_arguments(op, sums, rho);
  const OnDevice device(sums);
  Tensor result = empty_dense(sums, {rho.numel() + 2}, ScalarType::Double);
  check_launch(op, launch_sharpness_scale(numbers(sums), sums.size(0), numbers(rho), rho.numel(), eps, linf,
                                          static_cast<double*>(result.mutable_data_ptr()), device.stream));
  return result;
}

void sharpness_ascent_(const Tensors& ws, const Tensors& gs, const Tensors& outs, const std::optional<Tensor>& backup,
                       const Integers& at, const Tensor& scale, const Integers& metric, double eta,
                       const std::optional<Tensor>& state) {
  constexpr auto op = "sharpness_ascent_";
  const bool into = !outs.empty();
  check_ascent_arguments(op, ws, ws.size(), into, backup.has_value(), scale);
  TensorLists lists(op, "ws", ws, !into);
  const auto places = lists.places(backup, at, true);
  std::vector<AscentTensor> list(ws.size());
  for (size_t t = 0; t < ws.size(); ++t) {
    const View& view = lists.view(t);
    list[t].size = view.numel;
    list[t].option = lists.value("metric", metric, t, metrics);
    list[t].set(ascent_of::w, lists.data(t), view.storage);
    if (places[t]) list[t].set(ascent_of::backup, places[t], view.storage);
  }
  lists.add("gs", gs, TensorLists::partner, false, false,
            [&](size_t t, void* data, Storage storage) { list[t].set(ascent_of::g, data, storage); });
  lists.add("outs", outs, TensorLists::copy, true, true,
            [&](size_t t, void* data, Storage storage) { list[t].set(ascent_of::out, data, storage); });
  const int64_t* random = lists.draw(state, [&](size_t t, int64_t first) { list[t].first = first; });
  if (ws.empty()) return;
  const OnDevice device(ws[0]);
  check_launch(op, launch_sharpness_ascent(list, numbers(scale), eta, random, device.stream));
  lists.finish();
}

}  // namespace
}  // namespace fastflat::cuda

STABLE_TORCH_LIBRARY_IMPL(fastflat, CUDA, m) {
  m.impl("sharpness_sums", TORCH_BOX(&fastflat::cuda::sharpness_sums));
  m.impl("sharpness_scale", TORCH_BOX(&fastflat::cuda::sharpness_scale));
  m.impl("sharpness_ascent_", TORCH_BOX(&fastflat::cuda::sharpness_ascent_));
}

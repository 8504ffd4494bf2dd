// SPDX-License-Identifier: Apache-2.0
// The steps of the optimizers over a list of tensors.
#include "cuda/descent.h"

#include "core/list_checks.h"
#include "cuda/device.h"
#include "math/descent.h"

namespace fastflat::cuda {
namespace {

// Values of `group` are device memory: nothing here can look at them.
Tensor descent_rows_(const Tensor& hyper, const Tensor& group, const Tensor& steps, const Tensor& mix,
                     const std::optional<Tensor>& of_gradients, const std::optional<Tensor>& of_weights, int64_t rule) {
  constexpr auto op = "descent_rows_";
  const int64_t count = group.numel();
  check_rows_arguments(op, hyper, group, steps, mix, of_gradients, of_weights, rule);
  const bool lars = rule == rule_lars;
  const OnDevice device(hyper);
  Tensor rows = empty_dense(hyper, {count, row::columns}, ScalarType::Double);
  const RowSources from{numbers(hyper),
                        static_cast<const int64_t*>(group.const_data_ptr()),
                        static_cast<double*>(steps.mutable_data_ptr()),
                        numbers(mix),
                        lars ? numbers(*of_gradients) : nullptr,
                        lars ? numbers(*of_weights) : nullptr};
  check_launch(op,
               launch_descent_rows(from, count, rule, static_cast<double*>(rows.mutable_data_ptr()), device.stream));
  return rows;
}

// The tensors of a call, as kernels take them.
class Steps {
 public:
  Steps(const char* op, const Tensors& ws, const std::optional<Tensor>& backup, const Integers& at, const Tensor& rows,
        bool changed)
      : lists_(op, "ws", ws, changed), list_(ws.size()) {
    check_numbers(op, "rows", rows, static_cast<int64_t>(ws.size()) * row::columns, ws.empty() ? rows : ws[0]);
    const auto places = lists_.places(backup, at, false);
    for (size_t t = 0; t < ws.size(); ++t) {
      const View& view = lists_.view(t);
      list_[t].size = view.numel;
      list_[t].set(descent_of::w, lists_.data(t), view.storage);
      list_[t].set(descent_of::source, backup ? places[t] : lists_.data(t), view.storage);
    }
  }

  void gradients(const Tensors& gs, const Tensors& firsts) {
    add("gs", gs, TensorLists::partner, descent_of::g, false, false);
    add("firsts", firsts, TensorLists::partner, descent_of::f, false, true);
  }
  void states(const char* name, const Tensors& list, int stream, bool changed, bool may_be_empty) {
    add(name, list, TensorLists::state, stream, changed, may_be_empty);
  }
  // Returns the state of the draws.
  const int64_t* results(const Tensors& outs, const Tensors& averages, const std::optional<Tensor>& state) {
    add("outs", outs, TensorLists::copy, descent_of::out, true, true);
    states("averages", averages, descent_of::a, true, true);
    return lists_.draw(state, [this](size_t t, int64_t first) { list_[t].first = first; });
  }
  // Numbers the chunks of the list; returns how many there are.
  int64_t chunks() {
    int64_t next = 0;
    for (DescentTensor& tensor : list_) {
      tensor.first = next;
      next += list_chunks(tensor.size);
    }
    return next;
  }

  const DescentList& list() const { return list_; }
  void finish() { lists_.finish(); }

 private:
  void add(const char* name, const Tensors& list, TensorLists::Kind kind, int stream, bool changed, bool may_be_empty) {
    lists_.add(name, list, kind, changed, may_be_empty,
               [&](size_t t, void* data, Storage storage) { list_[t].set(stream, data, storage); });
  }

  TensorLists lists_;
  DescentList list_;
};

void descent_sgd_(const Tensors& ws, const Tensors& outs, const std::optional<Tensor>& backup, const Integers& at,
                  const Tensors& gs, const Tensors& firsts, const Tensors& momenta, const Tensors& averages,
                  const Tensor& rows, const std::optional<Tensor>& state) {
  constexpr auto op = "descent_sgd_";
  Steps steps(op, ws, backup, at, rows, true);
  steps.gradients(gs, firsts);
  steps.states("momenta", momenta, descent_of::m, true, true);
  const int64_t* random = steps.results(outs, averages, state);
  if (ws.empty()) return;
  const OnDevice device(ws[0]);
  check_launch(op, launch_descent_sgd(steps.list(), numbers(rows), random, device.stream));
  steps.finish();
}

void descent_adam_(const Tensors& ws, const Tensors& outs, const std::optional<Tensor>& backup, const Integers& at,
                   const Tensors& gs, const Tensors& firsts, const Tensors& means, const Tensors& squares,
                   const Tensors& largest, const Tensors& averages, const Tensor& rows, bool padam,
                   const std::optional<Tensor>& state) {
  constexpr auto op = "descent_adam_";
  Steps steps(op, ws, backup, at, rows, true);
  steps.gradients(gs, firsts);
  steps.states("means", means, descent_of::m, true, false);
  steps.states("squares", squares, descent_of::v, true, false);
  steps.states("largest", largest, descent_of::x, true, true);
  const int64_t* random = steps.results(outs, averages, state);
  if (ws.empty()) return;
  const OnDevice device(ws[0]);
  check_launch(op, launch_descent_adam(steps.list(), numbers(rows), padam, random, device.stream));
  steps.finish();
}

Tensor descent_lamb_moments_(const Tensors& ws, const std::optional<Tensor>& backup, const Integers& at,
                             const Tensors& gs, const Tensors& firsts, const Tensors& means, const Tensors& squares,
                             const Tensor& rows) {
  constexpr auto op = "descent_lamb_moments_";
  Steps steps(op, ws, backup, at, rows, false);
  steps.gradients(gs, firsts);
  steps.states("means", means, descent_of::m, true, false);
  steps.states("squares", squares, descent_of::v, true, false);
  const int64_t chunks = steps.chunks();
  const OnDevice device(rows);
  Tensor partials = empty_dense(rows, {chunks, 3}, ScalarType::Double);
  Tensor sums = empty_dense(rows, {static_cast<int64_t>(ws.size()), 3}, ScalarType::Double);
  check_launch(
      op, launch_descent_lamb_moments(steps.list(), numbers(rows), static_cast<double*>(partials.mutable_data_ptr()),
                                      static_cast<double*>(sums.mutable_data_ptr()), device.stream));
  steps.finish();
  return sums;
}

void descent_lamb_(const Tensors& ws, const Tensors& outs, const std::optional<Tensor>& backup, const Integers& at,
                   const Tensors& means, const Tensors& squares, const Tensors& averages, const Tensor& rows,
                   const Tensor& sums, const std::optional<Tensor>& state) {
  constexpr auto op = "descent_lamb_";
  Steps steps(op, ws, backup, at, rows, true);
  check_numbers(op, "sums", sums, 3 * static_cast<int64_t>(ws.size()), rows);
  steps.states("means", means, descent_of::m, false, false);
  steps.states("squares", squares, descent_of::v, false, false);
  const int64_t* random = steps.results(outs, averages, state);
  if (ws.empty()) return;
  const OnDevice device(ws[0]);
  check_launch(op, launch_descent_lamb(steps.list(), numbers(rows), numbers(sums), random, device.stream));
  steps.finish();
}

}  // namespace
}  // namespace fastflat::cuda

STABLE_TORCH_LIBRARY_IMPL(fastflat, CUDA, m) {
  m.impl("descent_rows_", TORCH_BOX(&fastflat::cuda::descent_rows_));
  m.impl("descent_sgd_", TORCH_BOX(&fastflat::cuda::descent_sgd_));
  m.impl("descent_adam_", TORCH_BOX(&fastflat::cuda::descent_adam_));
  m.impl("descent_lamb_moments_", TORCH_BOX(&fastflat::cuda::descent_lamb_moments_));
  m.impl("descent_lamb_", TORCH_BOX(&fastflat::cuda::descent_lamb_));
}

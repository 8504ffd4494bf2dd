// SPDX-License-Identifier: Apache-2.0
// The steps of the optimizers over a list of tensors.
#include "cuda/descent.h"

#include "core/lists.h"
#include "cuda/device.h"
#include "math/descent.h"

namespace fastflat::cuda {
namespace {

const double* numbers(const Tensor& t) { return static_cast<const double*>(t.const_data_ptr()); }

// Values of `group` are device memory: nothing here can look at them.
Tensor descent_rows_(const Tensor& hyper, const Tensor& group, const Tensor& steps, const Tensor& mix,
                     const std::optional<Tensor>& of_gradients, const std::optional<Tensor>& of_weights, int64_t rule) {
  constexpr auto op = "descent_rows_";
  const int64_t count = group.numel();
  STD_TORCH_CHECK(hyper.dim() == 2 && hyper.size(1) == hyper::columns, "fastflat::", op, ": hyper must have shape [G, ",
                  static_cast<int>(hyper::columns), "]");
  check_numbers(op, "hyper", hyper, hyper.numel(), hyper);
  check_numbers(op, "steps", steps, count, hyper);
  check_numbers(op, "mix", mix, 3, hyper);
  STD_TORCH_CHECK(group.scalar_type() == ScalarType::Long && group.is_contiguous(), "fastflat::", op,
                  ": group must be contiguous int64");
  STD_TORCH_CHECK(group.device() == hyper.device(), "fastflat::", op, ": group must be on the device of hyper");
  STD_TORCH_CHECK(rule >= rule_sgd && rule <= rule_lamb, "fastflat::", op, ": rule must lie in [0, 4], got ", rule);
  const bool lars = rule == rule_lars;
  if (lars) {
    STD_TORCH_CHECK(of_gradients && of_weights, "fastflat::", op, ": lars must have the sums of gradients and weights");
    check_numbers(op, "of_gradients", *of_gradients, 3 * count, hyper);
    check_numbers(op, "of_weights", *of_weights, 3 * count, hyper);
  }
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

// SPDX-License-Identifier: Apache-2.0
// The steps of the optimizers over a list of tensors.
#include "cpu/descent.h"

#include "core/list_checks.h"
#include "cpu/multi.h"
#include "math/descent.h"

namespace fastflat::cpu {
namespace {

Tensor descent_rows_(const Tensor& hyper, const Tensor& group, const Tensor& steps, const Tensor& mix,
                     const std::optional<Tensor>& of_gradients, const std::optional<Tensor>& of_weights, int64_t rule) {
  constexpr auto op = "descent_rows_";
  const int64_t count = group.numel();
  check_rows_arguments(op, hyper, group, steps, mix, of_gradients, of_weights, rule);
  const bool lars = rule == rule_lars;
  const int64_t* groups = static_cast<const int64_t*>(group.const_data_ptr());
  for (int64_t t = 0; t < count; ++t) {
    STD_TORCH_CHECK(groups[t] >= 0 && groups[t] < hyper.size(0), "fastflat::", op, ": group must lie in [0, ",
                    hyper.size(0), "), got ", groups[t]);
  }
  Tensor rows = empty_dense(hyper, {count, row::columns}, ScalarType::Double);
  double* to = static_cast<double*>(rows.mutable_data_ptr());
  double* step = static_cast<double*>(steps.mutable_data_ptr());
  const double c1 = numbers(mix)[0], c2 = numbers(mix)[1];
  const bool skip = numbers(mix)[2] != 0.0;
  const double none[3] = {};
  for (int64_t t = 0; t < count; ++t) {
    if (!skip) step[t] += 1.0;
    fill_row(to + t * row::columns, numbers(hyper) + groups[t] * hyper::columns, step[t], c1, c2, skip,
             lars ? numbers(*of_gradients) + 3 * t : none, lars ? numbers(*of_weights)[3 * t] : 0.0, rule);
  }
  return rows;
}

// The calls of a list.
class Calls {
 public:
  Calls(const char* op, const Tensors& ws, const std::optional<Tensor>& backup, const Integers& at, const Tensor& rows,
        bool changed)
      : lists_(op, "ws", ws, changed), calls_(lists_.count()), beyond_(lists_.beyond()) {
    check_numbers(op, "rows", rows, static_cast<int64_t>(calls_.size()) * row::columns, rows);
    const auto places = lists_.places(backup, at, false);
    for (size_t t = 0; t < calls_.size(); ++t) {
      calls_[t].row = numbers(rows) + t * row::columns;
      calls_[t].w = calls_[t].source = lists_.weight(t);
      if (places[t]) calls_[t].source.data = places[t];
      // Restored weights are written without having been read.
      calls_[t].w.bypass = backup && beyond_;
    }
  }

  void gradients(const Tensors& gs, const Tensors& firsts) {
    add("gs", gs, Lists::partner, &DescentCall::g, false, false);
    add("firsts", firsts, Lists::partner, &DescentCall::f, false, true);
  }
  void states(const char* name, const Tensors& list, Stream DescentCall::* stream, bool changed, bool may_be_empty) {
    add(name, list, Lists::state, stream, changed, may_be_empty);
  }
  void results(const Tensors& outs, const Tensors& averages, const std::optional<Tensor>& state) {
    add("outs", outs, Lists::copy, &DescentCall::out, true, true);
    add("averages", averages, Lists::state, &DescentCall::a, true, true);
    const int64_t* random = lists_.draw(state, [this](size_t t, int64_t first) { calls_[t].draws.start = first; });
    for (DescentCall& call : calls_) {
      call.out.bypass = beyond_;
      call.draws.state = random;
    }
  }

  void run(const DescentLoops::Map (&loops)[2]) {
    const ListWork work(lists_);
    work.run([&](int64_t i) {
      const ListUnit& u = work.units()[i];
      loops[lists_.is_double(u.tensor)](calls_[u.tensor], u.begin, u.end);
    });
    lists_.finish();
  }

  Tensor run(const Tensor& like, const decltype(DescentLoops::lamb_moments)& loops) {
    const ListWork work(lists_);
    std::vector<double> of_units(3 * work.units().size());
    work.run([&](int64_t i) {
      const ListUnit& u = work.units()[i];
      loops[lists_.is_double(u.tensor)](calls_[u.tensor], u.begin, u.end, &of_units[3 * i]);
    });
    lists_.finish();
    return gather_sums(like, calls_.size(), work, of_units);
  }

  std::vector<DescentCall>& each() { return calls_; }

 private:
  void add(const char* name, const Tensors& list, Lists::Kind kind, Stream DescentCall::* stream, bool changed,
           bool may_be_empty) {
    lists_.add(name, list, kind, changed, may_be_empty,
               [&](size_t t, void* data, Storage s) { calls_[t].*stream = {data, s}; });
  }

  Lists lists_;
  std::vector<DescentCall> calls_;
  bool beyond_;
};

void descent_sgd_(const Tensors& ws, const Tensors& outs, const std::optional<Tensor>& backup, const Integers& at,
                  const Tensors& gs, const Tensors& firsts, const Tensors& momenta, const Tensors& averages,
                  const Tensor& rows, const std::optional<Tensor>& state) {
  Calls calls("descent_sgd_", ws, backup, at, rows, true);
  calls.gradients(gs, firsts);
  calls.states("momenta", momenta, &DescentCall::m, true, true);
  calls.results(outs, averages, state);
  calls.run(descent_loops().sgd);
}

void descent_adam_(const Tensors& ws, const Tensors& outs, const std::optional<Tensor>& backup, const Integers& at,
                   const Tensors& gs, const Tensors& firsts, const Tensors& means, const Tensors& squares,
                   const Tensors& largest, const Tensors& averages, const Tensor& rows, bool padam,
                   const std::optional<Tensor>& state) {
  Calls calls("descent_adam_", ws, backup, at, rows, true);
  calls.gradients(gs, firsts);
  calls.states("means", means, &DescentCall::m, true, false);
  calls.states("squares", squares, &DescentCall::v, true, false);
  calls.states("largest", largest, &DescentCall::x, true, true);
  calls.results(outs, averages, state);
  for (DescentCall& call : calls.each()) call.padam = padam;
  calls.run(descent_loops().adam);
}

Tensor descent_lamb_moments_(const Tensors& ws, const std::optional<Tensor>& backup, const Integers& at,
                             const Tensors& gs, const Tensors& firsts, const Tensors& means, const Tensors& squares,
                             const Tensor& rows) {
  constexpr auto op = "descent_lamb_moments_";
  Calls calls(op, ws, backup, at, rows, false);
  calls.gradients(gs, firsts);
  calls.states("means", means, &DescentCall::m, true, false);
  calls.states("squares", squares, &DescentCall::v, true, false);
  return calls.run(rows, descent_loops().lamb_moments);
}

void descent_lamb_(const Tensors& ws, const Tensors& outs, const std::optional<Tensor>& backup, const Integers& at,
                   const Tensors& means, const Tensors& squares, const Tensors& averages, const Tensor& rows,
                   const Tensor& sums, const std::optional<Tensor>& state) {
  constexpr auto op = "descent_lamb_";
  Calls calls(op, ws, backup, at, rows, true);
  check_numbers(op, "sums", sums, 3 * static_cast<int64_t>(calls.each().size()), rows);
  calls.states("means", means, &DescentCall::m, false, false);
  calls.states("squares", squares, &DescentCall::v, false, false);
  calls.results(outs, averages, state);
  for (size_t t = 0; t < calls.each().size(); ++t) {
    calls.each()[t].rate = lamb_rate(calls.each()[t].row, numbers(sums) + 3 * t);
  }
  calls.run(descent_loops().lamb);
}

}  // namespace
}  // namespace fastflat::cpu

STABLE_TORCH_LIBRARY_IMPL(fastflat, CPU, m) {
  m.impl("descent_rows_", TORCH_BOX(&fastflat::cpu::descent_rows_));
  m.impl("descent_sgd_", TORCH_BOX(&fastflat::cpu::descent_sgd_));
  m.impl("descent_adam_", TORCH_BOX(&fastflat::cpu::descent_adam_));
  m.impl("descent_lamb_moments_", TORCH_BOX(&fastflat::cpu::descent_lamb_moments_));
  m.impl("descent_lamb_", TORCH_BOX(&fastflat::cpu::descent_lamb_));
}

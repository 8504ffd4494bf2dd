// SPDX-License-Identifier: Apache-2.0
// The steps of the optimizers over a list of tensors.
#include "cpu/descent.h"

#include "cpu/multi.h"
#include "math/descent.h"

namespace fastflat::cpu {
namespace {

bool is_double(const Tensor& t) { return t.scalar_type() == ScalarType::Double; }

const double* numbers(const Tensor& t) { return static_cast<const double*>(t.const_data_ptr()); }

Tensor descent_rows_(const Tensor& hyper, const Tensor& group, const Tensor& steps, const Tensor& mix,
                     const std::optional<Tensor>& of_gradients, const std::optional<Tensor>& of_weights, int64_t rule) {
  constexpr auto op = "descent_rows_";
  const int64_t count = group.numel();
  STD_TORCH_CHECK(hyper.dim() == 2 && hyper.size(1) == hyper::columns, "fastflat::", op, ": hyper must have shape [G, ",
                  static_cast<int>(hyper::columns), "]");
  check_numbers(op, "hyper", hyper, hyper.numel());
  check_numbers(op, "steps", steps, count);
  check_numbers(op, "mix", mix, 3);
  STD_TORCH_CHECK(group.scalar_type() == ScalarType::Long && group.is_contiguous(), "fastflat::", op,
                  ": group must be contiguous int64");
  STD_TORCH_CHECK(rule >= rule_sgd && rule <= rule_lamb, "fastflat::", op, ": rule must lie in [0, 4], got ", rule);
  if (rule == rule_lars) {
    STD_TORCH_CHECK(of_gradients && of_weights, "fastflat::", op, ": lars must have the sums of gradients and weights");
    check_numbers(op, "of_gradients", *of_gradients, 3 * count);
    check_numbers(op, "of_weights", *of_weights, 3 * count);
  }
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
    const bool lars = rule == rule_lars;
    fill_row(to + t * row::columns, numbers(hyper) + groups[t] * hyper::columns, step[t], c1, c2, skip,
             lars ? numbers(*of_gradients) + 3 * t : none, lars ? numbers(*of_weights)[3 * t] : 0.0, rule);
  }
  return rows;
}

// The calls of a list, and what their pointers live on.
class Calls {
 public:
  Calls(const char* op, const Tensors& ws, const Tensor& rows) : op_(op), ws_(ws) {
    check_numbers(op, "rows", rows, static_cast<int64_t>(ws.size()) * row::columns);
    calls_.resize(ws.size());
    weights_.reserve(ws.size());
    alive_.reserve(3 * ws.size());
    for (size_t t = 0; t < ws.size(); ++t) {
      weights_.emplace_back(ws[t]);
      calls_[t].row = numbers(rows) + t * row::columns;
      calls_[t].w = calls_[t].source = stream_of(op, "ws", like(t));
    }
  }

  // A list that is read: partners of the weights.
  void read(const char* name, const Tensors& list, Stream DescentCall::*stream, bool may_be_empty) {
    check_lengths(op_, name, list.size(), ws_.size(), may_be_empty);
    for (size_t t = 0; t < list.size(); ++t) {
      check_partner(op_, name, list[t], ws_[t]);
      alive_.push_back(in_layout_of(list[t], like(t)));
      calls_[t].*stream = stream_of(op_, name, alive_.back());
    }
  }

  // A list of states that stay.
  void states(const char* name, const Tensors& list, Stream DescentCall::*stream) {
    for (size_t t = 0; t < list.size() && t < ws_.size(); ++t) check_state(op_, name, list[t], ws_[t]);
    read(name, list, stream, false);
  }

  // Weights before the ascent: of the dtype of ws.
  void sources(const Tensors& list) {
    for (size_t t = 0; t < list.size() && t < ws_.size(); ++t) {
      STD_TORCH_CHECK(list[t].scalar_type() == ws_[t].scalar_type(), "fastflat::", op_,
                      ": sources must have the dtype of ws");
    }
    read("sources", list, &DescentCall::source, true);
  }

  // A list of states that change.
  void change(const char* name, const Tensors& list, Stream DescentCall::*stream, bool may_be_empty) {
    check_lengths(op_, name, list.size(), ws_.size(), may_be_empty);
    for (size_t t = 0; t < list.size(); ++t) {
      check_state(op_, name, list[t], ws_[t]);
      changed_.emplace_back(list[t], like(t));
      calls_[t].*stream = stream_of(op_, name, changed_.back().tensor());
    }
  }

  // Copies of the new weights in 16 bits.
  void outs(const Tensors& list) {
    check_lengths(op_, "outs", list.size(), ws_.size(), true);
    for (size_t t = 0; t < list.size(); ++t) {
      check_same_shape(op_, "outs", list[t], ws_[t]);
      pair_of(op_, ws_[t].scalar_type(), list[t].scalar_type());
      changed_.emplace_back(list[t], like(t));
      calls_[t].out = stream_of(op_, "outs", changed_.back().tensor());
    }
  }

  void draws(const std::optional<Tensor>& state) {
    const int64_t* random = random_state(op_, state);
    if (!random) return;
    const auto starts = random_starts(ws_);
    for (size_t t = 0; t < ws_.size(); ++t) calls_[t].draws = {random, starts[t]};
  }

  // Where sources are other tensors than ws, ws are only written.
  void run(const DescentLoops::Map (&loops)[2], bool weights_are_written_only) {
    const ListWork work(ws_);
    int64_t bytes = 0;
    for (const Tensor& w : ws_) bytes += w.numel() * static_cast<int64_t>(w.element_size());
    for (DescentCall& call : calls_) {
      call.out.bypass = bytes > beyond_caches;
      call.w.bypass = weights_are_written_only && bytes > beyond_caches;
    }
    work.run([&](int64_t i) {
      const ListUnit& u = work.units()[i];
      loops[is_double(ws_[u.tensor])](calls_[u.tensor], u.begin, u.end);
    });
    for (Changed& w : weights_) w.finish();
    for (Changed& c : changed_) c.finish();
  }

  Tensor run(const decltype(DescentLoops::lamb_moments)& loops) {
    const ListWork work(ws_);
    std::vector<double> of_units(3 * work.units().size());
    work.run([&](int64_t i) {
      const ListUnit& u = work.units()[i];
      loops[is_double(ws_[u.tensor])](calls_[u.tensor], u.begin, u.end, &of_units[3 * i]);
    });
    for (Changed& c : changed_) c.finish();
    return gather_sums(ws_, work, of_units);
  }

  std::vector<DescentCall>& each() { return calls_; }

 private:
  const Tensor& like(size_t t) const { return weights_[t].tensor(); }

  const char* op_;
  const Tensors& ws_;
  std::vector<DescentCall> calls_;
  std::vector<Changed> weights_, changed_;
  Tensors alive_;
};

void descent_sgd_(const Tensors& sources, const Tensors& ws, const Tensors& outs, const Tensors& gs,
                  const Tensors& firsts, const Tensors& momenta, const Tensors& averages, const Tensor& rows,
                  const std::optional<Tensor>& state) {
  if (ws.empty()) return;
  Calls calls("descent_sgd_", ws, rows);
  calls.sources(sources);
  calls.outs(outs);
  calls.read("gs", gs, &DescentCall::g, false);
  calls.read("firsts", firsts, &DescentCall::f, true);
  calls.change("momenta", momenta, &DescentCall::m, true);
  calls.change("averages", averages, &DescentCall::a, true);
  calls.draws(state);
  calls.run(descent_loops().sgd, !sources.empty());
}

void descent_adam_(const Tensors& sources, const Tensors& ws, const Tensors& outs, const Tensors& gs,
                   const Tensors& firsts, const Tensors& means, const Tensors& squares, const Tensors& largest,
                   const Tensors& averages, const Tensor& rows, bool padam, const std::optional<Tensor>& state) {
  if (ws.empty()) return;
  Calls calls("descent_adam_", ws, rows);
  calls.sources(sources);
  calls.outs(outs);
  calls.read("gs", gs, &DescentCall::g, false);
  calls.read("firsts", firsts, &DescentCall::f, true);
  calls.change("means", means, &DescentCall::m, false);
  calls.change("squares", squares, &DescentCall::v, false);
  calls.change("largest", largest, &DescentCall::x, true);
  calls.change("averages", averages, &DescentCall::a, true);
  calls.draws(state);
  for (DescentCall& call : calls.each()) call.padam = padam;
  calls.run(descent_loops().adam, !sources.empty());
}

Tensor descent_lamb_moments_(const Tensors& sources, const Tensors& gs, const Tensors& firsts, const Tensors& means,
                             const Tensors& squares, const Tensor& rows) {
  constexpr auto op = "descent_lamb_moments_";
  STD_TORCH_CHECK(!sources.empty(), "fastflat::", op, ": sources must hold a tensor");
  Calls calls(op, sources, rows);
  calls.read("gs", gs, &DescentCall::g, false);
  calls.read("firsts", firsts, &DescentCall::f, true);
  calls.change("means", means, &DescentCall::m, false);
  calls.change("squares", squares, &DescentCall::v, false);
  return calls.run(descent_loops().lamb_moments);
}

void descent_lamb_(const Tensors& sources, const Tensors& ws, const Tensors& outs, const Tensors& means,
                   const Tensors& squares, const Tensors& averages, const Tensor& rows, const Tensor& sums,
                   const std::optional<Tensor>& state) {
  if (ws.empty()) return;
  constexpr auto op = "descent_lamb_";
  Calls calls(op, ws, rows);
  check_numbers(op, "sums", sums, 3 * static_cast<int64_t>(ws.size()));
  calls.sources(sources);
  calls.outs(outs);
  calls.states("means", means, &DescentCall::m);
  calls.states("squares", squares, &DescentCall::v);
  calls.change("averages", averages, &DescentCall::a, true);
  calls.draws(state);
  for (size_t t = 0; t < ws.size(); ++t) {
    calls.each()[t].rate = lamb_rate(calls.each()[t].row, numbers(sums) + 3 * t);
  }
  calls.run(descent_loops().lamb, !sources.empty());
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

// SPDX-License-Identifier: Apache-2.0
// Arguments of the row_tangents family for the glue of every device: one table an op says what each must be. One loop
// over it takes them from the dispatcher's stack and checks them, which is a third of the code of as many typed
// functions; these are the only checks that the ops have.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "core/row_tangents.h"
#include "core/storage.h"

namespace fastflat {

struct RowTangentsArgument {
  enum Kind { tangent, channels_tangent, statistic_tangent, rows, channels, statistic };

  const char* name;
  Kind kind;
  bool optional;
  const void* RowTangentsCall::* field;
};

// The row that an op is about (`like`) fixes dtype, device, R and D; its first tangent K.
struct RowTangentsOp {
  const char* name;
  const char* tangents;  // of which one must be there
  int like, count;
  bool option;  // a last argument
  RowTangentsArgument arguments[9];
};

namespace row_tangents_ops {

using A = RowTangentsArgument;
using C = RowTangentsCall;

inline constexpr RowTangentsOp norm{"row_tangents_norm",
                                    "x, along_weight, along_bias",
                                    1,
                                    6,
                                    true,
                                    {{"x", A::tangent, true, &C::x},
                                     {"normal", A::rows, false, &C::normal},
                                     {"inv", A::statistic, false, &C::of_row},
                                     {"weight", A::channels, true, &C::weight},
                                     {"along_weight", A::channels_tangent, true, &C::along_weight},
                                     {"along_bias", A::channels_tangent, true, &C::along_bias}}};
inline constexpr RowTangentsOp norm_bwd{"row_tangents_norm_bwd",
                                        "g, x, mean, scale, along_weight",
                                        5,
                                        9,
                                        true,
                                        {{"g", A::tangent, true, &C::g},
                                         {"x", A::tangent, true, &C::x},
                                         {"mean", A::statistic_tangent, true, &C::mean},
                                         {"scale", A::statistic_tangent, true, &C::scale},
                                         {"along_weight", A::channels_tangent, true, &C::along_weight},
                                         {"normal", A::rows, false, &C::normal},
                                         {"grad", A::rows, false, &C::grad},
                                         {"inv", A::statistic, false, &C::of_row},
                                         {"weight", A::channels, true, &C::weight}}};
inline constexpr RowTangentsOp softmax{
    "row_tangents_softmax",
    "t",
    1,
    3,
    true,
    {{"t", A::tangent, false, &C::x}, {"p", A::rows, false, &C::normal}, {"scale", A::statistic, true, &C::of_row}}};
inline constexpr RowTangentsOp softmax_bwd{"row_tangents_softmax_bwd",
                                           "g, along",
                                           2,
                                           4,
                                           false,
                                           {{"g", A::tangent, true, &C::g},
                                            {"along", A::tangent, true, &C::x},
                                            {"p", A::rows, false, &C::normal},
                                            {"grad", A::rows, false, &C::grad}}};

}  // namespace row_tangents_ops

class RowTangents {
 public:
  RowTangents(const RowTangentsOp& op, const StableIValue* stack, uint64_t arguments) : op_(op) {
    require(arguments == static_cast<uint64_t>(op.count + op.option), "the schema", "fit the kernel");
    for (int i = 0; i < op.count; ++i) {
      if (op.arguments[i].optional) {
        tensors_[i] = torch::stable::detail::to<std::optional<Tensor>>(stack[i]);
      } else {
        tensors_[i] = torch::stable::detail::to<Tensor>(stack[i]);
      }
    }
    if (op.option) call.option = torch::stable::detail::to<bool>(stack[op.count]);
    const Tensor& rows = like();
    const char* name = op.arguments[op.like].name;
    require(rows.dim() == 2, name, "have two axes [R, D]");
    require(rows.is_contiguous(), name, "be contiguous; call .contiguous()");
    call.storage = storage_of(op.name, name, rows.scalar_type());
    call.R = rows.size(0);
    call.D = rows.size(1);
    for (int i = 0; i < op.count; ++i) {
      if (!tensors_[i]) continue;
      check(op.arguments[i], *tensors_[i]);
      call.*op.arguments[i].field = tensors_[i]->const_data_ptr();
    }
    require(call.K >= 0, op.tangents, "not all be None");
    int64_t numbers = 0;
    const bool fits =
        !__builtin_mul_overflow(call.K, call.R, &numbers) && !__builtin_mul_overflow(numbers, call.D, &numbers);
    require(fits, "K R D", "fit 63 bits");
  }

  const char* name() const { return op_.name; }
  const Tensor& like() const { return *tensors_[op_.like]; }

  // New tensors for the results, and whatever leads to them on the stack.
  void allocate() {
    results_[0] = empty_dense(like(), {call.K, call.R, call.D}, like().scalar_type());
    call.out = results_[0]->mutable_data_ptr();
    if (&op_ != &row_tangents_ops::norm) return;
    for (int i = 1; i < 3; ++i) results_[i] = empty_dense(like(), {call.K, call.R}, compute());
    call.new_mean = results_[1]->mutable_data_ptr();
    call.new_scale = results_[2]->mutable_data_ptr();
  }
  void leave(StableIValue* stack) const {
    for (int i = 0; i < 3 && results_[i]; ++i) stack[i] = torch::stable::detail::from(*results_[i]);
  }

  RowTangentsCall call;

 private:
  ScalarType compute() const { return call.storage == f64 ? ScalarType::Double : ScalarType::Float; }

  __attribute__((noinline)) void require(bool right, const char* name, const char* what, const char* more = "") const {
    STD_TORCH_CHECK(right, "fastflat::", op_.name, ": ", name, " must ", what, more);
  }

  __attribute__((noinline)) void check(const RowTangentsArgument& argument, const Tensor& t) {
    using A = RowTangentsArgument;
    const auto kind = argument.kind;
    const bool moves = kind <= A::statistic_tangent,
               of_statistic = kind == A::statistic_tangent || kind == A::statistic;
    if (moves && call.K < 0 && t.dim() > 0) call.K = t.size(0);
    std::vector<int64_t> sizes;
    if (moves) sizes.push_back(call.K);
    if (kind != A::channels_tangent && kind != A::channels) sizes.push_back(call.R);
    if (!of_statistic) sizes.push_back(call.D);
    const auto shape = t.sizes();
    const std::vector<int64_t> found(shape.begin(), shape.end());
    if (found != sizes) require(false, argument.name, "have shape ", (text(sizes) + ", got " + text(found)).c_str());
    const auto dtype = of_statistic ? compute() : like().scalar_type();
    const bool own = dtype == like().scalar_type();
    const char* const first = op_.arguments[op_.like].name;
    require(t.scalar_type() == dtype, argument.name, own ? "have the dtype of " : "be float32", own ? first : "");
    require(t.is_contiguous(), argument.name, "be contiguous; call .contiguous()");
    require(t.device() == like().device(), argument.name, "be on the device of ", first);
  }

  __attribute__((noinline)) static std::string text(const std::vector<int64_t>& numbers) {
    std::string list = "[";
    for (const int64_t n : numbers) list += (list.size() > 1 ? ", " : "") + std::to_string(n);
    return list + "]";
  }

  const RowTangentsOp& op_;
  std::optional<Tensor> tensors_[9], results_[3];
};

}  // namespace fastflat

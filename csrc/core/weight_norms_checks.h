// SPDX-License-Identifier: Apache-2.0
// Checks of the weight_norms family for the glue of every device. These are the only checks that the ops have.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "core/checks.h"
#include "core/storage.h"
#include "core/weight_norms.h"

namespace fastflat {

// A call on contiguous weights; what it reads beside them stays alive in `kept`.
struct Weights {
  const char* op;
  Tensor w;
  WeightNormsCall call;
  std::vector<Tensor> kept;

  Weights(const char* op_, const Tensor& w_, bool matrix) : op(op_), w(dense(w_, true)) {
    STD_TORCH_CHECK(!matrix || w.dim() == 2, "fastflat::", op, ": w must have shape [O, I]");
    call.storage = storage_of(op, "w", w.scalar_type());
    call.rows = matrix ? w.size(0) : 1;
    call.columns = matrix ? w.size(1) : w.numel();
    call.w = w.const_data_ptr();
  }
  ScalarType compute() const { return compute_type(w.scalar_type()); }

  __attribute__((noinline)) const void* take(const char* name, const Tensor& t, ScalarType dtype, int64_t values) {
    STD_TORCH_CHECK(t.scalar_type() == dtype, "fastflat::", op, ": ", name,
                    dtype == compute() ? " must be float32 (float64 for float64 w)" : " must have the dtype of w");
    STD_TORCH_CHECK(t.numel() == values, "fastflat::", op, ": ", name, " must have ", values, " values, got ",
                    t.numel());
    STD_TORCH_CHECK(t.device() == w.device(), "fastflat::", op, ": ", name, " must be on the device of w");
    kept.push_back(dense(t, true));
    return kept.back().const_data_ptr();
  }
  Tensor result() const { return empty_like(w, w.scalar_type(), true); }
};

}  // namespace fastflat

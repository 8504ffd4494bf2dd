// SPDX-License-Identifier: Apache-2.0
// Checks of the ops over rows of vectors, [K, n], for the glue of every device: the only ones that these ops have.
#pragma once

#include <cstdint>
#include <vector>

#include "core/storage.h"

namespace fastflat {

using Integers = std::vector<int64_t>;

// [K, n] in memory order.
inline void check_rows(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 2, "fastflat::", op, ": ", name, " must have two axes [K, n], got ", t.dim());
  STD_TORCH_CHECK(t.is_contiguous(), "fastflat::", op, ": ", name, " must be contiguous; call .contiguous()");
}

// Vectors in the arithmetic type, and partners of them in it or, beside fp32, in bf16.
struct RowStorages {
  Storage partner, own;

  RowStorages(const char* op, const char* partner_name, const Tensor& partners, const char* name, const Tensor& t)
      : partner(storage_of(op, partner_name, partners.scalar_type())), own(storage_of(op, name, t.scalar_type())) {
    STD_TORCH_CHECK(own == f32 || own == f64, "fastflat::", op, ": ", name, " must be float32 or float64");
    STD_TORCH_CHECK(partner == own || (own == f32 && partner == bf16), "fastflat::", op, ": ", partner_name,
                    " must have the dtype of ", name, ", or bfloat16 beside float32");
  }
};

inline void check_same_length(const char* op, const char* name, const Tensor& t, const char* other, const Tensor& o) {
  STD_TORCH_CHECK(t.size(1) == o.size(1), "fastflat::", op, ": ", name, " must have rows as long as those of ", other,
                  ", ", o.size(1), ", got ", t.size(1));
  STD_TORCH_CHECK(t.device() == o.device(), "fastflat::", op, ": ", name, " must be on the device of ", other);
}

inline RowStorages check_basis(const char* op, const Tensor& q, const Tensor& w) {
  check_rows(op, "q", q);
  check_rows(op, "w", w);
  check_same_length(op, "q", q, "w", w);
  return {op, "q", q, "w", w};
}

inline RowStorages check_subtraction(const char* op, const Tensor& w, const Tensor& q, const Tensor& c) {
  const RowStorages storages = check_basis(op, q, w);
  STD_TORCH_CHECK(c.scalar_type() == ScalarType::Double && c.is_contiguous(), "fastflat::", op,
                  ": c must be contiguous float64");
  STD_TORCH_CHECK(c.dim() == 2 && c.size(0) == q.size(0) && c.size(1) == w.size(0), "fastflat::", op,
                  ": c must have shape [J=", q.size(0), ", K=", w.size(0), "]");
  STD_TORCH_CHECK(c.device() == w.device(), "fastflat::", op, ": c must be on the device of w");
  const char* const first = static_cast<const char*>(w.const_data_ptr());
  const char* const other = static_cast<const char*>(q.const_data_ptr());
  const int64_t size = w.numel() * storage_bytes(storages.own), of_q = q.numel() * storage_bytes(storages.partner);
  STD_TORCH_CHECK(size == 0 || of_q == 0 || first + size <= other || other + of_q <= first, "fastflat::", op,
                  ": w must not share memory with q");
  return storages;
}

inline RowStorages check_forms(const char* op, const Tensor& v, const Tensor& hv, const Integers& starts) {
  check_rows(op, "v", v);
  check_rows(op, "hv", hv);
  check_same_length(op, "v", v, "hv", hv);
  STD_TORCH_CHECK(v.size(0) == hv.size(0), "fastflat::", op, ": v must have as many rows as hv, ", hv.size(0), ", got ",
                  v.size(0));
  STD_TORCH_CHECK(!starts.empty(), "fastflat::", op, ": starts must hold T + 1 places, got none");
  for (size_t t = 0; t < starts.size(); ++t) {
    STD_TORCH_CHECK(starts[t] >= (t ? starts[t - 1] : 0) && starts[t] <= v.size(1), "fastflat::", op,
                    ": starts must not decrease and lie in [0, ", v.size(1), "], got ", starts[t], " at ", t);
  }
  return {op, "v", v, "hv", hv};
}

// Elements of the result.
inline int64_t check_signs(const char* op, const Tensor& state, int64_t k, int64_t n) {
  STD_TORCH_CHECK(state.scalar_type() == ScalarType::Long && state.is_contiguous() && state.numel() == 2,
                  "fastflat::", op, ": state must be a contiguous int64 tensor of 2 values, seed and offset");
  STD_TORCH_CHECK(k >= 0 && n >= 0, "fastflat::", op, ": k and n must not be negative, got ", k, " and ", n);
  int64_t elements = 0;
  STD_TORCH_CHECK(!__builtin_mul_overflow(k, n, &elements), "fastflat::", op, ": k n must fit 63 bits");
  return elements;
}

}  // namespace fastflat

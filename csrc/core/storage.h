// SPDX-License-Identifier: Apache-2.0
// From dtypes to the storage types and pairs of core/pairs.h.
#pragma once

#include "core/pairs.h"
#include "core/tensor.h"

namespace fastflat {

inline Storage storage_of(const char* op, const char* name, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return f32;
    case ScalarType::BFloat16:
      return bf16;
    case ScalarType::Half:
      return f16;
    case ScalarType::Double:
      return f64;
    default:
      STD_TORCH_CHECK(false, "fastflat::", op, ": ", name, " must be float32, bfloat16, float16 or float64");
  }
}

inline Pair pair_of(const char* op, ScalarType x, ScalarType y) {
  const Storage a = storage_of(op, "x", x), b = storage_of(op, "the result", y);
  if (a == b) return static_cast<Pair>(a);
  STD_TORCH_CHECK(a == f32 && b != f64, "fastflat::", op,
                  ": the result must have the dtype of x, or 16 bits for float32 x");
  return b == bf16 ? f32_bf16 : f32_f16;
}

}  // namespace fastflat

// SPDX-License-Identifier: Apache-2.0
// Operands that broadcast: a value for each element of x where they have its axes, or one along axes of size 1.
#pragma once

#include "core/checks.h"

namespace fastflat {

// t, in the compute type, with a value for each element of x in its layout: itself, or one copy.
inline Tensor expanded(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  STD_TORCH_CHECK(t.scalar_type() == compute_type(x.scalar_type()), "fastflat::", op, ": ", name,
                  " must be float32 (float64 for float64 x)");
  STD_TORCH_CHECK(t.device() == x.device(), "fastflat::", op, ": ", name, " must be on the device of x");
  bool same = t.dim() == x.dim(), fits = same;
  for (int64_t d = 0; fits && d < x.dim(); ++d) {
    same &= t.size(d) == x.size(d);
    fits = t.size(d) == x.size(d) || t.size(d) == 1;
  }
  STD_TORCH_CHECK(fits, "fastflat::", op, ": ", name, " must have the axes of x, each of its size or of size 1");
  if (same) return in_layout_of(t, x);
  Tensor full = empty_like(x, t.scalar_type());
  torch::stable::copy_(full, t);
  return full;
}

}  // namespace fastflat

// SPDX-License-Identifier: Apache-2.0
// Checks of the row_tangents family for the glue of every device: the only ones that these ops have.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>

#include "core/storage.h"

namespace fastflat {

using OptionalTensor = std::optional<Tensor>;

// K tangents of rows [R, D]. The first tensor fixes dtype, device, R and D, the first tangent K. Out of line: a check
// is much code for a call that never fails.
class RowTangents {
 public:
  __attribute__((noinline)) RowTangents(const char* op, const char* name, const Tensor& rows)
      : op_(op), first_(name), like_(rows) {
    require(rows.dim() == 2, name, "have two axes [R, D]");
    require(rows.is_contiguous(), name, "be contiguous; call .contiguous()");
    storage = storage_of(op, name, rows.scalar_type());
    R = rows.size(0);
    D = rows.size(1);
  }

  void tangent(const char* name, const OptionalTensor& t) { check_tangent(name, t, own(), true, true); }
  void channels_tangent(const char* name, const OptionalTensor& t) { check_tangent(name, t, own(), false, true); }
  void statistic_tangent(const char* name, const OptionalTensor& t) { check_tangent(name, t, compute(), true, false); }
  void rows(const char* name, const Tensor& t) const {
    const int64_t sizes[] = {R, D};
    check(name, t, sizes, 2, own());
  }
  void channels(const char* name, const OptionalTensor& t) const {
    if (t) check(name, *t, &D, 1, own());
  }
  void statistic(const char* name, const OptionalTensor& t) const {
    if (t) check(name, *t, &R, 1, compute());
  }
  // Ends the list of tangents, of which one must be there.
  __attribute__((noinline)) void some(const char* names) const {
    require(K >= 0, names, "not all be None");
    int64_t numbers = 0;
    const bool fits = !__builtin_mul_overflow(K, R, &numbers) && !__builtin_mul_overflow(numbers, D, &numbers);
    require(fits, "K R D", "fit 63 bits");
  }

  ScalarType own() const { return like_.scalar_type(); }
  ScalarType compute() const { return storage == f64 ? ScalarType::Double : ScalarType::Float; }

  int64_t K = -1, R = 0, D = 0;
  Storage storage = f32;

 private:
  __attribute__((noinline)) void require(bool right, const char* name, const char* what, const char* more = "") const {
    STD_TORCH_CHECK(right, "fastflat::", op_, ": ", name, " must ", what, more);
  }

  __attribute__((noinline)) void check_tangent(const char* name, const OptionalTensor& t, ScalarType dtype,
                                               bool of_rows, bool of_channels) {
    if (!t) return;
    if (K < 0 && t->dim() > 0) K = t->size(0);
    const int64_t sizes[] = {K, of_rows ? R : D, D};
    check(name, *t, sizes, 1 + of_rows + of_channels, dtype);
  }

  // `sizes`: of `dim` axes.
  __attribute__((noinline, noclone)) void check(const char* name, const Tensor& t, const int64_t* sizes, int64_t dim,
                                                ScalarType dtype) const {
    const auto shape = t.sizes();
    if (!std::equal(sizes, sizes + dim, shape.begin(), shape.end())) {
      const std::string wanted = text(sizes, sizes + dim), got = text(shape.begin(), shape.end());
      STD_TORCH_CHECK(false, "fastflat::", op_, ": ", name, " must have shape [", wanted, "], got [", got, "]");
    }
    const bool own_dtype = dtype == own();
    require(t.scalar_type() == dtype, name, own_dtype ? "have the dtype of " : "be float32", own_dtype ? first_ : "");
    require(t.is_contiguous(), name, "be contiguous; call .contiguous()");
    require(t.device() == like_.device(), name, "be on the device of ", first_);
  }

  template <class Place>
  __attribute__((noinline)) static std::string text(Place number, Place end) {
    std::string list;
    for (const char* between = ""; number != end; ++number, between = ", ") list += between + std::to_string(*number);
    return list;
  }

  const char *op_, *first_;
  const Tensor& like_;
};

__attribute__((noinline)) inline RowTangents check_norm(const char* op, const OptionalTensor& x, const Tensor& normal,
                                                        const Tensor& inv, const OptionalTensor& weight,
                                                        const OptionalTensor& along_weight,
                                                        const OptionalTensor& along_bias) {
  RowTangents sizes(op, "normal", normal);
  sizes.tangent("x", x);
  sizes.channels_tangent("along_weight", along_weight);
  sizes.channels_tangent("along_bias", along_bias);
  sizes.statistic("inv", inv);
  sizes.channels("weight", weight);
  sizes.some("x, along_weight, along_bias");
  return sizes;
}

__attribute__((noinline)) inline RowTangents check_norm_bwd(const char* op, const OptionalTensor& g,
                                                            const OptionalTensor& x, const OptionalTensor& mean,
                                                            const OptionalTensor& scale,
                                                            const OptionalTensor& along_weight, const Tensor& normal,
                                                            const Tensor& grad, const Tensor& inv,
                                                            const OptionalTensor& weight) {
  RowTangents sizes(op, "normal", normal);
  sizes.tangent("g", g);
  sizes.tangent("x", x);
  sizes.statistic_tangent("mean", mean);
  sizes.statistic_tangent("scale", scale);
  sizes.channels_tangent("along_weight", along_weight);
  sizes.rows("grad", grad);
  sizes.statistic("inv", inv);
  sizes.channels("weight", weight);
  sizes.some("g, x, mean, scale, along_weight");
  return sizes;
}

__attribute__((noinline)) inline RowTangents check_softmax(const char* op, const Tensor& t, const Tensor& p,
                                                           const OptionalTensor& scale) {
  RowTangents sizes(op, "p", p);
  sizes.tangent("t", t);
  sizes.statistic("scale", scale);
  sizes.some("t");
  return sizes;
}

__attribute__((noinline)) inline RowTangents check_softmax_bwd(const char* op, const OptionalTensor& g,
                                                               const OptionalTensor& along, const Tensor& p,
                                                               const Tensor& grad) {
  RowTangents sizes(op, "p", p);
  sizes.tangent("g", g);
  sizes.tangent("along", along);
  sizes.rows("grad", grad);
  sizes.some("g, along");
  return sizes;
}

}  // namespace fastflat

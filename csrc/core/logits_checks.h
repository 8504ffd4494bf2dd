// SPDX-License-Identifier: Apache-2.0
// The ops of the logits family for the glue of every device: checks, results, and a call for Device::run(). These are
// the only checks that the ops have.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <tuple>

#include "core/checks.h"
#include "core/logits.h"
#include "core/storage.h"

namespace fastflat {

// Device::run(op, name, like, call) computes.
template <class Device>
struct LogitsOps {
  using Maybe = std::optional<Tensor>;
  using Sizes = std::initializer_list<int64_t>;

  __attribute__((noinline)) static void require(bool right, const char* op, const char* name, const char* what) {
    STD_TORCH_CHECK(right, "fastflat::", op, ": ", name, " must ", what);
  }

  __attribute__((noinline)) static void check(const char* op, const char* name, const Tensor& t, const Tensor& like,
                                              ScalarType dtype, Sizes sizes, const char* what) {
    bool same = t.dim() == static_cast<int64_t>(sizes.size());
    int64_t d = 0;
    for (const int64_t size : sizes) same = same && t.size(d++) == size;
    require(same, op, name, what);
    require(t.scalar_type() == dtype, op, name,
            dtype == ScalarType::Long                   ? "be int64"
            : dtype == compute_type(like.scalar_type()) ? "be float32 (float64 for float64 logits)"
                                                        : "have the dtype of the logits");
    require(t.device() == like.device(), op, name, "be on the device of the logits");
  }

  // What an op reads of a class, a row or a step; it stays alive in `kept`.
  struct Rows {
    const char* op;
    Tensor z;
    LogitsCall call;
    std::optional<Tensor> kept[8];
    int count = 0;

    Rows(const char* op_, const char* name, const Tensor& z_, int64_t dim) : op(op_), z(z_) {
      require(z_.dim() == dim, op, name, dim == 2 ? "have shape [N, C]" : "have shape [K, B, C]");
      z = dense(z_, true);
      call.storage = storage_of(op, name, z.scalar_type());
      call.R = z.size(dim - 2);
      call.C = z.size(dim - 1);
      call.K = dim == 3 ? z.size(0) : 1;
      call.z = z.const_data_ptr();
    }
    ScalarType compute() const { return compute_type(z.scalar_type()); }

    const void* take(const char* name, const Maybe& t, ScalarType dtype, Sizes sizes, const char* what) {
      if (!t) return nullptr;
      check(op, name, *t, z, dtype, sizes, what);
      kept[count] = dense(*t, true);
      return kept[count++]->const_data_ptr();
    }
    void take_labels(const Tensor& y) {
      call.y = static_cast<const int64_t*>(take("y", y, ScalarType::Long, {call.R}, "have shape [N]"));
    }
    void take_classes(const Maybe& mult, const Maybe& add, const Maybe& margin) {
      call.mult = take("mult", mult, compute(), {call.C}, "have shape [C]");
      call.add = take("add", add, compute(), {call.C}, "have shape [C]");
      call.margin = take("margin", margin, compute(), {call.C}, "have shape [C]");
    }
    Tensor of_rows(const std::vector<int64_t>& sizes) const { return empty_dense(z, sizes, compute()); }
    void run(LogitsOp which) { Device::run(which, op, z, call); }
  };

  static std::tuple<Tensor, Tensor> divergence(const Tensor& z0, const Tensor& z, bool js) {
    Rows rows("logits_divergence", "z", z, 3);
    LogitsCall& call = rows.call;
    call.js = js;
    call.z0 = rows.take("z0", z0, z.scalar_type(), {call.R, call.C}, "have shape [B, C] for z of [K, B, C]");
    Tensor divergence = rows.of_rows({call.K + js, call.R}), norm = rows.of_rows({call.K + 1, call.R, 2});
    call.divergence = divergence.mutable_data_ptr();
    call.norm = norm.mutable_data_ptr();
    rows.run(logits_divergence);
    return {divergence, norm};
  }

  static std::tuple<Tensor, Tensor> divergence_bwd(const Tensor& g, const Tensor& z0, const Tensor& z,
                                                   const Tensor& divergence, const Tensor& norm, bool js) {
    Rows rows("logits_divergence_bwd", "z", z, 3);
    LogitsCall& call = rows.call;
    const ScalarType compute = rows.compute();
    call.js = js;
    call.z0 = rows.take("z0", z0, z.scalar_type(), {call.R, call.C}, "have shape [B, C] for z of [K, B, C]");
    call.g = rows.take("g", g, compute, {call.R}, "have shape [B]");
    call.divergence = const_cast<void*>(
        rows.take("divergence", divergence, compute, {call.K + js, call.R}, "have shape [K, B], of js [K+1, B]"));
    call.norm = const_cast<void*>(rows.take("norm", norm, compute, {call.K + 1, call.R, 2}, "have shape [K+1, B, 2]"));
    Tensor gz0 = empty_dense(z, {call.R, call.C}, z.scalar_type());
    Tensor gz = empty_dense(z, {call.K, call.R, call.C}, z.scalar_type());
    call.out0 = gz0.mutable_data_ptr();
    call.out = gz.mutable_data_ptr();
    rows.run(logits_divergence_bwd);
    return {gz0, gz};
  }

  static std::tuple<Tensor, Tensor, Tensor> loss(const Tensor& z, const Tensor& y, const Maybe& mult, const Maybe& add,
                                                 const Maybe& margin, const Maybe& class_weight, double s,
                                                 int64_t ignore_index) {
    Rows rows("logits_loss", "z", z, 2);
    LogitsCall& call = rows.call;
    rows.take_labels(y);
    rows.take_classes(mult, add, margin);
    call.weight = rows.take("class_weight", class_weight, rows.compute(), {call.C}, "have shape [C]");
    call.s = s;
    call.ignore_index = ignore_index;
    Tensor loss = rows.of_rows({call.R}), weight = rows.of_rows({call.R}), norm = rows.of_rows({call.R, 2});
    call.of_row = loss.mutable_data_ptr();
    call.out = weight.mutable_data_ptr();
    call.norm = norm.mutable_data_ptr();
    rows.run(logits_loss);
    return {loss, weight, norm};
  }

  static Tensor loss_bwd(const Tensor& g, const Tensor& z, const Tensor& y, const Maybe& mult, const Maybe& add,
                         const Maybe& margin, const Tensor& norm, double s) {
    Rows rows("logits_loss_bwd", "z", z, 2);
    LogitsCall& call = rows.call;
    rows.take_labels(y);
    rows.take_classes(mult, add, margin);
    call.g = rows.take("g", g, rows.compute(), {call.R}, "have shape [N]");
    call.norm = const_cast<void*>(rows.take("norm", norm, rows.compute(), {call.R, 2}, "have shape [N, 2]"));
    call.s = s;
    Tensor gz = empty_dense(z, {call.R, call.C}, z.scalar_type());
    call.out = gz.mutable_data_ptr();
    rows.run(logits_loss_bwd);
    return gz;
  }

  static std::tuple<Tensor, Tensor> stats(const Tensor& z, const Tensor& y, int64_t ignore_index) {
    Rows rows("logits_stats", "z", z, 2);
    LogitsCall& call = rows.call;
    rows.take_labels(y);
    call.ignore_index = ignore_index;
    Tensor stats = rows.of_rows({4, call.R}), norm = rows.of_rows({call.R, 2});
    call.of_row = stats.mutable_data_ptr();
    call.norm = norm.mutable_data_ptr();
    rows.run(logits_stats);
    return {stats, norm};
  }

  static Tensor scan(const Tensor& a, const Tensor& b, const Tensor& y, const Tensor& t, int64_t ignore_index) {
    Rows rows("logits_scan", "b", b, 2);
    LogitsCall& call = rows.call;
    rows.take_labels(y);
    call.z0 = rows.take("a", a, b.scalar_type(), {call.R, call.C}, "have the shape of b");
    require(t.dim() == 1, rows.op, "t", "have shape [K]");
    call.K = t.size(0);
    call.t = rows.take("t", t, rows.compute(), {call.K}, "have shape [K]");
    call.ignore_index = ignore_index;
    Tensor loss = rows.of_rows({call.K});
    call.of_row = loss.mutable_data_ptr();
    rows.run(logits_scan);
    return loss;
  }
};

}  // namespace fastflat

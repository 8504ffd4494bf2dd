// SPDX-License-Identifier: Apache-2.0
// The ops of the inputs family for the glue of every device: checks, results, and a call for Device::run(). These are
// the only checks that the ops have.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>

#include "core/checks.h"
#include "core/inputs.h"
#include "core/storage.h"

namespace fastflat {

// Device::run(op, like, call) computes, for each kind of call that the device has.
template <class Device>
struct InputsOps {
  __attribute__((noinline)) static void require(bool right, const char* op, const char* name, const char* what) {
    STD_TORCH_CHECK(right, "fastflat::", op, ": ", name, " must ", what);
  }

  // The batch, in order, and its sizes in the call.
  template <class Call>
  static Tensor batch(const char* op, const char* name, const Tensor& x, Call& call) {
    require(x.dim() > 0, op, name, "have a batch axis");
    const Tensor data = dense(x, true);
    call.storage = storage_of(op, name, data.scalar_type());
    call.samples = data.size(0);
    call.length = call.samples ? data.numel() / call.samples : 0;
    return data;
  }

  static std::tuple<Tensor, Tensor> noise(const Tensor& x_, const Tensor& state_, int64_t K, int64_t law, double most,
                                          double keep) {
    constexpr auto op = "inputs_noise";
    NoiseCall call;
    const Tensor x = batch(op, "x", x_, call);
    require(state_.scalar_type() == ScalarType::Long && state_.dim() == 1 && state_.numel() == 2, op, "state",
            "be an int64 tensor of 2 values");
    require(state_.device() == x.device(), op, "state", "be on the device of x");
    require(K >= 0, op, "K", "be non-negative");
    require(law >= 0 && law < 3, op, "law", "be 0, 1 or 2");
    const Tensor state = dense(state_, true);
    std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
    sizes.insert(sizes.begin(), K);
    Tensor noisy = empty_dense(x, sizes, x.scalar_type());
    Tensor sigma = empty_dense(x, {K, call.samples}, ScalarType::Float);
    call.K = K;
    call.law = law;
    call.most = static_cast<float>(most);
    call.keep = static_cast<float>(keep);
    call.x = x.const_data_ptr();
    call.state = static_cast<const int64_t*>(state.const_data_ptr());
    call.noisy = noisy.mutable_data_ptr();
    call.sigma = static_cast<float*>(sigma.mutable_data_ptr());
    Device::run(op, x, call);
    return {noisy, sigma};
  }

  static Tensor pgd_step(const Tensor& xa_, const Tensor& x0_, const Tensor& g_, const std::optional<Tensor>& active_,
                         double step, double eps, int64_t norm, double low, double high) {
    constexpr auto op = "inputs_pgd_step";
    StepCall call;
    const Tensor xa = batch(op, "xa", xa_, call);
    const auto like_xa = [&](const char* name, const Tensor& t) {
      check_same_shape(op, name, t, xa);
      require(t.scalar_type() == xa.scalar_type(), op, name, "have the dtype of xa");
      return dense(t, true);
    };
    const Tensor x0 = like_xa("x0", x0_), g = like_xa("g", g_);
    std::optional<Tensor> active;
    if (active_) {
      require(active_->scalar_type() == ScalarType::Bool && active_->dim() == 1 && active_->numel() == call.samples, op,
              "active", "be a bool tensor of shape [B]");
      require(active_->device() == xa.device(), op, "active", "be on the device of xa");
      active = dense(*active_, true);
      call.active = static_cast<const bool*>(active->const_data_ptr());
    }
    require(norm == 0 || norm == 1, op, "norm", "be 0 or 1");
    Tensor out = empty_like(xa, xa.scalar_type(), true);
    call.norm = norm;
    call.step = step;
    call.eps = eps;
    call.low = low;
    call.high = high;
    call.xa = xa.const_data_ptr();
    call.x0 = x0.const_data_ptr();
    call.g = g.const_data_ptr();
    call.out = out.mutable_data_ptr();
    Device::run(op, xa, call);
    return out;
  }
};

}  // namespace fastflat

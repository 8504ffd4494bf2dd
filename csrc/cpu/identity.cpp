// SPDX-License-Identifier: Apache-2.0
#include "cpu/identity.h"

#include "core/tensor.h"

namespace fastflat::cpu {
namespace {

// Elements that make a thread worth waking.
constexpr int64_t grain = 32768;

Tensor identity(const Tensor& x_) {
  const Tensor x = dense(x_, false);
  Tensor y = empty_like(x, x.scalar_type());
  const int64_t width = x.element_size();
  const void* from = x.const_data_ptr();
  void* to = y.mutable_data_ptr();
  torch::stable::parallel_for(0, x.numel(), grain,
                              [&](int64_t begin, int64_t end) { identity_loops().copy(from, to, width, begin, end); });
  return y;
}

}  // namespace
}  // namespace fastflat::cpu

STABLE_TORCH_LIBRARY_IMPL(fastflat, CPU, m) { m.impl("identity", TORCH_BOX(&fastflat::cpu::identity)); }

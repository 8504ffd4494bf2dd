// SPDX-License-Identifier: Apache-2.0
// What every op's glue does around its launches: device guard, current stream, alignment, launch check.
#pragma once

#include <stdexcept>
#include <string>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "core/tensor.h"
#include "cuda/types.h"

namespace fastflat::cuda {

// The device of x is current for as long as this lives; `stream` is torch's current stream there.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& x) : guard_(x.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  }

  StreamHandle stream = nullptr;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

// t itself where its storage starts on 16 bytes, as kernels need it, else one copy in the same layout.
inline Tensor aligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 ? t : torch::stable::clone(t);
}

inline void check_launch(const char* op, ErrorCode error) {
  if (error == 0) return;
  char* message = nullptr;
  torch_c10_cuda_check_msg(error, __FILE__, op, __LINE__, true, &message);
  const std::string text = std::string("fastflat::") + op + ": " + (message ? message : "kernel launch failed");
  if (message) torch_c10_cuda_free_error_msg(message);
  throw std::runtime_error(text);
}

}  // namespace fastflat::cuda

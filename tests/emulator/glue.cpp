// SPDX-License-Identifier: Apache-2.0
// Stands in for the five functions of a CUDA torch that csrc/cuda/*.cpp call, so that a CPU-only torch runs that glue
// with CPU tensors over the emulated kernels. Linked with -Bsymbolic: these are found before those of libtorch.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#include "cuda_emulator.h"

namespace {
int guards = 0;
}

#define EXPORT extern "C" __attribute__((visibility("default")))

// How many device guards live: every one that was created must be gone when an op returns.
EXPORT int fastflat_test_guards() { return guards; }

// Whether the last launch got torch's current stream, asked for while a device guard lived.
EXPORT int fastflat_test_on_current_stream() { return fastflat::emulator::control.stream == &guards; }

EXPORT int32_t aoti_torch_create_device_guard(int32_t, void** guard) {
  *guard = &guards;
  ++guards;
  return 0;
}

EXPORT int32_t aoti_torch_delete_device_guard(void*) {
  --guards;
  return 0;
}

EXPORT int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = guards > 0 ? &guards : nullptr;
  return 0;
}

EXPORT int32_t torch_c10_cuda_check_msg(int32_t error, const char*, const char*, uint32_t, bool, char** message) {
  const std::string text = "cudaError_t " + std::to_string(error);
  *message = static_cast<char*>(std::malloc(text.size() + 1));
  std::memcpy(*message, text.c_str(), text.size() + 1);
  return 0;
}

EXPORT void torch_c10_cuda_free_error_msg(char* message) { std::free(message); }

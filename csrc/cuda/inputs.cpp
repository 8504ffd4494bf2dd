// SPDX-License-Identifier: Apache-2.0
// Noise of a batch of inputs. Attack steps are left to the fallback.
#include "cuda/inputs.h"

#include "core/inputs_checks.h"
#include "cuda/device.h"

namespace fastflat::cuda {
namespace {

struct Inputs {
  static void run(const char* op, const Tensor& like, const NoiseCall& call) {
    const OnDevice device(like);
    check_launch(op, launch_inputs_noise(call, device.stream));
  }
};

}  // namespace
}  // namespace fastflat::cuda

STABLE_TORCH_LIBRARY_IMPL(fastflat, CUDA, m) {
  m.impl("inputs_noise", TORCH_BOX(&fastflat::InputsOps<fastflat::cuda::Inputs>::noise));
}

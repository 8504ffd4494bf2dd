// SPDX-License-Identifier: Apache-2.0
// Noise and attack steps of a batch of inputs.
#include "cpu/inputs.h"

#include <algorithm>

#include "core/inputs_checks.h"

namespace fastflat::cpu {
namespace {

// Elements that make a thread worth waking.
constexpr int64_t grain = 16384;

template <class Work>
void share(int64_t count, int64_t least, const Work& work) {
  if (count <= least) {
    if (count) work(0, count);
  } else {
    torch::stable::parallel_for(0, count, least, work);
  }
}

const InputsLoops& loops(Storage storage) { return storage == f64 ? inputs_double : inputs_float(); }

struct Inputs {
  static void run(const char*, const Tensor&, const NoiseCall& call) {
    loops(call.storage).strengths(call);
    const int64_t n = call.samples * call.length;
    if (n == 0 || call.K == 0) return;
    const auto loop = loops(call.storage).noise;
    // In units of 8 elements, which share a draw.
    share((n + 7) / 8, std::max<int64_t>(64, grain / 8 / call.K),
          [&](int64_t begin, int64_t end) { loop(call, 8 * begin, std::min(8 * end, n)); });
  }

  static void run(const char*, const Tensor&, const StepCall& call) {
    const int64_t n = call.samples * call.length;
    if (n == 0) return;
    if (call.norm == 0) {
      const auto loop = loops(call.storage).sign_step;
      return share(n, grain, [&](int64_t begin, int64_t end) { loop(call, begin, end); });
    }
    const auto loop = loops(call.storage).norm_step;
    share(call.samples, std::max<int64_t>(1, grain / call.length),
          [&](int64_t begin, int64_t end) { loop(call, begin, end); });
  }
};

}  // namespace
}  // namespace fastflat::cpu

STABLE_TORCH_LIBRARY_IMPL(fastflat, CPU, m) {
  using Ops = fastflat::InputsOps<fastflat::cpu::Inputs>;
  m.impl("inputs_noise", TORCH_BOX(&Ops::noise));
  m.impl("inputs_pgd_step", TORCH_BOX(&Ops::pgd_step));
}

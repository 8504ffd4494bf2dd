// SPDX-License-Identifier: Apache-2.0
// Divergences, losses and statistics of rows of logits.
#include "cpu/logits.h"

#include <memory>
#include <vector>

#include "core/logits_checks.h"

namespace fastflat::cpu {
namespace {

// Logits that make a thread worth waking, and parts of a scan at most: each has sums of its own.
constexpr int64_t grain = 32768;
constexpr int64_t most_parts = 256;

struct Logits {
  static void run(LogitsOp which, const char*, const Tensor&, const LogitsCall& call) {
    const bool wide = call.storage == f64;
    const auto loop = (wide ? logits_double : logits_float()).of[which];
    const int64_t rows = logits_at_once(call.C), tiles = (call.R + rows - 1) / rows;
    const int64_t bytes = logits_buffers * rows * std::max<int64_t>(call.C, 1) * (wide ? 8 : 4);
    // Threads share out parts of some tiles; what a part is follows from the shape alone.
    const int64_t tiles_of_part = which == logits_scan ? (tiles + most_parts - 1) / most_parts : 1;
    const int64_t parts = tiles ? (tiles + tiles_of_part - 1) / tiles_of_part : 0;
    const int64_t sums = which == logits_scan ? call.K + 1 : 0;
    std::vector<double> of_parts(parts * sums, 0.0);
    const auto work = [&](int64_t begin, int64_t end) {
      const std::unique_ptr<char[]> memory(new char[bytes + 64]);
      void* const scratch = memory.get() + (-reinterpret_cast<intptr_t>(memory.get()) & 63);
      for (int64_t part = begin; part < end; ++part) {
        const int64_t first = part * tiles_of_part * rows;
        loop(call, first, std::min(call.R, first + tiles_of_part * rows), scratch, of_parts.data() + part * sums);
      }
    };
    const int64_t of_part = tiles_of_part * rows * std::max<int64_t>(call.C, 1) * (call.K + 1);
    const int64_t parts_of_grain = std::max<int64_t>(1, grain / std::max<int64_t>(of_part, 1));
    if (parts <= parts_of_grain) {
      if (parts) work(0, parts);
    } else {
      torch::stable::parallel_for(0, parts, parts_of_grain, work);
    }
    if (which != logits_scan) return;
    for (int64_t k = 0; k < call.K; ++k) {
      double loss = 0.0, count = 0.0;
      for (int64_t part = 0; part < parts; ++part) {
        loss += of_parts[part * sums + k];
        count += of_parts[part * sums + call.K];
      }
      if (wide) {
        static_cast<double*>(call.of_row)[k] = loss / count;
      } else {
        static_cast<float*>(call.of_row)[k] = static_cast<float>(loss / count);
      }
    }
  }
};

}  // namespace
}  // namespace fastflat::cpu

STABLE_TORCH_LIBRARY_IMPL(fastflat, CPU, m) {
  using Ops = fastflat::LogitsOps<fastflat::cpu::Logits>;
  m.impl("logits_divergence", TORCH_BOX(&Ops::divergence));
  m.impl("logits_divergence_bwd", TORCH_BOX(&Ops::divergence_bwd));
  m.impl("logits_loss", TORCH_BOX(&Ops::loss));
  m.impl("logits_loss_bwd", TORCH_BOX(&Ops::loss_bwd));
  m.impl("logits_stats", TORCH_BOX(&Ops::stats));
  m.impl("logits_scan", TORCH_BOX(&Ops::scan));
}

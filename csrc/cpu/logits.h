// SPDX-License-Identifier: Apache-2.0
// What the glue (logits.cpp) and the loops (logits_loops.cpp) agree on.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/logits.h"
#include "cpu/isa.h"

namespace fastflat::cpu {

// Rows that are walked at once, by the shape alone: maps run over all of them, and they stay in the caches.
inline int64_t logits_at_once(int64_t C) { return std::max<int64_t>(1, 1024 / std::max<int64_t>(C, 1)); }

// Parts of a tile's size that a loop needs beside its tensors.
inline constexpr int64_t logits_buffers = 8;

struct LogitsLoops {
  // Rows [begin, end); a scan leaves its K sums of losses, and then the number of rows they are of, in `sums`.
  using Loop = void (*)(const LogitsCall&, int64_t begin, int64_t end, void* scratch, double* sums);
  Loop of[logits_ops];
};

// Double has one instruction set, which every processor has.
extern const LogitsLoops logits_double;
#if defined(__x86_64__) && defined(__GNUC__)
extern const LogitsLoops logits_baseline, logits_avx2, logits_avx512;
inline const LogitsLoops& logits_float() {
  const LogitsLoops* const tables[] = {&logits_baseline, &logits_avx2, &logits_avx512};
  return *tables[static_cast<int>(isa())];
}
#else
extern const LogitsLoops logits_baseline;
inline const LogitsLoops& logits_float() { return logits_baseline; }
#endif

}  // namespace fastflat::cpu

// SPDX-License-Identifier: Apache-2.0
// What the glue (compressors.cpp) and the loops (compressors_loops.cpp) agree on.
#pragma once

#include <cstdint>
#include <vector>

#include "core/compressors.h"
#include "cpu/isa.h"

namespace fastflat::cpu {

// Parts of |p| that are counted: its leading 11 bits without the sign, then the 11 behind them.
inline constexpr int top_bins = 2048;

struct CompressorLoops {
  // Over elements [begin, end): of one bucket; of any, begin a multiple of 8; the same.
  CompressorSums (*sums)(const CompressorCall&, int64_t begin, int64_t end);
  void (*encode)(const CompressorCall&, int64_t begin, int64_t end);
  void (*decode)(const CompressorCall&, int64_t begin, int64_t end);
  // Adds to counts[top_bins] and leaves p in error; with lead >= 0 counts the second parts of those that begin so.
  void (*count)(const TopCall&, int64_t begin, int64_t end, int lead, int64_t* counts);
  // The elements from the least of a part on: with lead < 0 a leading one, else one behind `lead`.
  void (*collect)(const TopCall&, int64_t begin, int64_t end, int lead, int part, std::vector<Candidate>& found);
  // Values, indices and what is left of the k chosen.
  void (*take)(const TopCall&, const Candidate* chosen, int64_t k);
};

// Double has one instruction set, which every processor has; the generator of the draws gains nothing by the widest.
extern const CompressorLoops compressors_double;
#if defined(__x86_64__) && defined(__GNUC__)
extern const CompressorLoops compressors_baseline, compressors_avx2;
inline const CompressorLoops& compressors_float() {
  return isa() == Isa::baseline ? compressors_baseline : compressors_avx2;
}
#else
extern const CompressorLoops compressors_baseline;
inline const CompressorLoops& compressors_float() { return compressors_baseline; }
#endif

}  // namespace fastflat::cpu

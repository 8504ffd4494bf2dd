// SPDX-License-Identifier: Apache-2.0
// What the glue (inputs.cpp) and the loops (inputs_loops.cpp) agree on.
#pragma once

#include <cstdint>

#include "core/inputs.h"
#include "cpu/isa.h"

namespace fastflat::cpu {

struct InputsLoops {
  void (*strengths)(const NoiseCall&);
  // Copies of the elements [begin, end), begin a multiple of 8, where sigma is there.
  void (*noise)(const NoiseCall&, int64_t begin, int64_t end);
  void (*sign_step)(const StepCall&, int64_t begin, int64_t end);  // elements
  void (*norm_step)(const StepCall&, int64_t begin, int64_t end);  // samples
};

// Double has one instruction set, which every processor has; the generator of the draws gains nothing by the widest.
extern const InputsLoops inputs_double;
#if defined(__x86_64__) && defined(__GNUC__)
extern const InputsLoops inputs_baseline, inputs_avx2;
inline const InputsLoops& inputs_float() { return isa() == Isa::baseline ? inputs_baseline : inputs_avx2; }
#else
extern const InputsLoops inputs_baseline;
inline const InputsLoops& inputs_float() { return inputs_baseline; }
#endif

}  // namespace fastflat::cpu

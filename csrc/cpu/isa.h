// SPDX-License-Identifier: Apache-2.0
// One binary, several instruction sets: csrc/cpu/isa/<set>.cpp compiles every loop once for its set, and the fastest
// that the processor has is taken at run time. FASTFLAT_CPU_ISA=baseline|avx2|avx512 caps the choice.
#pragma once

#include "cpu/fake_quantize.h"
#include "cpu/identity.h"

namespace fastflat::cpu {

struct Loops {
  const char* name;
  IdentityLoops identity;
  FakeQuantizeLoops fake_quantize;
};

extern const Loops loops_baseline;
#if defined(__x86_64__) && defined(__GNUC__)
extern const Loops loops_avx2;
extern const Loops loops_avx512;
#endif

// The set in use; chosen once.
const Loops& loops();

}  // namespace fastflat::cpu

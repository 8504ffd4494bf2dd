// SPDX-License-Identifier: Apache-2.0
#include <cstdlib>
#include <cstring>

#include "cpu/isa.h"

namespace fastflat::cpu {

static const Loops& choose() {
#if defined(__x86_64__) && defined(__GNUC__)
  const char* cap = std::getenv("FASTFLAT_CPU_ISA");
  const bool below512 = cap && std::strcmp(cap, "avx512") != 0;
  const bool below256 = below512 && std::strcmp(cap, "avx2") != 0;
  __builtin_cpu_init();
  if (!below512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return loops_avx512;
  }
  if (!below256 && __builtin_cpu_supports("avx2")) return loops_avx2;
#endif
  return loops_baseline;
}

const Loops& loops() {
  static const Loops& chosen = choose();
  return chosen;
}

}  // namespace fastflat::cpu

// Read by fastflat._load: which set this process uses.
extern "C" __attribute__((visibility("default"))) const char* fastflat_cpu_isa() { return fastflat::cpu::loops().name; }

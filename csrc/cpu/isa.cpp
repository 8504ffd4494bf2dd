// SPDX-License-Identifier: Apache-2.0
#include <cstdlib>
#include <cstring>

#include "cpu/isa.h"

namespace fastflat::cpu {

static Isa choose() {
#if defined(__x86_64__) && defined(__GNUC__)
  const char* cap = std::getenv("FASTFLAT_CPU_ISA");
  const bool below512 = cap && std::strcmp(cap, "avx512") != 0;
  const bool below256 = below512 && std::strcmp(cap, "avx2") != 0;
  __builtin_cpu_init();
  if (!below512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return Isa::avx512;
  }
  if (!below256 && __builtin_cpu_supports("avx2")) return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

}  // namespace fastflat::cpu

// Read by fastflat._load: which set this process uses.
extern "C" __attribute__((visibility("default"))) const char* fastflat_cpu_isa() {
  constexpr const char* names[] = {"baseline", "avx2", "avx512"};
  return names[static_cast<int>(fastflat::cpu::isa())];
}

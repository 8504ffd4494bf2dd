// SPDX-License-Identifier: Apache-2.0
// One binary, several instruction sets: build_tools compiles each csrc/cpu/*_loops.cpp once for every set (isa_begin.h
// reads which), and the fastest that the processor has is taken at run time. FASTFLAT_CPU_ISA=baseline|avx2|avx512 caps
// the choice.
#pragma once

namespace fastflat::cpu {

enum class Isa { baseline, avx2, avx512 };

// The set in use; chosen once.
Isa isa();

}  // namespace fastflat::cpu

// FASTFLAT_LOOPS(Table, name) declares the table of loops `name` of every set and name(), the one in use.
#if defined(__x86_64__) && defined(__GNUC__)
#define FASTFLAT_LOOPS(Table, name)                                                 \
  extern const Table name##_baseline, name##_avx2, name##_avx512;                   \
  inline const Table& name() {                                                      \
    const Table* const tables[] = {&name##_baseline, &name##_avx2, &name##_avx512}; \
    return *tables[static_cast<int>(isa())];                                        \
  }
#else
#define FASTFLAT_LOOPS(Table, name)   \
  extern const Table name##_baseline; \
  inline const Table& name() { return name##_baseline; }
#endif

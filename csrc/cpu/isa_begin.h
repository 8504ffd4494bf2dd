// SPDX-License-Identifier: Apache-2.0
// First half of a *_loops.cpp: from here on the code is for the set that the build asks for. Standard headers come
// before it, so that nothing of theirs is compiled for the set; functors come after it. isa_end.h closes it.
#define FASTFLAT_JOIN_(a, b) a##b
#define FASTFLAT_JOIN(a, b) FASTFLAT_JOIN_(a, b)

#if defined(FASTFLAT_ISA_AVX512)
#define FASTFLAT_ISA avx512
#pragma GCC push_options
#pragma GCC target("avx2,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define FASTFLAT_ROUND_INSTRUCTION 1
#elif defined(FASTFLAT_ISA_AVX2)
#define FASTFLAT_ISA avx2
#pragma GCC push_options
#pragma GCC target("avx2")
#define FASTFLAT_ROUND_INSTRUCTION 1
#else
#define FASTFLAT_ISA baseline
#endif

// The name of a family's table for this set.
#define FASTFLAT_TABLE(name) FASTFLAT_JOIN(name##_, FASTFLAT_ISA)

// A function that many loops call, a block or a run at a time: one copy of it for each type instead of one in each.
#define FASTFLAT_SHARED_CODE __attribute__((noinline, noclone))

// SPDX-License-Identifier: Apache-2.0
// Last line of a *_loops.cpp.
#if defined(FASTFLAT_ISA_AVX512) || defined(FASTFLAT_ISA_AVX2)
#pragma GCC pop_options
#endif

// SPDX-License-Identifier: Apache-2.0
// FASTFLAT_HD marks a function that runs on host and device. Forced inlining lets one functor be compiled into loops
// for several instruction sets inside one binary.
#pragma once

#ifdef __CUDACC__
#define FASTFLAT_HD __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define FASTFLAT_HD __forceinline
#else
#define FASTFLAT_HD inline __attribute__((always_inline))
#endif

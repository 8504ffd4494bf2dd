// SPDX-License-Identifier: Apache-2.0
#include "cpu/isa/headers.h"

#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define FASTFLAT_ROUND_INSTRUCTION 1
#define FASTFLAT_ISA avx512
// clang-format off: the functors must be seen after the pragma
#include "math/convert.h"
#include "math/fake_quantize.h"
#include "math/identity.h"

#include "cpu/isa/all_loops.h"
// clang-format on

namespace fastflat::cpu {
const Loops loops_avx512 = {"avx512", avx512::identity_loops, avx512::fake_quantize_loops};
}

#pragma GCC pop_options
#endif

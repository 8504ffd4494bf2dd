// SPDX-License-Identifier: Apache-2.0
#include "cpu/isa/headers.h"

#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2")
#define FASTFLAT_ROUND_INSTRUCTION 1
#define FASTFLAT_ISA avx2
// clang-format off: the functors must be seen after the pragma
#include "math/convert.h"
#include "math/fake_quantize.h"
#include "math/identity.h"

#include "cpu/isa/all_loops.h"
// clang-format on

namespace fastflat::cpu {
const Loops loops_avx2 = {"avx2", avx2::identity_loops, avx2::fake_quantize_loops};
}

#pragma GCC pop_options
#endif

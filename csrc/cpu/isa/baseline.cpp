// SPDX-License-Identifier: Apache-2.0
#include "cpu/isa/headers.h"

#define FASTFLAT_ISA baseline
// clang-format off: the functors must be seen after the pragma
#include "math/convert.h"
#include "math/fake_quantize.h"
#include "math/identity.h"

#include "cpu/isa/all_loops.h"
// clang-format on

namespace fastflat::cpu {
const Loops loops_baseline = {"baseline", baseline::identity_loops, baseline::fake_quantize_loops};
}

// SPDX-License-Identifier: Apache-2.0
// Body of csrc/cpu/isa/<set>.cpp: the loops of every op family in namespace FASTFLAT_ISA, gathered in one table. The
// standard headers come first, outside the target pragma, so that nothing of theirs is compiled for the set.

namespace fastflat::cpu {
namespace FASTFLAT_ISA {
namespace {

#include "cpu/loops.h"

#include "cpu/fake_quantize_loops.h"
#include "cpu/identity_loops.h"

}  // namespace
}  // namespace FASTFLAT_ISA
}  // namespace fastflat::cpu

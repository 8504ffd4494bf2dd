// SPDX-License-Identifier: Apache-2.0
// The loop of the template op. Compiled once for each instruction set (cpu/isa.h).
#include <cstdint>

#include "cpu/identity.h"

#include "cpu/isa_begin.h"
#include "math/identity.h"

namespace fastflat::cpu {
namespace FASTFLAT_ISA {
namespace {

template <class Unit>
void identity_copy(const void* x_, void* y_, int64_t begin, int64_t end) {
  const Unit* __restrict x = static_cast<const Unit*>(x_);
  Unit* __restrict y = static_cast<Unit*>(y_);
  const Identity functor;
  for (int64_t i = begin; i < end; ++i) y[i] = functor(x[i]);
}

void identity_units(const void* x, void* y, int64_t width, int64_t begin, int64_t end) {
  if (width == 8) return identity_copy<uint64_t>(x, y, begin, end);
  if (width == 4) return identity_copy<uint32_t>(x, y, begin, end);
  if (width == 2) return identity_copy<uint16_t>(x, y, begin, end);
  identity_copy<uint8_t>(x, y, begin * width, end * width);
}

}  // namespace
}  // namespace FASTFLAT_ISA

const IdentityLoops FASTFLAT_TABLE(identity_loops) = {FASTFLAT_ISA::identity_units};

}  // namespace fastflat::cpu

#include "cpu/isa_end.h"

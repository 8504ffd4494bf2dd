// SPDX-License-Identifier: Apache-2.0
// Included once per instruction set, inside its namespace.

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

const IdentityLoops identity_loops = {identity_units};

// SPDX-License-Identifier: Apache-2.0
// Tangents through element-wise work: what an activation's backward multiplies each tangent with, phi'(p) and
// phi''(p) g, g being the gradient at its output. p is what that backward sees: the output y of sigmoid and tanh, the
// input z of the others.
#pragma once

#include "elementary.h"
#include "macros.h"

namespace fastflat {

// Of a tangent along the data (or the gradient), and of one along p.
template <class C>
struct TangentFactors {
  C first, second;
};

// Numbers in the schemas of the ops; `given` factors come as they are.
enum Activation : int {
  given,
  sigmoid_output,
  tanh_output,
  silu_input,
  gelu_input,
  gelu_tanh_input,
  relu,
  activations
};

// Beyond `most` phi' and phi'' g are at their limits in both types; infinity would give 0 inf.
template <class C>
FASTFLAT_HD C held_input(C z) {
  constexpr C most = C(1000);
  const C raised = z < -most ? -most : z;
  return raised > most ? most : raised;
}

struct SigmoidFactors {
  template <class C>
  FASTFLAT_HD TangentFactors<C> operator()(C y, C g) const {
    return {y * (C(1) - y), g * (C(1) - (y + y))};
  }
};

struct TanhFactors {
  template <class C>
  FASTFLAT_HD TangentFactors<C> operator()(C y, C g) const {
    return {C(1) - y * y, (C(-2) * g) * y};
  }
};

struct SiluFactors {
  template <class C>
  FASTFLAT_HD TangentFactors<C> operator()(C input, C g) const {
    const C z = held_input(input);
    const C s = elementary::sigmoid(z);
    const C rest = C(1) - s;
    const C slope = s * (C(1) + z * rest);
    const C bend = (s * rest) * (C(2) + z * (C(1) - (s + s)));
    return {slope, bend * g};
  }
};

struct GeluFactors {
  template <class C>
  FASTFLAT_HD TangentFactors<C> operator()(C input, C g) const {
    const C z = held_input(input);
    const elementary::Normal<C> n = elementary::normal(z);
    return {n.below + z * n.density, (n.density * (C(2) - z * z)) * g};
  }
};

// z (1 + tanh(u)) / 2, u = c (z + 0.044715 z^3), c = sqrt(2 / pi).
struct GeluTanhFactors {
  template <class C>
  FASTFLAT_HD TangentFactors<C> operator()(C input, C g) const {
    constexpr C c = C(0.7978845608028654);
    const C z = held_input(input), square = z * z;
    const C t = elementary::tanh(c * (z + C(0.044715) * (square * z)));
    const C q = C(1) - t * t;
    const C half = C(0.5) * z;
    const C first = c * (C(1) + C(0.134145) * square);  // u'
    const C second = (C(0.26829) * c) * z;              // u''
    const C slope = C(0.5) * (C(1) + t) + (half * q) * first;
    const C bend = q * first + half * (q * second - ((C(2) * t) * q) * (first * first));
    return {slope, bend * g};
  }
};

// NaN passes, as torch's backward has it.
struct ReluFactors {
  template <class C>
  FASTFLAT_HD TangentFactors<C> operator()(C p, C) const {
    return {p <= C(0) ? C(0) : C(1), C(0)};
  }
};

}  // namespace fastflat

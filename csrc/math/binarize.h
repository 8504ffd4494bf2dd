// SPDX-License-Identifier: Apache-2.0
// Binarization, element by element. alpha and k belong to the scale of the element, h is its importance.
//
//   y  = sign(x) alpha                                  sign(+-0) = +1, NaN stays
//   gx = gy alpha 1{|x| <= clip} + (h sign(x)) k        k = (sum(gy sign(x)) + ga) / sum h
//   ty = tx alpha 1{|x| <= clip} + sign(x) ta           ta = sum(h sign(x) tx) / sum h
#pragma once

#include "fake_quantize.h"
#include "macros.h"

namespace fastflat {

template <class C>
struct Binarize {
  C clip;

  FASTFLAT_HD static C sign(C x) {
    const C upper = x >= C(0) ? C(1) : x;
    return x < C(0) ? C(-1) : upper;
  }

  FASTFLAT_HD static C magnitude(C x) { return x < C(0) ? -x : x + C(0); }

  FASTFLAT_HD static C forward(C x, C alpha) { return sign(x) * alpha; }

  // The straight-through part of gradient and tangent.
  FASTFLAT_HD C passed(C v, C x, C alpha) const {
    using Mask = typename MaskOf<C>::type;
    const bool in = (x <= clip) & (-x <= clip);
    return keep<C>(Mask(0) - Mask(in), v * alpha);
  }

  // A quotient of sums that is 0 where there is nothing to divide by.
  FASTFLAT_HD static C quotient(double sum, double total) { return total == 0 ? C(0) : static_cast<C>(sum / total); }
};

}  // namespace fastflat

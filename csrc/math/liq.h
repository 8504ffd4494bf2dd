// SPDX-License-Identifier: Apache-2.0
// The weight-normalising quantizer, element by element, given the moments of the element's channel.
//
//   u = ((w - mean) / s) / c                 s = max(std, eps), c = max(clip, eps), NaN stays
//   q = 2 round((clamp(u, -1, 1) + 1) / 2 * levels) / levels - 1
//   y = c q
//
// Derivatives take the moments, the mask m = 1{|u| <= 1} and the residual q - u as constants:
//   dy/dw = m / s        dy/dclip = q - m u
#pragma once

#include <cstdint>

#include "fake_quantize.h"
#include "macros.h"
#include "round.h"

namespace fastflat {

template <class C>
struct Liq {
  C levels, clip, eps;

  FASTFLAT_HD static Liq make(int64_t levels, C clip, double eps) {
    Liq liq;
    liq.levels = static_cast<C>(levels);
    liq.eps = static_cast<C>(eps);
    liq.clip = liq.held(clip);
    return liq;
  }

  FASTFLAT_HD C held(C v) const { return v < eps ? eps : v; }

  struct Code {
    C u, q;
    typename MaskOf<C>::type in;
  };

  // s is held.
  FASTFLAT_HD Code code(C w, C mean, C s) const {
    using Mask = typename MaskOf<C>::type;
    Code c;
    c.u = ((w - mean) / s) / clip;
    const C lifted = c.u < C(-1) ? C(-1) : c.u;
    const C clamped = lifted > C(1) ? C(1) : lifted;
    c.q = (C(2) * round_even(((clamped + C(1)) * C(0.5)) * levels)) / levels - C(1);
    c.in = Mask(0) - Mask((c.u >= C(-1)) & (c.u <= C(1)));
    return c;
  }

  FASTFLAT_HD C forward(C w, C mean, C s) const { return clip * code(w, mean, s).q; }

  struct Gradient {
    C w;     // dL/dw
    C clip;  // this element's share of dL/dclip
  };

  FASTFLAT_HD Gradient backward(C gy, C w, C mean, C s) const {
    const Code c = code(w, mean, s);
    return {keep<C>(c.in, gy) / s, gy * (c.q - keep<C>(c.in, c.u))};
  }

  // The tangent of y: the transpose of backward. Absent tangents are passed as 0.
  FASTFLAT_HD C tangent(C tw, C tclip, C w, C mean, C s) const {
    const Code c = code(w, mean, s);
    return keep<C>(c.in, tw) / s + (c.q - keep<C>(c.in, c.u)) * tclip;
  }
};

}  // namespace fastflat
